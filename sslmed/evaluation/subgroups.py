"""Whom a model serves worse: the same measures on the test images of each sex, device, age third and so on.

A subgroup is a weight: images outside of it count nothing, in the value and in every bootstrap replicate. All test
patients are resampled together, so a subgroup's size varies from replicate to replicate as it would in another study.
Intervals of small groups are wide, and a dozen groups show one that looks worse by chance: read them as questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sslmed.evaluation.protocol import Estimate, summarise

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Predicted = TypeVar("Predicted")

# Of fewer, a bootstrap draws the same few again and again: its interval would be far too narrow.
LEAST_PATIENTS = 5
UNKNOWN = "unknown"
PARTS = 3


@dataclass(frozen=True)
class Group:
    """What was measured of one subgroup.

    Attributes:
        estimates: Measures in their order, within them arms.
    """

    name: str
    patients: int
    images: int
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True)
class TooSmall:
    """A subgroup of fewer than ``LEAST_PATIENTS`` patients, which is not measured."""

    name: str
    patients: int


def groups(values: Array, categories: Sequence[str] = ()) -> dict[str, Mask]:
    """The subgroups of a meta column, each with its images.

    Numbers are cut at their tertiles over the images given; up to three distinct numbers are groups of their own.
    Blanks are a group, ``unknown``. A group without images is left out.

    Args:
        values: (N,) positions in ``categories``, -1 where blank; or numbers, nan where blank.
        categories: The names; without any, ``values`` are numbers.

    Returns:
        (N,) booleans by name, categories in their order, numbers from low to high.
    """
    if len(categories):
        found = {name: np.asarray(values == place) for place, name in enumerate(categories)}
        blank = np.asarray(values < 0)
    else:
        blank = ~np.isfinite(values)
        found = _parts(values, ~blank)
    found[UNKNOWN] = found.get(UNKNOWN, False) | blank
    return {name: members for name, members in found.items() if members.any()}


def table(
    members: Mapping[str, Mask],
    patients: Array,
    arms: Mapping[str, Sequence[Predicted]],
    measures: Mapping[str, Callable[[Predicted, Array | None], Any]],
    weights: Array,
    *,
    reference: str | None = None,
) -> tuple[list[Group], list[TooSmall]]:
    """Every measure in each subgroup, with patient bootstrap intervals, and the groups that are too small for one.

    Args:
        members: (N,) booleans by name, as ``groups`` gives them.
        patients: (N,) patient keys of the test images.
        arms: As for ``protocol.summarise``, as are ``measures`` and ``reference``.
        weights: (R, N) from ``bootstrap_weights`` of all test images.
    """
    measured: list[Group] = []
    skipped: list[TooSmall] = []
    for name, inside in members.items():
        count = len(np.unique(patients[inside]))
        if count < LEAST_PATIENTS:
            skipped.append(TooSmall(name, count))
            continue
        within = {each: _within(measure, inside) for each, measure in measures.items()}
        estimates = summarise(arms, within, weights, reference=reference)
        measured.append(Group(name, count, int(inside.sum()), tuple(estimates)))
    return measured, skipped


def _within(
    measure: Callable[[Predicted, Array | None], Any], inside: Mask
) -> Callable[[Predicted, Array | None], Any]:
    def measured(predicted: Predicted, weights: Array | None) -> Any:
        return measure(predicted, inside.astype(np.uint16) if weights is None else weights * inside)

    return measured


def _parts(values: Array, known: Array) -> dict[str, Mask]:
    distinct = np.unique(values[known])
    if len(distinct) <= PARTS:
        return {f"{value:g}": values == value for value in distinct}
    low, high = np.quantile(values[known], [1 / PARTS, 2 / PARTS])
    with_nan = np.where(known, values, np.nan)  # a comparison with nan is False
    return {
        f"up to {low:g}": with_nan <= low,
        f"above {low:g} to {high:g}": (with_nan > low) & (with_nan <= high),
        f"above {high:g}": with_nan > high,
    }
