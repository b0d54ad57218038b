"""Boxes of neighbouring slices, or frames, that show the same object."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sslmed.evaluation.detected_boxes import Found
from sslmed.models.boxes import iou

GAP = 1  # slices that may be missing between two boxes of an object
LEAST = 0.3  # IoU of a box with the one before it


@dataclass(frozen=True, eq=False)
class Object:
    """An object: boxes of one class, at most one a slice. Immutable: the arrays are made read-only.

    Attributes:
        label: class number.
        slices: (n,) int64, from 0, rising; n is at least 1.
        xyxy: (n, 4) float32, its box in each of them.
        scores: (n,) float64.
    """

    label: int
    slices: npt.NDArray[np.int64]
    xyxy: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        for array in (self.slices, self.xyxy, self.scores):
            array.setflags(write=False)

    @property
    def score(self) -> float:
        """The highest of its boxes'."""
        return float(self.scores.max())

    @property
    def hull(self) -> npt.NDArray[np.float32]:
        """(4,) the smallest box around all of its boxes."""
        return np.concatenate([self.xyxy[:, :2].min(axis=0), self.xyxy[:, 2:].max(axis=0)])


def link(found: Sequence[Found]) -> tuple[Object, ...]:
    """The objects of a volume or clip, by falling score; of an image each box is one.

    Class by class and slice by slice, boxes join the objects whose last box lies at most ``GAP`` slices further back
    than the slice before: the pair with the greatest IoU first, each object and each box once, as long as the IoU is at
    least ``LEAST``. A box that joins none begins an object.

    Args:
        found: of each slice in order.

    Raises:
        ValueError: a box has no area.
    """
    labels = sorted({int(label) for each in found for label in each.classes})
    every = [grown for label in labels for grown in _of_class(label, found)]
    return tuple(sorted(every, key=lambda each: -each.score))  # stable: equal ones stay by class and first slice


def _of_class(label: int, found: Sequence[Found]) -> list[Object]:
    chains: list[list[tuple[int, int]]] = []  # (slice, number of the box there) of each object
    for number, each in enumerate(found):
        boxes = np.flatnonzero(each.classes == label)
        near = [chain for chain in chains if number - chain[-1][0] <= GAP + 1]
        joined = _pairs(np.array([found[at].xyxy[box] for at, box in (chain[-1] for chain in near)]), each.xyxy[boxes])
        for at, box in enumerate(boxes.tolist()):
            if at in joined:
                near[joined[at]].append((number, box))
            else:
                chains.append([(number, box)])
    return [
        Object(
            label,
            np.array([at for at, _ in chain], np.int64),
            np.stack([found[at].xyxy[box] for at, box in chain]),
            np.array([found[at].scores[box] for at, box in chain], np.float64),
        )
        for chain in chains
    ]


def _pairs(last: npt.NDArray[np.float32], boxes: npt.NDArray[np.float32]) -> dict[int, int]:
    """Of each of (m, 4) ``boxes`` that joins one of (n, 4) ``last`` the number of that one."""
    if not len(last) or not len(boxes):
        return {}
    overlap = iou(*(torch.from_numpy(each.astype(np.float64)) for each in (last, boxes))).numpy()
    joined: dict[int, int] = {}
    for place in np.argsort(-overlap, axis=None, kind="stable").tolist():
        one, box = divmod(place, len(boxes))
        if overlap[one, box] < LEAST:
            break
        if box not in joined and one not in joined.values():
            joined[box] = one
    return joined
