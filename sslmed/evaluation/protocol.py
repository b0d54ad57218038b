"""How starts are compared: nested few-label draws by patient, and patient bootstrap intervals that pair the arms.

The patient, not the image, is what is drawn: images of one patient resemble each other, so counting them as independent
makes few labels look like many and intervals too narrow.

* A draw is a set of training patients. Draws of one seed are nested (the 1 % draw lies inside the 10 % draw) and
  stratified. At 100 % every seed draws the same patients.
* An arm's value at a budget is the mean over its draws of the metric on the test images.
* Its interval runs from the 2.5th to the 97.5th percentile of the same mean over replicates, each a resampling of the
  test patients (Efron 1979). One set of replicates serves every draw and every arm, so the difference of two arms is
  paired. The interval tells how the value would vary with other test patients; how it varies with the labels drawn is
  told by the standard deviation over draws.
* A replicate that lacks a class where the metric needs it is nan. It is left out, and how many were is reported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from sslmed.config import Config, UsageError
from sslmed.evaluation.metrics import METRICS, Metric
from sslmed.keyed_rng import key, rng

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Budget:
    """How many labelled training patients a probe gets: a share of them, or a number of each class.

    Attributes:
        text: As the user wrote it: ``1%`` or ``k=5``.
        share: In (0, 1], or None.
        each: Patients of each class, at least 1, or None.
    """

    text: str
    share: float | None = None
    each: int | None = None


class LabelsConfig(Config):
    """Which labelled train patients fine-tuning gets.

    Attributes:
        budget: a share of them such as ``10%``, or ``k=5`` patients of each class.
        seed: of the draw; draws of one seed are nested.
    """

    budget: str = "100%"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        try:
            budgets = parse(self.budget)
        except UsageError as error:
            raise ValueError(str(error)) from error
        if len(budgets) != 1:
            raise ValueError(f"budget is '{self.budget}'; allowed: one budget, such as 10% or k=5")
        return self


@dataclass(frozen=True)
class Skipped:
    """A budget that cannot be drawn, and why."""

    budget: str
    why: str


@dataclass(frozen=True, eq=False)
class Draw:
    """The labelled images of one budget under one seed.

    Attributes:
        rows: (n,) ascending positions in the arrays that ``draws`` was given.
        patients: How many patients these images are of.
        everyone: Whether this is every labelled patient, so that all seeds drew the same set.
    """

    budget: Budget
    seed: int
    rows: Rows
    patients: int
    everyone: bool


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
    """One metric of one arm at one budget.

    Attributes:
        draw_sd: Standard deviation over draws (n - 1), nan for a single draw.
        difference: This arm minus the reference arm, paired by patient; None for the reference itself.
    """

    arm: str
    metric: str
    value: Interval
    draw_sd: float
    difference: Interval | None


def parse(text: str) -> tuple[Budget, ...]:
    """Read budgets such as ``1%,10%,100%`` or ``k=5``, in the order given.

    Raises:
        UsageError: an unreadable, out-of-range or repeated budget.
    """
    budgets = tuple(_budget(part.strip()) for part in text.split(","))
    meanings = [(budget.share, budget.each) for budget in budgets]
    if len(set(meanings)) < len(meanings):
        raise UsageError(f"budgets '{text}' name one budget twice; give each once, such as 1%,10%,100%")
    return budgets


def draws(
    patients: Array, target: Array, budgets: Sequence[Budget], seeds: Sequence[int]
) -> tuple[list[Draw], list[Skipped]]:
    """Choose training patients for every budget and seed.

    Each seed puts all labelled patients into one order: first one patient of each class, then the classes in
    proportion (Webster's divisor method). A share is a prefix of that order, which makes draws nested and stratified
    at once. A patient whose images have several classes counts as the rarest of them. The order depends on ids and
    seed, not on that of rows.

    Args:
        patients: (N,) patient keys, bytes or text.
        target: (N,) class indices, -1 for unlabelled images, which are never drawn.
        seeds: One draw for each; at 100 % all seeds give the same set.

    Returns:
        The draws, budgets in the order given and seeds within; and the budgets that fall below one patient a class.
    """
    labelled = np.flatnonzero(target >= 0)
    ids, owner = np.unique(patients[labelled], return_inverse=True)
    strata = _rarest_class(owner, target[labelled], len(ids))
    names = [_text(patient) for patient in ids]
    orders = {seed: _order(names, strata, seed) for seed in seeds}
    chosen: list[Draw] = []
    skipped: list[Skipped] = []
    for budget in budgets:
        taken = [_draw(budget, seed, _take(budget, *orders[seed], strata), labelled, owner) for seed in seeds]
        if len(ids) and not _too_few(budget, strata) and all(_has_every_class(draw, target) for draw in taken):
            chosen.extend(taken)
        else:
            skipped.append(Skipped(budget.text, _why(budget, strata)))
    return chosen, skipped


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
    arms: Mapping[str, Sequence[Array]], target: Array, weights: Array, *, reference: str | None = None
) -> list[Estimate]:
    """Every metric of every arm at one budget, with intervals and paired differences to ``reference``.

    Args:
        arms: For each arm the (N, K) test probabilities of each draw.
        target: (N,) test classes in [0, K).
        weights: (R, N) from ``bootstrap_weights``, the same for all that will be compared.
        reference: The arm that the others are compared with.
    """
    estimates = []
    for metric, measure in METRICS.items():
        measured = {arm: _measure(measure, scores, target, weights) for arm, scores in arms.items()}
        for arm, (points, replicates) in measured.items():
            difference = None
            if reference is not None and arm != reference:
                base_points, base_replicates = measured[reference]
                gap = float(points.mean() - base_points.mean())
                difference = interval(replicates - base_replicates, gap)
            spread = float(points.std(ddof=1)) if len(points) > 1 else math.nan
            estimates.append(Estimate(arm, metric, interval(replicates, float(points.mean())), spread, difference))
    return estimates


def verdict(difference: Interval, reference: str) -> str:
    """What a paired difference allows one to say, in words."""
    if math.isnan(difference.low) or math.isnan(difference.high):
        return "cannot be said (a class is missing)"
    if difference.low > 0:
        return f"better than {reference} (interval above zero)"
    if difference.high < 0:
        return f"worse than {reference} (interval below zero)"
    return "no difference shown (interval covers zero)"


def _measure(measure: Metric, scores: Sequence[Array], target: Array, weights: Array) -> tuple[Floats, Floats]:
    """The metric of each draw (D,), and its mean over draws in each replicate (R,)."""
    points = np.array([measure(target, each) for each in scores])
    total = np.zeros(weights.shape[0])
    for each in scores:
        total += measure(target, each, weights)
    return points, total / len(scores)


def _budget(text: str) -> Budget:
    allowed = "a share of the training patients such as 1% (above 0, up to 100), or k=5 for patients of each class"
    try:
        if text.endswith("%") and 0 < float(text[:-1]) <= 100:
            return Budget(text, share=float(text[:-1]) / 100)
        if text.startswith("k=") and int(text[2:]) >= 1:
            return Budget(text, each=int(text[2:]))
    except ValueError:
        pass
    raise UsageError(f"'{text}' is not a budget; allowed: {allowed}")


def _rarest_class(owner: Array, target: Array, count: int) -> Array:
    """(count,): each patient's class; of several the one that the fewest patients have, on a tie the lower index."""
    has = np.zeros((count, int(target.max(initial=0)) + 1), dtype=bool)
    has[owner, target] = True
    commonness = np.where(has, has.sum(axis=0), np.iinfo(np.int64).max)
    return np.asarray(commonness.argmin(axis=1))


def _text(patient: Any) -> str:
    return patient.decode() if isinstance(patient, bytes) else str(patient)


def _order(names: Sequence[str], strata: Array, seed: int) -> tuple[Array, Array]:
    """All patients in the order in which they are drawn, and each patient's place within its class.

    The (j + 1)-th of n patients of a class stands at (j + 1/2) / n, the first of each class before all others.
    """
    by_chance = sorted(range(len(names)), key=lambda index: key(seed, "few-label draw", names[index]))
    place = np.zeros(len(names), dtype=np.int64)
    position = np.zeros(len(names))
    for label in np.unique(strata):
        members = [index for index in by_chance if strata[index] == label]
        place[members] = np.arange(len(members))
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    position[place == 0] = 0.0
    return np.lexsort((strata, position)), place


def _take(budget: Budget, order: Array, place: Array, strata: Array) -> Array:
    if budget.each is not None:
        return np.flatnonzero(place < budget.each)
    # Half up, not half to even; the tiny term forgives shares such as 0.29, whose product falls just below a half.
    return order[: math.floor((budget.share or 0.0) * len(strata) + 0.5 + 1e-9)]


def _draw(budget: Budget, seed: int, members: Array, labelled: Array, owner: Array) -> Draw:
    rows = labelled[np.isin(owner, members)].astype(np.int64)
    return Draw(budget, seed, rows, len(members), everyone=len(rows) == len(labelled))


def _has_every_class(draw: Draw, target: Array) -> bool:
    return set(target[draw.rows].tolist()) == set(target[target >= 0].tolist())


def _too_few(budget: Budget, strata: Array) -> bool:
    return budget.each is not None and int(np.unique(strata, return_counts=True)[1].min()) < budget.each


def _why(budget: Budget, strata: Array) -> str:
    counts = np.unique(strata, return_counts=True)[1]
    if len(counts) == 0:
        return "no training patient has a label"
    if budget.each is not None:
        return f"the rarest class has {counts.min()} labelled training patients"
    patients = f"{len(strata)} labelled training patients of {len(counts)} classes"
    return f"below one patient a class: {budget.text} of {patients}"
