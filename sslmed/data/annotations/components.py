"""Boxes around what a mask shows: one around each piece of a class that hangs together."""

import numpy as np
import numpy.typing as npt

from sslmed.data.annotations.boxes import KEPT_SIDE, Boxes
from sslmed.data.annotations.mask_values import VOID


def boxes_around(mask: npt.NDArray[np.uint8]) -> Boxes:
    """The boxes around the connected components of each class of a mask, ordered by class, then from the top.

    Pixels of one class hang together where they touch, at a corner too. Objects that touch each other become one box.
    Pieces narrower than 2 pixels, as a brush leaves them behind, get none.

    Args:
        mask: (H, W), class numbers, 0 the background, 255 what counts for nothing.

    Returns:
        Boxes whose classes are one less than the mask's: they have no background.
    """
    from scipy.ndimage import find_objects, label

    corners: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=VOID + 1)[1:VOID]) + 1
    for number in present.tolist():
        pieces, _ = label(mask == number, structure=np.ones((3, 3)))
        for down, across in find_objects(pieces):
            if min(down.stop - down.start, across.stop - across.start) < KEPT_SIDE:
                continue
            corners.append((across.start, down.start, across.stop, down.stop))
            classes.append(number - 1)
    return Boxes(np.array(corners, np.float32).reshape(-1, 4), np.array(classes, np.int16))
