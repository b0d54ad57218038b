"""What detectors say of test images beside what is true of them: held, written, read, and weighed in one way.

The measures are in ``detections`` and ``froc``. They share `mean_over_classes`: all bootstrap replicates at once, as
columns of weights.
"""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.durable import write_atomically

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Made = TypeVar("Made")

NAME = "test_boxes.csv"
COLUMNS = ("row", "patient", "what", "class", "left", "top", "right", "bottom", "score")
_LARGEST = float(np.finfo(np.float32).max)

# Weights are spread over detections in blocks of at most this many cells (32 MB), whatever their number and R.
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True, eq=False)
class Found:
    """What a detector says of one image. Immutable: the arrays are made read-only.

    Attributes:
        xyxy: (n, 4) float32, left, top, right and bottom in pixels of the image, finite.
        scores: (n,) float64 in [0, 1], descending.
        classes: (n,) int16 class numbers.
    """

    xyxy: npt.NDArray[np.float32]
    scores: Floats
    classes: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.xyxy.shape != (len(self.classes), 4) or self.xyxy.dtype != np.float32:
            raise ValueError(f"xyxy is {self.xyxy.dtype} {self.xyxy.shape} for {len(self.classes)} classes")
        if self.scores.shape != (len(self.classes),) or self.scores.dtype != np.float64:
            raise ValueError(f"scores are {self.scores.dtype} {self.scores.shape} for {len(self.classes)} classes")
        if self.classes.shape != (len(self.classes),) or self.classes.dtype != np.int16:
            raise ValueError(f"classes are {self.classes.dtype} {self.classes.shape}")
        if not np.isfinite(self.xyxy).all():
            raise ValueError("xyxy must be finite")
        # Asked of what must hold, so that nan fails.
        if not ((self.scores >= 0) & (self.scores <= 1)).all() or not (self.scores[:-1] >= self.scores[1:]).all():
            raise ValueError("scores must lie in [0, 1] and descend")
        for array in (self.xyxy, self.scores, self.classes):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.classes)

    def where(self, kept: npt.NDArray[np.bool_]) -> "Found":
        """Those of (n,) ``kept``."""
        return Found(self.xyxy[kept], self.scores[kept], self.classes[kept])


@dataclass(frozen=True, eq=False)
class Detected:
    """Of U test images, and of C classes whose numbers the boxes hold.

    Attributes:
        row: (U,) store rows, each once.
        patient: (U,) keys, S32.
        truth: (U,) what is drawn in each image; none is a negative image.
        found: (U,) what the detector says of each.
        classes: (C,) names, each once.
    """

    row: npt.NDArray[np.int64]
    patient: npt.NDArray[np.bytes_]
    truth: tuple[Boxes, ...]
    found: tuple[Found, ...]
    classes: tuple[str, ...]
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.row)
        if self.row.shape != (count,) or {self.patient.shape, (len(self.truth),), (len(self.found),)} != {(count,)}:
            raise ValueError(f"one patient, truth and found are needed for each of {count} rows")
        if len(np.unique(self.row)) < count or len(set(self.classes)) < len(self.classes):
            raise ValueError("each row and each class name may be there once")
        for numbers in (boxes.classes for side in (self.truth, self.found) for boxes in side):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self.classes):
                raise ValueError(f"class numbers must lie from 0 to {len(self.classes) - 1}")

    @property
    def truths(self) -> Floats:
        """(U, C): how many boxes of each class are true."""
        return self.once(_truths)

    def once(self, make: Callable[..., Made], *arguments: Any) -> Made:
        """``make(self, *arguments)``, computed at the first call: what boxes match depends on no weights."""
        key = (make, *arguments)
        if key not in self._made:
            self._made[key] = make(self, *arguments)
        made: Made = self._made[key]
        return made

    def same_test(self, other: "Detected") -> bool:
        """Whether both are of the same images in one order, with the same true boxes of the same classes."""
        equal = all(np.array_equal(getattr(self, name), getattr(other, name)) for name in ("row", "patient"))
        return (
            equal
            and self.classes == other.classes
            and all(
                np.array_equal(one.xyxy, another.xyxy) and np.array_equal(one.classes, another.classes)
                for one, another in zip(self.truth, other.truth, strict=True)
            )
        )

    def write(self, run: Path) -> None:
        """Keep them in the run folder: a line for each class name, then one for each box, the true ones first.

        ``what`` is ``class``, ``truth`` or ``found``; it is blank in the one line of an image that has no box. True
        boxes have no score. Every number is read back as it was.
        """
        with write_atomically(run / NAME) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(["", "", "class", name, "", "", "", "", ""] for name in self.classes)
            for row, patient, truth, found in zip(self.row, self.patient, self.truth, self.found, strict=True):
                lines = [["truth", *self._corners(truth, at), ""] for at in range(len(truth))]
                lines += [
                    ["found", *self._corners(found, at), repr(float(found.scores[at]))] for at in range(len(found))
                ]
                for line in lines or [[""] * 7]:
                    writer.writerow([row, patient.decode(), *line])

    def _corners(self, boxes: Boxes | Found, at: int) -> list[str]:
        return [self.classes[boxes.classes[at]], *(f"{edge:.9g}" for edge in boxes.xyxy[at])]


def read(run: Path) -> Detected:
    """The test images' true and found boxes of a fine-tuning run.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    try:
        with (run / NAME).open(newline="", encoding="utf-8") as file:
            return _parse(csv.reader(file))
    except OSError as error:
        raise DataError(f"{run} holds no {NAME}; is it a finished fine-tuning run on boxes?") from error
    except (ValueError, IndexError, OverflowError, csv.Error) as error:
        raise DataError(f"{run / NAME} is damaged ({error}); fine-tune again") from error


def mean_over_classes(
    detected: Detected,
    chosen: Sequence[int],
    weights: Array | None,
    value: Callable[[int, Floats], Floats],
) -> Floats:
    """The mean of ``value`` over those of the ``chosen`` classes whose true boxes have weight; nan without any.

    Args:
        weights: (R, U), how often each image counts; (U,) or None for R = 1.
        value: takes a class number and (U, r) weights, gives (..., r); what it says of a class without truth is left.

    Returns:
        (..., R).

    Raises:
        ValueError: weights of another shape, negative or not finite.
    """
    weights = np.ones(len(detected.row)) if weights is None else np.asarray(weights)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(detected.row):
        raise ValueError(
            f"weights of shape ({len(detected.row)},) or (R, {len(detected.row)}) are needed, not {weights.shape}"
        )
    if not np.isfinite(weights).all() or weights.min(initial=0) < 0:
        raise ValueError("weights must be finite and non-negative")
    height = max(1, len(detected.row), sum(map(len, detected.found)))
    return np.concatenate(
        [_mean(detected, chosen, block, value) for block in _blocks(np.atleast_2d(weights).T, height)], axis=-1
    )


def ratio(above: Array, below: Array) -> Floats:
    """``above / below``, 0 where ``below`` is zero."""
    shape = np.broadcast_shapes(above.shape, below.shape)
    return np.asarray(np.divide(above, below, out=np.zeros(shape), where=below > 0))


def _mean(detected: Detected, chosen: Sequence[int], weights: Floats, value: Callable[[int, Floats], Floats]) -> Floats:
    total, count = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for label in chosen:
        defined = detected.truths[:, label] @ weights > 0
        total = total + np.where(defined, value(label, weights), 0.0)
        count += defined
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _blocks(columns: Array, height: int) -> Iterator[Floats]:
    width = max(1, _BLOCK_CELLS // height)
    for start in range(0, max(1, columns.shape[1]), width):
        yield np.ascontiguousarray(columns[:, start : start + width], dtype=np.float64)


def _truths(detected: Detected) -> Floats:
    counts = [np.bincount(boxes.classes, minlength=len(detected.classes)) for boxes in detected.truth]
    return np.array(counts, np.float64).reshape(len(counts), len(detected.classes))


def _parse(table: Iterable[list[str]]) -> Detected:
    header, *lines = table
    if tuple(header) != COLUMNS:
        raise ValueError(f"columns {', '.join(header)}")
    classes = [line[3] for line in lines if line[2] == "class"]
    if lines[: len(classes)] != [["", "", "class", name, "", "", "", "", ""] for name in classes]:
        raise ValueError("its class names do not come first")
    lines = lines[len(classes) :]
    numbers = {name: number for number, name in enumerate(classes)}
    images = [[*group] for _, group in groupby(lines, key=lambda line: line[0])]
    return Detected(
        row=np.array([int(image[0][0]) for image in images], np.int64),
        patient=np.array([_patient(image) for image in images], "S32"),
        truth=tuple(Boxes(*_columns(image, "truth", numbers)[::2]) for image in images),
        found=tuple(Found(*_columns(image, "found", numbers)) for image in images),
        classes=tuple(classes),
    )


def _patient(image: Sequence[Sequence[str]]) -> bytes:
    """The patient of the lines of one image, once these have their form."""
    number, patient = image[0][:2]
    for line in image:
        what, *cells = line[2:]
        shape = {"truth": [True] * 5 + [False], "found": [True] * 6, "": [False] * 6}.get(what)
        # A class name may be blank, numbers may not.
        if line[1] != patient or shape is None or [cell != "" for cell in cells[1:]] != shape[1:]:
            raise ValueError(f"image {number}")
        if not what and len(image) > 1:
            raise ValueError(f"image {number} has boxes and has none")
    return patient.encode()


def _columns(image: Sequence[Sequence[str]], what: str, numbers: dict[str, int]) -> tuple[Any, Floats, Any]:
    """Corners, scores and class numbers of the lines that are ``what``."""
    own = [line for line in image if line[2] == what]
    unknown = next((line[3] for line in own if line[3] not in numbers), None)
    if unknown is not None:
        raise ValueError(f"class {unknown}")
    corners = np.array([[_finite(text) for text in line[4:8]] for line in own], np.float32).reshape(len(own), 4)
    scores = np.array([_finite(line[8]) if line[8] else 0.0 for line in own], np.float64)
    return corners, scores, np.array([numbers[line[3]] for line in own], np.int16)


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= _LARGEST:
        raise ValueError(f"'{text}' is no number of a box")
    return value
