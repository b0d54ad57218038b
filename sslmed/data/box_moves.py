"""Boxes on the way from an image to a view: what each step of the geometry does to them, from what it has drawn.

The pipeline is asked afterwards what it did, so that boxes draw nothing and a view is the same with them and without.
albumentations 2.0.8 would move boxes too, but where the border is reflected it makes boxes of the reflections as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sslmed.data.annotations.boxes import Boxes

Params = Mapping[str, Any]


def follow(boxes: Boxes, steps: Sequence[Any]) -> Boxes:
    """The boxes after the steps of an albumentations pipeline that has just run, in pixels of its output.

    After a crop and after a rotation those go of which too little is seen (`Boxes.within`).

    Args:
        boxes: of the image that went into the pipeline.
        steps: its transforms, those that `sslmed.data.views` is made of.
    """
    for step in steps:
        if drawn := step.get_applied_params():  # empty where the step was left out
            boxes = _MOVES[type(step).__name__](boxes, step, drawn)
    return boxes


def rotated(boxes: Boxes, size: tuple[int, int], matrix: np.ndarray[Any, np.dtype[np.float64]]) -> Boxes:
    """The boxes of an image of ``size`` once it is rotated about its middle into a frame of the same size.

    Each becomes the box around the rotated ellipse that it has inside. Cells, nodules and lesions are round rather than
    rectangular, and the box around the rotated rectangle is too large: of a square at 45 degrees by 41 % a side, where
    that of the ellipse is exact for a disc. Of shapes that are not known, too, it has a higher expected IoU (Kalra et
    al., arXiv 2109.13488). An ellipse with the half axes a and b has, under the matrix M, the half width
    sqrt((M00 a)^2 + (M01 b)^2), and the half height with the second row. What the border reflects gets no box.

    Args:
        matrix: (2, 3) or (3, 3), of (x, y, 1), in continuous coordinates.
    """
    turn, shift = matrix[:2, :2], matrix[:2, 2]
    begin, end = boxes.xyxy[:, :2].astype(np.float64), boxes.xyxy[:, 2:].astype(np.float64)
    middle = (begin + end) / 2 @ turn.T + shift
    half = np.sqrt(((end - begin) / 2) ** 2 @ (turn**2).T)
    corners = np.concatenate([middle - half, middle + half], axis=1).astype(np.float32)
    return Boxes(corners, boxes.classes).within(0, 0, *size)


def _crop(boxes: Boxes, step: Any, drawn: Params) -> Boxes:
    left, top, right, bottom = drawn["crop_coords"]
    return boxes.within(top, left, bottom - top, right - left, step.size)


# By the names of the transforms, which are imported by `sslmed.data.views` alone.
_MOVES: dict[str, Callable[[Boxes, Any, Params], Boxes]] = {
    "Crop": _crop,
    "Rotate": lambda boxes, _, drawn: rotated(boxes, drawn["shape"][:2], drawn["bbox_matrix"]),
    "HorizontalFlip": lambda boxes, _, drawn: boxes.flipped(drawn["shape"][:2], down=False, across=True),
    "VerticalFlip": lambda boxes, _, drawn: boxes.flipped(drawn["shape"][:2], down=True, across=False),
    "RandomRotate90": lambda boxes, _, drawn: boxes.turned(drawn["shape"][:2], drawn["factor"]),
}
