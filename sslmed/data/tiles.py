"""Tiles: parts of an image at its own resolution, where the whole of it in one input would lose what is small."""

from typing import Any, overload

import numpy as np

from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.mask_values import VOID
from sslmed.data.intensity import Pixels

Mask = np.ndarray[Any, np.dtype[np.uint8]]
Along = Mask | Boxes | None  # what moves with an image
FOREGROUND_SHARE = 1 / 3  # of the tiles that are laid on foreground: nnU-Net's oversampling (arXiv 1904.08128)


@overload
def cut(
    pixels: Pixels, along: Boxes, window: tuple[int, int], rot90: float, stream: np.random.Generator
) -> tuple[Pixels, Boxes]: ...


@overload
def cut(
    pixels: Pixels, along: Mask | None, window: tuple[int, int], rot90: float, stream: np.random.Generator
) -> tuple[Pixels, Mask | None]: ...


def cut(
    pixels: Pixels, along: Along, window: tuple[int, int], rot90: float, stream: np.random.Generator
) -> tuple[Pixels, Along]:
    """A tile of an image and the same of its mask or boxes, at one place that ``stream`` draws, then turned.

    A tile lies anywhere. With a mask or boxes, a third of them is laid on the foreground, if there is any: first a
    class of those present is drawn, then one of its pixels or boxes, so that small and rare things are met too. The
    tile holds that pixel, or the one in the middle of that box.

    Args:
        pixels: (H, W) or (H, W, n).
        along: class numbers (H, W), 0 the background, 255 what counts for nothing; or boxes, of which those stay that
            the tile shows (`Boxes.within`).
        window: height and width of the tile.
        rot90: probability of a turn by 0, 90, 180 or 270 degrees, each alike. Where the image has no room for a quarter
            turn of a tile that is not square, the tile keeps what is up or turns it down.

    Raises:
        DataError: an image that is smaller than the tile.
    """
    height, width = pixels.shape[:2]
    if height < window[0] or width < window[1]:
        raise DataError(
            f"no tile of {window[0]} x {window[1]} pixels can be cut from an image of {height} x {width}; "
            "give a smaller data.size"
        )
    turns = int(stream.integers(4)) if stream.random() < rot90 else 0
    if turns % 2 and (height < window[1] or width < window[0]):
        turns -= 1
    extent = window[::-1] if turns % 2 else window
    top, left = _corner((height, width), along, extent, stream)
    place = slice(top, top + extent[0]), slice(left, left + extent[1])

    def turned(whole: Pixels) -> Pixels:
        return np.ascontiguousarray(np.rot90(whole[place], turns))

    if isinstance(along, Boxes):
        return turned(pixels), along.within(top, left, *extent).turned(extent, turns)
    return turned(pixels), None if along is None else turned(along)


def _corner(
    shape: tuple[int, int], along: Along, extent: tuple[int, int], stream: np.random.Generator
) -> tuple[int, int]:
    """Where a tile begins: at its top and its left; anywhere, or anywhere around a pixel of the foreground."""
    room = [(0, whole - side) for whole, side in zip(shape, extent, strict=True)]  # the first and the last place
    if along is not None and stream.random() < FOREGROUND_SHARE:
        found = _in_a_box(along, stream) if isinstance(along, Boxes) else _on_a_mask(along, stream)
        if found is not None:
            room = [
                (max(first, at - side + 1), min(last, at))
                for (first, last), at, side in zip(room, found, extent, strict=True)
            ]
    top, left = (int(stream.integers(first, last + 1)) for first, last in room)
    return top, left


def _on_a_mask(mask: Mask, stream: np.random.Generator) -> tuple[int, int] | None:
    """Row and column of a pixel of a class; None where there is background alone."""
    classes = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)[1:VOID]) + 1
    if not len(classes):
        return None
    pixels = np.flatnonzero(mask.ravel() == stream.choice(classes))
    row, column = divmod(int(stream.choice(pixels)), mask.shape[1])
    return row, column


def _in_a_box(boxes: Boxes, stream: np.random.Generator) -> tuple[int, int] | None:
    """Row and column of the pixel in the middle of a box of a class; None where there is no box."""
    if not len(boxes):
        return None
    chosen = stream.choice(np.flatnonzero(boxes.classes == stream.choice(np.unique(boxes.classes))))
    left, top, right, bottom = boxes.xyxy[chosen].tolist()
    return int((top + bottom) / 2), int((left + right) / 2)
