"""Metrics of whether a probability means what it says. What they take and give: see ``metrics``.

Lower is better. They ask for probabilities in [0, 1] and ignore thresholds.
"""

from typing import Any

import numpy as np

from sslmed.evaluation.problems import Array, Floats, Problem, Task, mean_over_problems, ratio, replicated

BINS = 15


def ece(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """Expected calibration error: how far confidence and accuracy lie apart, in 15 bins (Guo et al. 2017, eq. 3).

    Confidence is the probability of the likelier class, of a tie the first; accuracy whether it is true. Bins are of
    equal width over [0, 1], closed above. The gap of each counts by its share of the weight. A finding has two classes,
    present and absent. More than two classes are one problem here, not one a class.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(_ece, target, scores, weights, thresholds)


def brier(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """Brier score: the mean squared error of the probabilities (Monthly Weather Review 1950).

    Two classes or a finding: (p - y)² of the positive, in [0, 1]. More classes: summed over them, in [0, 2]. Both as
    scikit-learn's ``brier_score_loss`` does by default.

    Returns:
        float or (R,), at least 0 or nan.
    """
    return replicated(_brier, target, scores, weights, thresholds)


def _ece(task: Task, weights: Floats) -> Floats:
    _check(task.scores)
    if not task.many:
        return mean_over_problems(_binary_ece)(task, weights)
    error = _gap(task.scores.max(axis=1), task.scores.argmax(axis=1) == task.target, weights)
    return np.where(_two_classes(task, weights), error, np.nan)


def _binary_ece(problem: Problem, weights: Floats) -> Floats:
    return _gap(np.maximum(problem.score, 1 - problem.score), (problem.score > 0.5) == problem.positive, weights)


def _gap(confidence: Array, right: Array, weights: Floats) -> Floats:
    # 0.6 is the upper edge of the ninth bin, and 1 - 0.4 a rounding above it: the small term puts both in that bin.
    bins = np.clip(np.ceil(confidence * BINS - 1e-9), 1, BINS)
    excess = (bins == np.arange(1, BINS + 1)[:, None]) * (confidence - right)
    return ratio(np.abs(excess @ weights).sum(axis=0), weights.sum(axis=0))


def _brier(task: Task, weights: Floats) -> Floats:
    _check(task.scores)
    if not task.many:
        return mean_over_problems(_binary_brier)(task, weights)
    truth = task.target[:, None] == np.arange(task.scores.shape[1])
    error = _mean(((task.scores - truth) ** 2).sum(axis=1), weights)
    return np.where(_two_classes(task, weights), error, np.nan)


def _binary_brier(problem: Problem, weights: Floats) -> Floats:
    return _mean((problem.score - problem.positive) ** 2, weights)


def _mean(values: Floats, weights: Floats) -> Floats:
    return ratio(values @ weights, weights.sum(axis=0))


def _two_classes(task: Task, weights: Floats) -> Array:
    """(R,): the rule of every other metric, so that all of a table are of the same replicates."""
    present = (task.target == np.arange(task.scores.shape[1])[:, None]) @ weights > 0
    return np.asarray(present.sum(axis=0) >= 2)


def _check(scores: Array) -> None:
    if scores.min() < -1e-6 or scores.max() > 1 + 1e-6:
        raise ValueError("scores must be probabilities from 0 to 1")
