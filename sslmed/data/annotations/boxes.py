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
KEPT_SHARE = 0.25  # of its area that a box must have inside a window to stay
KEPT_SIDE = 2.0  # pixels of what the network sees that a box in a window must have along either side to stay

Corners = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of one image. Immutable: the arrays are made read-only.

    Attributes:
        xyxy: (n, 4) float32, left, top, right and bottom in pixels, 0 to the width or height; none of no area.
        classes: (n,) int16 class numbers.

    Raises:
        ValueError: another shape or dtype, or a box that is not finite, reversed or of no area.
    """

    xyxy: Corners
    classes: npt.NDArray[np.int16]

    def __post_init__(self) -> None:
        if self.xyxy.shape != (len(self.classes), 4) or self.xyxy.dtype != np.float32:
            raise ValueError(f"xyxy is {self.xyxy.dtype} {self.xyxy.shape} for {len(self.classes)} classes")
        if self.classes.shape != (len(self.classes),) or self.classes.dtype != np.int16:
            raise ValueError(f"classes are {self.classes.dtype} {self.classes.shape}")
        if not np.isfinite(self.xyxy).all():
            raise ValueError("a box is not finite")
        if not (self.xyxy[:, :2] < self.xyxy[:, 2:]).all():
            raise ValueError("a box has reversed corners or no area")
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
        return Boxes(_apart(corners), self.classes.copy())

    def turned(self, size: tuple[int, int], turns: int) -> "Boxes":
        """The same boxes once an image of height and width ``size`` is turned by quarters counter-clockwise."""
        boxes = self.flipped(size, down=turns % 4 in (2, 3), across=turns % 4 in (1, 2))
        return Boxes(boxes.xyxy[:, [1, 0, 3, 2]], boxes.classes) if turns % 2 else boxes

    def scaled(self, source: tuple[int, int], target: tuple[int, int]) -> "Boxes":
        """The same boxes once an image of height and width ``source`` is resized to ``target``."""
        down, across = target[0] / source[0], target[1] / source[1]
        factors = np.array([across, down, across, down], np.float64)
        limits = np.array([target[1], target[0], target[1], target[0]], np.float32)
        corners = np.minimum((self.xyxy * factors).astype(np.float32), limits)
        return Boxes(_apart(corners), self.classes.copy())

    def within(
        self, top: float, left: float, height: float, width: float, size: tuple[int, int] | None = None
    ) -> "Boxes":
        """What a window shows of the boxes, in its own pixels, once it is resized to height and width ``size``.

        Each box is shifted, scaled and clipped to the window. It stays where at least `KEPT_SHARE` of its area is
        inside and either side of what is left has at least `KEPT_SIDE` pixels: a sliver at the edge shows too little
        of an object to tell what it is and where it ends.

        Args:
            top, left, height, width: of the window, pixels of the image that the boxes are of.
            size: of what the network sees; by default that of the window.
        """
        shown = (height, width) if size is None else size
        scale = np.tile([shown[1] / width, shown[0] / height], 2)
        moved = (self.xyxy - np.tile([left, top], 2).astype(np.float64)) * scale
        clipped = np.clip(moved, 0, np.tile([shown[1], shown[0]], 2))
        whole, seen = (each[:, 2:] - each[:, :2] for each in (moved, clipped))
        stay = (seen.prod(axis=1) >= KEPT_SHARE * whole.prod(axis=1)) & (seen >= KEPT_SIDE).all(axis=1)
        return Boxes(clipped[stay].astype(np.float32), self.classes[stay])


def _apart(corners: Corners) -> Corners:
    """The corners, each box as thin as float32 can hold where rounding has left it no area."""
    corners[:, 2:] = np.maximum(corners[:, 2:], np.finfo(np.float32).tiny)
    corners[:, :2] = np.minimum(corners[:, :2], np.nextafter(corners[:, 2:], np.float32(-np.inf)))
    return corners


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
