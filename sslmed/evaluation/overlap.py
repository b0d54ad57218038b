"""How well masks agree: Dice, IoU and surface distances of each class in each image or volume, and their means.

A label map holds the number of a class at each pixel, (H, W) or (D, H, W) bytes. Pixels that the truth calls VOID count
for nothing, whatever is predicted there: the prediction is taken as if it had no class at them.

One rule for empty masks, class by class in each image or volume (a unit):

* in neither truth nor prediction: left out. All four measures are nan; ``Overlaps.left_out`` counts such units.
* in only one of them: Dice and IoU are 0, both distances the diagonal of the whole array (``surfaces``).

So a false alarm counts in full, and its absence is no merit. The background, class 0, has Dice and IoU but no distances
(its surface is that of the others) and is in no mean.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.annotations.mask_values import VOID
from sslmed.durable import write_atomically
from sslmed.evaluation import surfaces

Array = npt.NDArray[Any]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Measure = Callable[..., Any]

NAME = "test_masks.csv"
KINDS = ("dice", "iou", "hd95", "asd")
UNITS = ("mm", "px")
_FIXED = ("unit", "patient", "class", "dice", "iou")

# Weights are widened to float64 for at most this many cells at once (32 MB), whatever U and R.
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True, eq=False)
class Unit:
    """One image or one volume: store row or scan ``number``, keyed ``patient``, and (C,) values of each class."""

    number: int
    patient: bytes
    dice: Floats
    iou: Floats
    hd95: Floats
    asd: Floats


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Of U test units and C classes, the first of them the background; values are nan where undefined.

    Attributes:
        patient: (U,) keys, S32.
        row: (U,) store rows of images, or numbers of scans.
        dice: (U, C) in [0, 1].
        iou: (U, C) in [0, 1].
        hd95: (U, C), at least 0; nan for the background.
        asd: (U, C), at least 0; nan for the background.
        unit: of the two distances, ``mm`` or ``px``.
        classes: (C,) names.
    """

    patient: npt.NDArray[np.bytes_]
    row: npt.NDArray[np.int64]
    dice: Floats
    iou: Floats
    hd95: Floats
    asd: Floats
    unit: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = (len(self.row), len(self.classes))
        if self.patient.shape != shape[:1] or any(getattr(self, kind).shape != shape for kind in KINDS):
            raise ValueError(f"each of {', '.join(KINDS)} must have the shape {shape}, with one patient a row")
        if self.unit not in UNITS or len(self.classes) < 2:
            raise ValueError(f"distances in {' or '.join(UNITS)} and two classes are needed, not {self.unit}")

    @classmethod
    def of(cls, units: Sequence[Unit], unit: str, classes: Sequence[str]) -> Self:
        """Put units together, in their order."""
        values = {kind: np.array([getattr(each, kind) for each in units], np.float64) for kind in KINDS}
        return cls(
            patient=np.array([each.patient for each in units], "S32"),
            row=np.array([each.number for each in units], np.int64),
            **{kind: value.reshape(len(units), len(classes)) for kind, value in values.items()},
            unit=unit,
            classes=tuple(classes),
        )

    @property
    def left_out(self) -> Counts:
        """(C,): in how many units neither truth nor prediction has the class."""
        return np.asarray(np.isnan(self.dice).sum(axis=0), np.int64)

    def same_test(self, other: "Overlaps") -> bool:
        """Whether both are of the same units, in one order, of the same classes, with distances in the same unit."""
        equal = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("row", "patient"))
        return equal and (self.unit, self.classes) == (other.unit, other.classes)

    def write(self, run: Path) -> None:
        """Keep them in the run folder, a line for each class of each unit; blank is undefined."""
        with write_atomically(run / NAME) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*_FIXED, f"hd95:{self.unit}", f"asd:{self.unit}"])
            values = np.stack([getattr(self, kind) for kind in KINDS], axis=2)
            for row, patient, unit in zip(self.row, self.patient, values, strict=True):
                for name, four in zip(self.classes, unit, strict=True):
                    texts = ("" if math.isnan(value) else f"{value:.9g}" for value in four)
                    writer.writerow([row, patient.decode(), name, *texts])


