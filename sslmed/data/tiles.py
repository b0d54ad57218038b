"""Tiles: parts of an image at its own resolution, where the whole of it in one input would lose what is small."""

from typing import Any

import numpy as np

from sslmed.config import DataError
from sslmed.data.annotations.mask_values import VOID
from sslmed.data.intensity import Pixels

Mask = np.ndarray[Any, np.dtype[np.uint8]]
FOREGROUND_SHARE = 1 / 3  # of the tiles that are laid on foreground: nnU-Net's oversampling (arXiv 1904.08128)


def cut(
    pixels: Pixels, mask: Mask | None, window: tuple[int, int], rot90: float, stream: np.random.Generator
) -> tuple[Pixels, Mask | None]:
    """A tile of an image and the same of its mask, at one place that ``stream`` draws, then turned.

    A tile lies anywhere. With a mask, a third of them is laid so that it holds a pixel of the foreground, if there is
    any: first a class of those present is drawn, then one of its pixels, so that small and rare things are met too.

    Args:
        pixels: (H, W) or (H, W, n).
        mask: class numbers (H, W), 0 the background, 255 what counts for nothing.
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
    top, left = _corner((height, width), mask, extent, stream)
    place = slice(top, top + extent[0]), slice(left, left + extent[1])

    def turned(whole: Pixels) -> Pixels:
        return np.ascontiguousarray(np.rot90(whole[place], turns))

    return turned(pixels), None if mask is None else turned(mask)


def _corner(
    shape: tuple[int, int], mask: Mask | None, extent: tuple[int, int], stream: np.random.Generator
) -> tuple[int, int]:
    """Where a tile begins: at its top and its left; anywhere, or anywhere around a pixel of the foreground."""
    room = [(0, whole - side) for whole, side in zip(shape, extent, strict=True)]  # the first and the last place
    if mask is not None and stream.random() < FOREGROUND_SHARE:
        classes = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)[1:VOID]) + 1
        if len(classes):
            pixels = np.flatnonzero(mask.ravel() == stream.choice(classes))
            found = divmod(int(stream.choice(pixels)), shape[1])
            room = [
                (max(first, at - side + 1), min(last, at))
                for (first, last), at, side in zip(room, found, extent, strict=True)
            ]
    top, left = (int(stream.integers(first, last + 1)) for first, last in room)
    return top, left
