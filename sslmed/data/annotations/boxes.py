"""Boxes around what is in an image: COCO JSON and Pascal VOC XML, read as data and held against their images.

Corners are continuous, in pixels: the left edge of the first pixel is 0, the right edge of the last one the width.
COCO's x, y, width, height are that already; VOC's pixels count from 1 and both ends belong to the box, so that its
``xmin`` and ``xmax`` become ``xmin - 1`` and ``xmax``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.readers.refusal import RefusedError

OVERHANG = 1.0  # pixels that a box may reach out of its image: rounding, and conventions that differ by one


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of one image. Immutable: the arrays are made read-only.

    Attributes:
        xyxy: (n, 4) float32, left, top, right and bottom in pixels, 0 to the width or height; none of no area.
        classes: (n,) int16 class numbers.
    """

    xyxy: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.xyxy.shape != (len(self.classes), 4) or self.xyxy.dtype != np.float32:
            raise ValueError(f"xyxy is {self.xyxy.dtype} {self.xyxy.shape} for {len(self.classes)} classes")
        if self.classes.shape != (len(self.classes),) or self.classes.dtype != np.int16:
            raise ValueError(f"classes are {self.classes.dtype} {self.classes.shape}")
        self.xyxy.setflags(write=False)
        self.classes.setflags(write=False)

    def __len__(self) -> int:
        return len(self.classes)

    def flipped(self, size: tuple[int, int], down: bool, across: bool) -> "Boxes":
        """The same boxes once an image of height and width ``size`` is turned upside down, or left and right."""
        corners = self.xyxy.copy()
        if down:
            corners[:, [1, 3]] = size[0] - corners[:, [3, 1]]
        if across:
            corners[:, [0, 2]] = size[1] - corners[:, [2, 0]]
        return Boxes(corners, self.classes.copy())

    def scaled(self, source: tuple[int, int], target: tuple[int, int]) -> "Boxes":
        """The same boxes once an image of height and width ``source`` is resized to ``target``."""
        down, across = target[0] / source[0], target[1] / source[1]
        factors = np.array([across, down, across, down], np.float64)
        limits = np.array([target[1], target[0], target[1], target[0]], np.float32)
        corners = np.minimum((self.xyxy * factors).astype(np.float32), limits)
        return Boxes(corners, self.classes.copy())


@dataclass(frozen=True)
class Drawing:
    """What a file says of one image, before anyone has seen the image.

    Attributes:
        origin: where it is said, for messages.
        names: what the image is called, the most trusted first.
        size: its height and width, where the file says them.
        corners: left, top, right, bottom of each object, as told above.
        classes: the class name of each object.
        fault: why it cannot be used, "" when it can.
    """

    origin: str
    names: tuple[str, ...]
    size: tuple[int, int] | None
    corners: tuple[tuple[float, float, float, float], ...] = ()
    classes: tuple[str, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Drawings:
    """All that a COCO file or a folder of VOC files says.

    Attributes:
        images: a drawing for each image.
        classes: class names, sorted; of COCO all that it declares.
        crowds: objects left out because they stand for a crowd (COCO's ``iscrowd``).
        strays: objects of images that the file does not list.
    """

    images: tuple[Drawing, ...]
    classes: tuple[str, ...]
    crowds: int = 0
    strays: int = 0


def fit(drawing: Drawing, size: tuple[int, int], numbers: Mapping[str, int]) -> tuple[Boxes, int]:
    """The boxes of a drawing, once they are known to be those of an image of ``size`` (height, width) as it was read.

    Returns:
        The boxes, and how many of them were clipped: they reached at most `OVERHANG` pixels out of the image.

    Raises:
        RefusedError: the drawing has a fault or is of another size, or a box is reversed, empty or outside.
    """
    if drawing.fault:
        raise RefusedError(drawing.fault)
    height, width = size
    if drawing.size is not None and drawing.size != size:
        turned = "; it was drawn on the picture as it lay before its EXIF turn" * (drawing.size == (width, height))
        raise RefusedError(
            f"is of an image of {drawing.size[0]} x {drawing.size[1]} pixels (height x width), but the image has "
            f"{height} x {width}{turned * (height != width)}"
        )
    clipped = 0
    corners = np.empty((len(drawing.corners), 4), np.float32)
    for number, box in enumerate(drawing.corners):
        _check(box, height, width)
        inside = [min(max(edge, 0.0), limit) for edge, limit in zip(box, (width, height, width, height), strict=True)]
        clipped += tuple(inside) != box
        corners[number] = inside
        left, top, right, bottom = corners[number]  # as float32, which may make an area vanish
        if not (left < right and top < bottom):
            raise RefusedError(f"has a box without area inside the image: {_words(box)}")
    return Boxes(corners, np.array([numbers[name] for name in drawing.classes], np.int16)), clipped


def _check(box: Sequence[float], height: int, width: int) -> None:
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        raise RefusedError(f"has a box that is not finite: {_words(box)}")
    if right < left or bottom < top:
        raise RefusedError(f"has a box with reversed corners: {_words(box)}")
    if right == left or bottom == top:
        raise RefusedError(f"has a box without area: {_words(box)}")
    if min(left, top) < -OVERHANG or right > width + OVERHANG or bottom > height + OVERHANG:
        raise RefusedError(f"has a box that leads out of the image of {height} x {width} pixels: {_words(box)}")


def _words(box: Sequence[Any]) -> str:
    return "left {:g}, top {:g}, right {:g}, bottom {:g}".format(*box)