def read(run: Path) -> Overlaps:
    """The test masks' measures of a fine-tuning run.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with (run / NAME).open(newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file))
    except OSError as error:
        raise DataError(f"{run} holds no {NAME}; is it a finished fine-tuning run on masks?") from error
    except (ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{run / NAME} is damaged ({error}); fine-tune again") from error


def counts(truth: Array, predicted: Array, classes: int) -> Counts:
    """Pixels in both, in the truth, in the prediction: (3, classes).

    The counts of a volume are the sum of those of its slices.

    Args:
        truth: a label map, with VOID for what nobody can tell.
        predicted: a label map of the same shape, without VOID.
        classes: how many there are, from 1 to 255.

    Raises:
        ValueError: other shapes or dtypes, or a value that is no class.
    """
    _check(truth, predicted, classes)
    sums = np.zeros((3, classes), np.int64)
    for true, found in zip(_slices(truth), _slices(predicted), strict=True):  # bincount takes 8 bytes a pixel
        known = true != VOID
        true, found = true[known], found[known]
        for row, labels in enumerate((true[true == found], true, found)):
            sums[row] += np.bincount(labels, minlength=classes)
    return sums


def dice(counts: Counts) -> Floats:
    """2 |A ∩ B| / (|A| + |B|) (Dice 1945) of counts (..., 3, C): (..., C) in [0, 1], nan where both are empty."""
    both, truth, predicted = np.moveaxis(counts, -2, 0)
    return _ratio(2 * both, truth + predicted)


def iou(counts: Counts) -> Floats:
    """|A ∩ B| / |A ∪ B| (Jaccard 1901) of counts (..., 3, C): (..., C) in [0, 1], nan where both are empty."""
    both, truth, predicted = np.moveaxis(counts, -2, 0)
    return _ratio(both, truth + predicted - both)


def judge(
    number: int,
    patient: bytes,
    truth: Array,
    predicted: Array,
    classes: int,
    spacing: Sequence[float] | float = 1.0,
) -> Unit:
    """All measures of one image or one whole volume.

    Args:
        number: store row of the image, or number of the scan.
        patient: its key.
        truth: as for ``counts``.
        predicted: as for ``counts``.
        classes: how many there are, with the background.
        spacing: mm along each axis of the array, in their order; 1 for distances in pixels.

    Raises:
        ValueError: as ``counts`` and ``surfaces.distances``.
    """
    pixels = counts(truth, predicted, classes)
    apart = np.full((2, classes), np.nan)
    known = truth != VOID
    for label in np.flatnonzero(pixels[1:].any(axis=0)):
        if label > 0:
            found = surfaces.distances(truth == label, (predicted == label) & known, spacing)
            apart[:, label] = found.hd95, found.asd
    return Unit(number, patient, dice(pixels), iou(pixels), *apart)


def measures(classes: Sequence[str]) -> dict[str, Measure]:
    """What ``protocol.summarise`` is to compare: ``dice``, ``iou``, ``hd95``, ``asd``, then ``dice:NAME`` and so on.

    Each takes overlaps and weights, (R, U) for (R,) values, (U,) or None for one float. A class's value is the
    weighted mean over the units in which it is defined, nan without any; the plain names are the mean of these over
    the foreground classes that have one, nan without any.

    Args:
        classes: names, the background first.
    """
    chosen = [*enumerate(classes)][1:]
    return {kind: partial(_mean, kind, None) for kind in KINDS} | {
        f"{kind}:{name}": partial(_mean, kind, label) for kind in KINDS for label, name in chosen
    }


def _mean(kind: str, label: int | None, overlaps: Overlaps, weights: Array | None = None) -> Any:
    """The measure ``kind`` of one class, or the mean over all in the foreground."""
    values: Floats = getattr(overlaps, kind)[:, 1:] if label is None else getattr(overlaps, kind)[:, [label]]
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(values):
        raise ValueError(f"weights of shape ({len(values)},) or (R, {len(values)}) are needed, not {weights.shape}")
    defined = ~np.isnan(values)
    known = np.where(defined, values, 0.0)
    columns = np.atleast_2d(weights).T
    above, below = np.zeros((2, values.shape[1], columns.shape[1]))
    height = max(1, _BLOCK_CELLS // max(1, columns.shape[1]))
    for first in range(0, len(values), height):
        block = columns[first : first + height].astype(np.float64)
        above += known[first : first + height].T @ block
        below += defined[first : first + height].T @ block
    each = _ratio(above, below)  # (C, R)
    mean = _ratio(np.where(below > 0, each, 0.0).sum(axis=0), (below > 0).sum(axis=0))
    return float(mean[0]) if weights.ndim == 1 else mean


def _ratio(above: Array, below: Array) -> Floats:
    """``above / below``, nan where ``below`` is zero."""
    return np.asarray(np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0))


def _slices(labels: Array) -> Iterator[Array]:
    yield from labels.reshape(-1, *labels.shape[-2:])


def _check(truth: Array, predicted: Array, classes: int) -> None:
    if truth.shape != predicted.shape or truth.ndim not in (2, 3):
        raise ValueError(f"two label maps (H, W) or (D, H, W) are needed, not {truth.shape} and {predicted.shape}")
    if truth.dtype != np.uint8 or predicted.dtype != np.uint8:
        raise ValueError(f"label maps must be uint8, not {truth.dtype} and {predicted.dtype}")
    if not 1 <= classes <= VOID:
        raise ValueError(f"classes is {classes}; allowed: from 1 to {VOID}")
    wrong = (truth >= classes) & (truth != VOID)
    if wrong.any() or predicted.max(initial=0) >= classes:
        raise ValueError(f"label maps must hold 0 to {classes - 1}, and {VOID} in the truth alone")


def _parse(table: Iterable[list[str]]) -> Overlaps:
    header, *lines = table
    unit = header[-1].removeprefix("asd:")
    if tuple(header) != (*_FIXED, f"hd95:{unit}", f"asd:{unit}"):
        raise ValueError(f"columns {', '.join(header)}")
    units = [_unit([*group]) for _, group in groupby(lines, key=lambda line: line[0])]
    classes = [line[2] for line in lines[: len(lines) // max(1, len(units))]]
    if [line[2] for line in lines] != classes * len(units):
        raise ValueError("not every unit has every class")
    return Overlaps.of(units, unit, classes)


def _unit(lines: Sequence[Sequence[str]]) -> Unit:
    number, patient = lines[0][:2]
    if any(line[1] != patient or len(line) != len(_FIXED) + 2 for line in lines):
        raise ValueError(f"unit {number}")
    return Unit(int(number), patient.encode(), *np.array([[_number(text) for text in line[3:]] for line in lines]).T)


def _number(text: str) -> float:
    value = float(text) if text else math.nan
    if text and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"'{text}' is no measure")
    return value
