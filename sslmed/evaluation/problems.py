"""What every metric shares: problems of one class against the rest, their mean, and all bootstrap replicates at once.

A patient bootstrap gives every image a weight (how often its patient was drawn). torchmetrics and scikit-learn take at
most one weight vector a call: a thousand replicates are then a thousand sorts of the same scores, seconds instead of
tens of milliseconds. Here scores are sorted once, and replicates are columns of weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# Weights are widened to float64 in blocks of at most this many cells (32 MB), whatever N and R.
_BLOCK_CELLS = 4_000_000


class Problem(NamedTuple):
    """One class or finding against the rest, on the n images where it is known.

    Attributes:
        positive: (n,) booleans, what is true.
        score: (n,) of being positive.
        called: (n,) booleans, what is decided.
    """

    positive: Array
    score: Array
    called: Array


class Task(NamedTuple):
    """Checked arrays of N images.

    Attributes:
        target: (N,) class indices, or (N, K) of 0, 1 and -1 for findings.
        scores: (N, K).
        called: (N, K) booleans, what is decided.
    """

    target: Array
    scores: Array
    called: Array

    @property
    def many(self) -> bool:
        """Whether it is one class of more than two."""
        return self.target.ndim == 1 and self.scores.shape[1] > 2


class OneVersusRest(NamedTuple):
    """A problem in the form that every metric takes: a single finding.

    Attributes:
        target: (N, 1) of 0, 1 and -1.
        scores: (N, 1).
        thresholds: (N, 1); at least the score where the whole task decides against the class.
    """

    target: Array
    scores: Array
    thresholds: Array


Binary = Callable[[Problem, Floats], Floats]  # and the (n, R) weights, to R values
Whole = Callable[[Task, Floats], Floats]  # and the (N, R) weights, to R values


def one_versus_rest(target: Array, scores: Array, label: int, thresholds: Array | None = None) -> OneVersusRest:
    """The problem of one class or finding, so that a table by class comes from the same metrics.

    Decisions are those of the whole task: with three or more classes an image is called what scores most, whatever the
    score. That is no threshold on one column, so it becomes a threshold of each image's own.

    Args:
        target: (N,) or (N, K), as for a metric.
        scores: (N, K).
        label: In [0, K).
        thresholds: As for a metric.
    """
    task = _task(target, scores, thresholds)
    own, called = task.scores[:, [label]], task.called[:, [label]]
    truth = task.target[:, [label]] if task.target.ndim == 2 else (task.target == label)[:, None].astype(np.int64)
    return OneVersusRest(truth, own, np.where(called, own, np.inf))


def replicated(
    measure: Whole, target: Array, scores: Array, weights: Array | None, thresholds: Array | None
) -> float | Floats:
    """Check the arrays, then run ``measure`` on (N, R) blocks: sorting copies whole rows, one an image.

    Returns:
        A float for (N,) weights or none, (R,) for (R, N).

    Raises:
        ValueError: what a metric's arrays may not be, since the caller made them.
    """
    task = _task(target, scores, thresholds)
    weights = np.ones(len(task.target)) if weights is None else np.asarray(weights)
    _check_weights(weights, len(task.target))
    values = np.concatenate([measure(task, block) for block in _blocks(np.atleast_2d(weights).T)])
    return float(values[0]) if weights.ndim == 1 else values


def mean_over_problems(binary: Binary) -> Whole:
    """The mean of ``binary`` over the problems whose two sides both have weight; nan where none has."""

    def whole(task: Task, weights: Floats) -> Floats:
        total, count = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
        for known, problem in _problems(task):
            if not 0 < problem.positive.sum() < len(problem.positive):
                continue
            own = weights if known.all() else weights[known]
            defined = (own[problem.positive].sum(axis=0) > 0) & (own[~problem.positive].sum(axis=0) > 0)
            total += np.where(defined, binary(problem, own), 0.0)
            count += defined
        return ratio(total, count)

    return whole


def ratio(above: Floats, below: Floats, otherwise: float = np.nan) -> Floats:
    """``above / below``, ``otherwise`` where ``below`` is zero."""
    result = np.full(np.broadcast_shapes(above.shape, below.shape), otherwise)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _problems(task: Task) -> Iterator[tuple[Array, Problem]]:
    """Of two classes the second's alone; each with the (N,) images where it is known."""
    if task.target.ndim == 2:
        for label in range(task.scores.shape[1]):
            known = task.target[:, label] >= 0
            columns = task.target[known, label] == 1, task.scores[known, label], task.called[known, label]
            yield known, Problem(*columns)
        return
    everywhere = np.ones(len(task.target), dtype=bool)
    for label in range(task.scores.shape[1]) if task.many else [1]:
        yield everywhere, Problem(task.target == label, task.scores[:, label], task.called[:, label])


def _task(target: Array, scores: Array, thresholds: Array | None) -> Task:
    target, scores = np.asarray(target), np.asarray(scores)
    _check(target, scores)
    if thresholds is not None:
        thresholds = np.asarray(thresholds, dtype=np.float64)
        if thresholds.shape not in (scores.shape[1:], scores.shape) or np.isnan(thresholds).any():
            raise ValueError(f"thresholds of shape {scores.shape[1:]} or {scores.shape} without nan are needed")
    return Task(target, scores, _called(target, scores, thresholds))


def _called(target: Array, scores: Array, thresholds: Array | None) -> Array:
    classes = scores.shape[1]
    if target.ndim == 2:
        return np.asarray(scores >= (0.5 if thresholds is None else thresholds))
    if classes == 2 and thresholds is not None:
        second = np.asarray(scores >= thresholds)[:, 1]
        return np.stack([~second, second], axis=1)
    return np.asarray(scores.argmax(axis=1)[:, None] == np.arange(classes))


def _blocks(columns: Array) -> Iterator[Floats]:
    width = max(1, _BLOCK_CELLS // max(1, columns.shape[0]))
    for start in range(0, columns.shape[1], width):
        yield np.ascontiguousarray(columns[:, start : start + width], dtype=np.float64)


def _check(target: Array, scores: Array) -> None:
    findings = target.ndim == 2
    if findings and scores.shape != target.shape:
        raise ValueError(f"scores of shape {target.shape} are needed, not {scores.shape}")
    if not findings and (scores.ndim != 2 or scores.shape[0] != len(target) or scores.shape[1] < 2):
        raise ValueError(f"scores of shape ({len(target)}, K >= 2) are needed, not {scores.shape}")
    least, most = (-1, 1) if findings else (0, scores.shape[1] - 1)
    integers = np.issubdtype(target.dtype, np.integer)
    if not integers or target.size == 0 or target.min() < least or target.max() > most:
        raise ValueError(f"target must hold integers from {least} to {most}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")


def _check_weights(weights: Array, count: int) -> None:
    if weights.ndim not in (1, 2) or weights.shape[-1] != count or weights.size == 0:
        raise ValueError(f"weights of shape ({count},) or (R, {count}) are needed, not {weights.shape}")
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError("weights must be finite and non-negative")
