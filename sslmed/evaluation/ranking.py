"""Metrics of how scores rank images, whatever the threshold. What they take and give: see ``metrics``."""

from typing import Any

import numpy as np

from sslmed.evaluation.problems import Array, Floats, Problem, mean_over_problems, ratio, replicated

# Nine of ten images must pass; the small term forgives sums of weights that fall a rounding below.
_LEAST = 0.9 - 1e-9


def auroc(target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None) -> Any:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting half.

    Hanley & McNeil, Radiology 1982. Thresholds are ignored.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_auroc), target, scores, weights, thresholds)


def average_precision(
    target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None
) -> Any:
    """Precision at each positive's own score, averaged over positives: scikit-learn's area in steps, not interpolated.

    Thresholds are ignored.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_average_precision), target, scores, weights, thresholds)


def sensitivity_at_90_specificity(
    target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None
) -> Any:
    """The largest recall of positives among cuts that clear at least 0.9 of the negatives.

    A cut calls positive what scores at least as high; each distinct score is one. Nothing is interpolated between cuts;
    where the highest cut already clears too few, only one above all scores is left, and the value is 0. The cut is
    chosen anew in each replicate, on the images that are scored: it tells what a reader could choose, not what a fixed
    threshold gives. Thresholds are ignored.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_sensitivity), target, scores, weights, thresholds)


def specificity_at_90_sensitivity(
    target: Array, scores: Array, weights: Array | None = None, *, thresholds: Array | None = None
) -> Any:
    """The largest share of cleared negatives among cuts that call at least 0.9 of the positives.

    Cuts as in ``sensitivity_at_90_specificity``. Thresholds are ignored.

    Returns:
        float or (R,), in [0, 1] or nan.
    """
    return replicated(mean_over_problems(_specificity), target, scores, weights, thresholds)


def _auroc(problem: Problem, weights: Floats) -> Floats:
    """(R,): every positive's weight of beaten negatives, found by position in the sorted negatives."""
    positive, scores = problem.positive, problem.score
    negatives = np.sort(scores[~positive])
    below = _cumulated(weights[~positive][np.argsort(scores[~positive], kind="stable")])
    at = scores[positive]
    beaten = below[np.searchsorted(negatives, at, "left")]
    beaten += below[np.searchsorted(negatives, at, "right")]
    beaten *= weights[positive]
    return ratio(beaten.sum(axis=0) / 2, weights[positive].sum(axis=0) * below[-1])


def _average_precision(problem: Problem, weights: Floats) -> Floats:
    """(R,): the sum over positives of their weight times the precision among all that score at least as high."""
    at, own = problem.score[problem.positive], weights[problem.positive]
    precision = ratio(_weight_at_or_above(at, at, own), _weight_at_or_above(at, problem.score, weights))
    # A positive and all above it without weight: 0/0, and its own weight is zero.
    gained = np.where(own > 0, own * precision, 0.0)
    return ratio(gained.sum(axis=0), own.sum(axis=0))


def _sensitivity(problem: Problem, weights: Floats) -> Floats:
    called, cleared = _shares(problem, weights)
    return np.asarray(np.where(cleared >= _LEAST, called, 0.0).max(axis=0))


def _specificity(problem: Problem, weights: Floats) -> Floats:
    called, cleared = _shares(problem, weights)
    return np.asarray(np.where(called >= _LEAST, cleared, 0.0).max(axis=0))


def _shares(problem: Problem, weights: Floats) -> tuple[Floats, Floats]:
    """(cuts, R) each: the share of positives called and of negatives cleared at every cut, the highest first."""
    cuts = np.unique(problem.score)[::-1]
    shares = []
    for side in (problem.positive, ~problem.positive):
        own = weights[side]
        shares.append(ratio(_weight_at_or_above(cuts, problem.score[side], own), own.sum(axis=0)))
    return shares[0], 1 - shares[1]


def _weight_at_or_above(at: Array, scores: Array, weights: Floats) -> Floats:
    """(len(at), R): the weight of all whose score is at least each of ``at``."""
    descending = np.argsort(-scores, kind="stable")
    return _cumulated(weights[descending])[np.searchsorted(-scores[descending], -at, "right")]


def _cumulated(weights: Floats) -> Floats:
    """(N + 1, R): row i holds the sum of the first i rows."""
    sums = np.zeros((weights.shape[0] + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums
