"""How starts are compared: intervals from a patient bootstrap that pairs the arms, on draws from ``budgets``.

The patient, not the image, is what is resampled: images of one patient resemble each other, so counting them as
independent makes intervals too narrow. What is measured is the caller's: nothing here knows a metric.

* An arm's value at a budget is the mean over its draws of the measure on the test images.
* Its interval runs from the 2.5th to the 97.5th percentile of the same mean over replicates, each a resampling of the
  test patients (Efron 1979). One set of replicates serves every draw and every arm, so the difference of two arms is
  paired. The interval tells how the value would vary with other test patients; how it varies with the labels drawn is
  told by the standard deviation over draws.
* A replicate that lacks a class where the measure needs it is nan. It is left out, and how many were is reported.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sslmed.evaluation.budgets import Budget, Draw, LabelsConfig, Skipped, default_budgets, draws, parse
from sslmed.keyed_rng import rng

__all__ = [
    "Budget",
    "Draw",
    "Estimate",
    "Interval",
    "LabelsConfig",
    "Skipped",
    "bootstrap_weights",
    "default_budgets",
    "draws",
    "interval",
    "parse",
    "summarise",
    "verdict",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Predicted = TypeVar("Predicted")


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile interval, nan where undefined.

    Attributes:
        dropped: How many replicates were undefined and left out of the interval.
    """

    mean: float
    low: float
    high: float
    dropped: int = 0


@dataclass(frozen=True)
class Estimate:
    """One measure of one arm at one budget.

    Attributes:
        metric: The measure's name.
        draw_sd: Standard deviation over draws (n - 1), nan for a single draw.
        difference: This arm minus the reference arm, paired by patient; None for the reference itself.
    """

    arm: str
    metric: str
    value: Interval
    draw_sd: float
    difference: Interval | None


def bootstrap_weights(patients: Array, replicates: int, seed: int) -> npt.NDArray[np.uint16]:
    """How often each image counts in each replicate: all P patients are drawn P times, with replacement.

    Args:
        patients: (N,) patient keys.

    Returns:
        (replicates, N) counts, stored image by image, as the metrics read fastest. Independent of the order of rows.
    """
    ids, owner = np.unique(patients, return_inverse=True)
    random = rng(seed, 0, 0, "patient bootstrap")
    counts = np.empty((len(ids), replicates), dtype=np.uint16)
    for replicate in range(replicates):
        drawn = random.integers(0, len(ids), len(ids))
        counts[:, replicate] = np.bincount(drawn, minlength=len(ids))
    return counts[owner].T


def interval(values: Array, estimate: float | None = None) -> Interval:
    """The 95 % percentile interval of replicates.

    Args:
        values: (R,), nan for undefined replicates.
        estimate: What the interval belongs to, measured on the unresampled patients; by default the replicates' mean.
    """
    defined = values[~np.isnan(values)]
    dropped = len(values) - len(defined)
    if len(defined) == 0:
        return Interval(math.nan if estimate is None else estimate, math.nan, math.nan, dropped)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(defined.mean()) if estimate is None else estimate, float(low), float(high), dropped)


def summarise(
    arms: Mapping[str, Sequence[Predicted]],
    measures: Mapping[str, Callable[[Predicted, Array | None], Any]],
    weights: Array,
    *,
    reference: str | None = None,
) -> list[Estimate]:
    """Every measure of every arm at one budget, with intervals and paired differences to ``reference``.

    Args:
        arms: For each arm what each of its draws predicts of the test images, in whatever form the measures read.
        measures: By name; each takes one draw's predictions and (R, N) weights for (R,) values, or None for one float.
        weights: (R, N) from ``bootstrap_weights``, the same for all that will be compared.
        reference: The arm that the others are compared with.

    Returns:
        Measures in their order, within them arms.
    """
    estimates = []
    for name, measure in measures.items():
        measured = {arm: _measure(measure, predicted, weights) for arm, predicted in arms.items()}
        for arm, (points, replicates) in measured.items():
            difference = None
            if reference is not None and arm != reference:
                base_points, base_replicates = measured[reference]
                gap = float(points.mean() - base_points.mean())
                difference = interval(replicates - base_replicates, gap)
            spread = float(points.std(ddof=1)) if len(points) > 1 else math.nan
            estimates.append(Estimate(arm, name, interval(replicates, float(points.mean())), spread, difference))
    return estimates


def verdict(difference: Interval, reference: str, *, lower_is_better: bool = False) -> str:
    """What a paired difference allows one to say, in words."""
    if math.isnan(difference.low) or math.isnan(difference.high):
        return "cannot be said (a class is missing)"
    higher, lower = ("worse", "better") if lower_is_better else ("better", "worse")
    if difference.low > 0:
        return f"{higher} than {reference} (interval above zero)"
    if difference.high < 0:
        return f"{lower} than {reference} (interval below zero)"
    return "no difference shown (interval covers zero)"


def _measure(
    measure: Callable[[Predicted, Array | None], Any], predicted: Sequence[Predicted], weights: Array
) -> tuple[Floats, Floats]:
    """The measure of each draw (D,), and its mean over draws in each replicate (R,)."""
    points = np.array([measure(each, None) for each in predicted])
    total = np.zeros(weights.shape[0])
    for each in predicted:
        total += measure(each, weights)
    return points, total / len(predicted)
