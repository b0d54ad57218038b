"""Weighted classification metrics, exact, for all bootstrap replicates in one pass.

Every metric has one signature, ``metric(target, scores, weights=None, *, thresholds=None)``:
    target: (N,) integers in [0, K), one class an image; or (N, K) of 0, 1 and -1, K findings of which an image may have
        several and of which -1 is unknown.
    scores: (N, K) finite probabilities: over K >= 2 classes, or of each finding by itself.
    weights: (N,) for one value (a float) or (R, N) for R values; non-negative, such as the counts of a patient
        bootstrap. None counts every image once.
    thresholds: (K,), or (N, K) for each image's own. Finding k is called when its score is at least thresholds[k], the
        second of two classes when its score is at least thresholds[1] (thresholds[0] is not read). With three or more
        classes they are ignored, and the largest score decides. None is 0.5 for findings and the largest score for
        classes, on a tie the first. Only ``decisions`` reads thresholds.
They raise ``ValueError`` for anything else, since the caller made these arrays.

A metric is the mean over problems of one class against the rest: of two classes the second's alone, of more each one's
(macro), of findings each one's on the images where it is known. Balanced accuracy, ECE and Brier score say themselves
what they are for three and more classes.

One rule for what is undefined: a problem has a value when both its sides have weight, and the metric is the mean over
the problems that have one; nan when none has. So a class without images is left out of the mean, and images of one
class give nan, in every metric, without a warning. Where both sides have weight, 0/0 is 0, as in scikit-learn: the
precision of what is never called, and an MCC of one decision for all.

scikit-learn and torchmetrics are the oracles in the tests, value for value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sslmed.evaluation.decisions import balanced_accuracy, f1, mcc, precision, recall
from sslmed.evaluation.problems import Array, one_versus_rest
from sslmed.evaluation.ranking import (
    auroc,
    average_precision,
    sensitivity_at_90_specificity,
    specificity_at_90_sensitivity,
)
from sslmed.evaluation.reliability import brier, ece

__all__ = [
    "LOWER_IS_BETTER",
    "METRICS",
    "Array",
    "Measure",
    "Metric",
    "Scored",
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "brier",
    "ece",
    "f1",
    "mcc",
    "measures",
    "one_versus_rest",
    "precision",
    "recall",
    "sensitivity_at_90_specificity",
    "specificity_at_90_sensitivity",
]

Metric = Callable[..., Any]

METRICS: dict[str, Metric] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "balanced_accuracy": balanced_accuracy,
    "f1": f1,
    "precision": precision,
    "recall": recall,
    "mcc": mcc,
    "sensitivity_at_90_specificity": sensitivity_at_90_specificity,
    "specificity_at_90_sensitivity": specificity_at_90_sensitivity,
    "ece": ece,
    "brier": brier,
}
LOWER_IS_BETTER = frozenset({"ece", "brier"})


class Scored(NamedTuple):
    """What one model, or one draw's, says of the test images.

    Attributes:
        scores: (N, K).
        thresholds: As for a metric.
    """

    scores: Array
    thresholds: Array | None = None


Measure = Callable[[Scored, Array | None], Any]


def measures(target: Array, label: int | None = None) -> dict[str, Measure]:
    """Every metric against ``target``, as ``protocol.summarise`` takes them.

    Args:
        target: (N,) or (N, K).
        label: One class or finding, to be measured against the rest; None for the whole task.
    """
    return {name: partial(_measure, metric, target, label) for name, metric in METRICS.items()}


def _measure(metric: Metric, target: Array, label: int | None, scored: Scored, weights: Array | None) -> Any:
    if label is not None:
        target, *scored_alone = one_versus_rest(target, scored.scores, label, scored.thresholds)
        scored = Scored(*scored_alone)
    return metric(target, scored.scores, weights, thresholds=scored.thresholds)
