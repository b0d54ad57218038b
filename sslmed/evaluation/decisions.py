"""Metrics of what is decided: scores cut at a threshold. What they take and give: see ``metrics``.

0/0 is 0, as in scikit-learn: precision where nothing is called, MCC where everything or nothing is.
"""

from typing import Any, NamedTuple

import numpy as np

from sslmed.evaluation.problems import Array, Floats, Problem, Task, mean_over_problems, ratio, replicated


class _Counts(NamedTuple):
    """(R,) sums of weight each."""

    hits: Floats
    missed: Floats
    false_alarms: Floats
    cleared: Floats


def balanced_accuracy(
    target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None
) -> Any:
    """The recall of each class, averaged over the classes; chance is 1/K. Of a finding: of its two sides.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(_balanced_accuracy, target, scores, weights, thresholds)


def f1(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """2 TP / (2 TP + FP + FN).

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_f1), target, scores, weights, thresholds)


def precision(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """TP / (TP + FP), the positive predictive value in the store's own mix of classes.

    Returns:
        float or (R,), in [0, 1] or nan; 0 where nothing is called.
    """
    return replicated(mean_over_problems(_precision), target, scores, weights, thresholds)


def recall(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """TP / (TP + FN), the sensitivity.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_recall), target, scores, weights, thresholds)


def mcc(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """Matthews' correlation of truth and decision (Biochim. Biophys. Acta 1975).

    With three or more classes it is the mean over classes, each against the rest, and not Gorodkin's R_K, which
    scikit-learn's ``matthews_corrcoef`` gives there.

    Returns:
        float or (R,), in [-1, 1] or nan; 0 where everything or nothing is called.
    """
    return replicated(mean_over_problems(_mcc), target, scores, weights, thresholds)


def _balanced_accuracy(task: Task, weights: Floats) -> Floats:
    return mean_over_problems(_recall if task.many else _mean_recall)(task, weights)


def _mean_recall(problem: Problem, weights: Floats) -> Floats:
    counts = _counts(problem, weights)
    return (_recall(problem, weights) + ratio(counts.cleared, counts.cleared + counts.false_alarms)) / 2


def _f1(problem: Problem, weights: Floats) -> Floats:
    counts = _counts(problem, weights)
    return ratio(2 * counts.hits, 2 * counts.hits + counts.false_alarms + counts.missed)


def _precision(problem: Problem, weights: Floats) -> Floats:
    counts = _counts(problem, weights)
    return ratio(counts.hits, counts.hits + counts.false_alarms, otherwise=0.0)


def _recall(problem: Problem, weights: Floats) -> Floats:
    counts = _counts(problem, weights)
    return ratio(counts.hits, counts.hits + counts.missed)


def _mcc(problem: Problem, weights: Floats) -> Floats:
    hits, missed, false_alarms, cleared = _counts(problem, weights)
    called, left = hits + false_alarms, missed + cleared
    scale = np.sqrt((hits + missed) * (false_alarms + cleared)) * np.sqrt(called * left)
    return ratio(hits * cleared - false_alarms * missed, scale, otherwise=0.0)


def _counts(problem: Problem, weights: Floats) -> _Counts:
    positive, called = problem.positive, problem.called
    cells = np.stack([positive & called, positive & ~called, ~positive & called, ~positive & ~called])
    return _Counts(*(cells @ weights))
