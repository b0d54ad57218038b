"""Finding boxes in an image larger than what a network takes: in windows, of which each has a part to itself."""

import math
from collections.abc import Callable
from itertools import islice, pairwise, product

import torch
import torch.nn.functional as F

from sslmed.models.boxes import nms_of_many

SLACK = 1 / 8  # of a box's side that its middle may lie beyond a seam

Predict = Callable[[torch.Tensor], torch.Tensor]


def slide_boxes(
    image: torch.Tensor,
    window: tuple[int, int],
    predict: Predict,
    *,
    stride: int,
    suppress: float,
    batch: int = 4,
) -> torch.Tensor:
    """The boxes of a whole image, (n, 6), from those of windows that have about half of a side in common.

    A seam runs through the middle of what two neighbours share; a window answers for the boxes whose middles lie on its
    side of all seams, or beyond one by up to an eighth of their own side: else an object at a seam would be lost where
    each window sees it a little on the other's side. What two windows found of one object goes in a last suppression.
    An object is found whole where it is no larger than four fifths of what neighbours share. Windows begin at multiples
    of ``stride``: there a convolutional network says the same of an object in a window as in the whole image, out of
    reach of the borders.
    The image is continued by its last row and column where the last windows reach beyond it.

    Args:
        image: (C, H, W), at least as large as the window.
        window: (h, w), at least two strides each.
        predict: (N, C, h, w) windows to (N, D, 6): left, top, right, bottom in pixels of the window, score, class; -1
            is no box. It runs without gradients, and brings windows to where its network is.
        stride: of the coarsest map of the network, pixels.
        suppress: of two boxes of a class with a greater IoU the one of the lower score goes.
        batch: windows in one call.

    Returns:
        On the CPU, by falling score; left, top, right, bottom in pixels of the image, and within it.

    Raises:
        ValueError: windows of less than two strides.
    """
    if min(window) < 2 * stride:
        raise ValueError(f"windows of {window[0]} x {window[1]} pixels leave gaps; they need two strides of {stride}")
    height, width = image.shape[1:]
    tops, lefts = (_starts(length, side, stride) for length, side in zip((height, width), window, strict=True))
    below, right = tops[-1] + window[0] - height, lefts[-1] + window[1] - width
    padded = F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
    rows, columns = _seams(tops, window[0]), _seams(lefts, window[1])
    corners = iter(product(range(len(tops)), range(len(lefts))))
    parts: list[torch.Tensor] = []
    while taken := [*islice(corners, batch)]:
        views = [padded[:, tops[i] : tops[i] + window[0], lefts[j] : lefts[j] + window[1]] for i, j in taken]
        with torch.no_grad():
            answers = predict(torch.stack(views)).float().cpu()
        for (i, j), found in zip(taken, answers, strict=True):
            found = found[found[:, 5] >= 0]
            found[:, :4] += found.new_tensor([lefts[j], tops[i], lefts[j], tops[i]])
            middle, slack = (found[:, :2] + found[:, 2:4]) / 2, (found[:, 2:4] - found[:, :2]) * SLACK
            own = (middle >= middle.new_tensor([columns[j], rows[i]]) - slack).all(dim=1)
            own &= (middle < middle.new_tensor([columns[j + 1], rows[i + 1]]) + slack).all(dim=1)
            parts.append(found[own])
    found = torch.cat(parts)
    limits = found.new_tensor([width, height, width, height])
    found[:, :4] = found[:, :4].clamp_min(0).minimum(limits)
    found = found[(found[:, 2:4] > found[:, :2]).all(dim=1)]
    found = found[nms_of_many(found[:, :4], found[:, 4], found[:, 5].long(), suppress)]
    return found[found[:, 4].argsort(descending=True, stable=True)]


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along one axis: the last one may end beyond ``length``."""
    step = max(window // 2 // stride, 1) * stride
    return [step * number for number in range(math.ceil(max(length - window, 0) / step) + 1)]


def _seams(starts: list[int], window: int) -> list[float]:
    """Where each window's own part begins, and the last one's end.

    The outer ones are open: continued beyond the image, an object at its border may have its middle there.
    """
    between = [(start + before + window) / 2 for before, start in pairwise(starts)]
    return [-math.inf, *between, math.inf]
