"""Weighted classification metrics, exact, for all bootstrap replicates in one pass.

A patient bootstrap gives every image a weight (how often its patient was drawn), so a metric here takes ``weights``
of shape (R, N) and returns R values. torchmetrics and scikit-learn take at most one weight vector a call: a thousand
replicates are then a thousand sorts of the same scores, seconds instead of tens of milliseconds. Here the scores are
sorted once, and replicates are columns of cumulated weights. scikit-learn is the oracle in the tests, value for
value.

Every metric has one signature, ``metric(target, scores, weights=None)``:
    target: (N,) integers in [0, K).
    scores: (N, K) probabilities, K >= 2, finite. The predicted class is the largest, on a tie the first.
    weights: (N,) for one value (a float) or (R, N) for R values; non-negative. None counts every image once.
It raises ``ValueError`` for anything else, since the caller made these arrays.

Two classes: class 1 is the positive one. More: the plain mean over classes of one-versus-rest (macro). One rule for
what is undefined: a class without weight has no value. It is left out of the macro mean, and fewer than two classes
with weight (with two classes: either of them missing) give nan.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Metric = Callable[..., Any]

# Weights are widened to float64 in blocks of at most this many cells (32 MB), whatever N and R.
_BLOCK_CELLS = 4_000_000


def auroc(target: Array, scores: Array, weights: Array | None = None) -> Any:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.

    Hanley & McNeil, Radiology 1982.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return _replicated(_auroc, target, scores, weights)


def average_precision(target: Array, scores: Array, weights: Array | None = None) -> Any:
    """Precision at each positive's own score, averaged over positives: scikit-learn's area in steps, not interpolated.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return _replicated(_average_precision, target, scores, weights)


def balanced_accuracy(target: Array, scores: Array, weights: Array | None = None) -> Any:
    """The recall of each class, averaged over the classes; chance is 1/K.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return _replicated(_balanced_accuracy, target, scores, weights)


def f1(target: Array, scores: Array, weights: Array | None = None) -> Any:
    """2 TP / (2 TP + FP + FN): of class 1 with two classes, averaged over the classes with more.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return _replicated(_f1, target, scores, weights)


METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
}


def _auroc(target: Array, scores: Array, weights: Floats) -> Floats:
    return _one_versus_rest(_binary_auroc, target, scores, weights)


def _average_precision(target: Array, scores: Array, weights: Floats) -> Floats:
    return _one_versus_rest(_binary_average_precision, target, scores, weights)


def _balanced_accuracy(target: Array, scores: Array, weights: Floats) -> Floats:
    truth = _one_hot(target, scores.shape[1])
    right = truth & (target == scores.argmax(axis=1))
    total = truth @ weights
    return _mean_over_present(_ratio(right @ weights, total), total > 0)


def _f1(target: Array, scores: Array, weights: Floats) -> Floats:
    classes = scores.shape[1]
    truth, predicted = _one_hot(target, classes), _one_hot(scores.argmax(axis=1), classes)
    total = truth @ weights
    # TP + FN is what is truly of the class, TP + FP what is called so.
    value = _ratio(2 * ((truth & predicted) @ weights), total + predicted @ weights)
    if classes == 2:
        return np.where((total > 0).all(axis=0), value[1], np.nan)
    return _mean_over_present(value, total > 0)


def _binary_auroc(positive: Array, scores: Array, weights: Floats) -> Floats:
    """(R,): every positive's weight of beaten negatives, found by position in the sorted negatives."""
    negatives = np.sort(scores[~positive])
    below = _cumulated(weights[~positive][np.argsort(scores[~positive], kind="stable")])
    at = scores[positive]
    beaten = below[np.searchsorted(negatives, at, "left")]
    beaten += below[np.searchsorted(negatives, at, "right")]
    beaten *= weights[positive]
    return _ratio(beaten.sum(axis=0) / 2, weights[positive].sum(axis=0) * below[-1])


def _binary_average_precision(positive: Array, scores: Array, weights: Floats) -> Floats:
    """(R,): the sum over positives of their weight times the precision among all that score at least as high."""
    at, own = scores[positive], weights[positive]
    precision = _ratio(_weight_at_or_above(at, at, own), _weight_at_or_above(at, scores, weights))
    # A positive and all above it without weight: 0/0, and its own weight is zero.
    gained = np.where(own > 0, own * precision, 0.0)
    return _ratio(gained.sum(axis=0), own.sum(axis=0))


def _weight_at_or_above(at: Array, scores: Array, weights: Floats) -> Floats:
    """(len(at), R): the weight of all whose score is at least each of ``at``."""
    descending = np.argsort(-scores, kind="stable")
    return _cumulated(weights[descending])[np.searchsorted(-scores[descending], -at, "right")]


def _cumulated(weights: Floats) -> Floats:
    """(N + 1, R): row i holds the sum of the first i rows."""
    sums = np.zeros((weights.shape[0] + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _one_versus_rest(
    binary: Callable[[Array, Array, Floats], Floats], target: Array, scores: Array, weights: Floats
) -> Floats:
    classes = scores.shape[1]
    present = _one_hot(target, classes) @ weights > 0
    columns = [1] if classes == 2 else range(classes)
    values = np.stack([binary(target == label, scores[:, label], weights) for label in columns])
    if classes == 2:
        return np.where(present.all(axis=0), values[0], np.nan)
    return _mean_over_present(values, present)


def _mean_over_present(values: Floats, present: Array) -> Floats:
    """(R,): the mean of (K, R) values over the classes with weight; nan below two of them."""
    count = present.sum(axis=0)
    mean = np.where(present, values, 0.0).sum(axis=0) / np.maximum(count, 1)
    return np.where(count >= 2, mean, np.nan)


def _one_hot(label: Array, classes: int) -> Array:
    """(K, N) booleans."""
    return np.asarray(label == np.arange(classes)[:, None])


def _ratio(above: Floats, below: Floats) -> Floats:
    """``above / below``, nan where ``below`` is zero."""
    return np.divide(above, below, out=np.full_like(below, np.nan), where=below > 0)


def _replicated(
    metric: Callable[[Array, Array, Floats], Floats], target: Array, scores: Array, weights: Array | None
) -> float | Floats:
    """Check the arrays, then run ``metric`` on (N, R) blocks: sorting copies whole rows, one an image."""
    target, scores = np.asarray(target), np.asarray(scores)
    weights = np.ones(len(target)) if weights is None else np.asarray(weights)
    _check(target, scores, weights)
    columns = np.atleast_2d(weights).T
    values = np.concatenate([metric(target, scores, block) for block in _blocks(columns)])
    return float(values[0]) if weights.ndim == 1 else values


def _blocks(columns: Array) -> Iterator[Floats]:
    width = max(1, _BLOCK_CELLS // max(1, columns.shape[0]))
    for start in range(0, columns.shape[1], width):
        yield np.ascontiguousarray(columns[:, start : start + width], dtype=np.float64)


def _check(target: Array, scores: Array, weights: Array) -> None:
    count = target.shape[0]
    if scores.ndim != 2 or scores.shape[0] != count or scores.shape[1] < 2:
        raise ValueError(f"scores of shape ({count}, K >= 2) are needed, not {scores.shape}")
    if weights.ndim not in (1, 2) or weights.shape[-1] != count or weights.size == 0:
        raise ValueError(f"weights of shape ({count},) or (R, {count}) are needed, not {weights.shape}")
    if not np.issubdtype(target.dtype, np.integer) or target.min() < 0 or target.max() >= scores.shape[1]:
        raise ValueError(f"target must hold integers from 0 to {scores.shape[1] - 1}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError("weights must be finite and non-negative")
