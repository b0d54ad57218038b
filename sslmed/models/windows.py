"""Predicting an image larger than what a network takes: overlapping windows, blended where they meet.

A window counts most in its middle, with a Gaussian of an eighth of its side (nnU-Net, arXiv 1904.08128).
Windows lie on a grid and the Gaussian is a product of two, one an axis. So the weights of all windows over a pixel can
be made to sum to 1 beforehand, along each axis alone, and only scores are added up, no weights.

Rows are finished from the top as soon as no later window touches them. What is held is a band as high as one window.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]
Predict = Callable[[torch.Tensor], torch.Tensor]

MOST_CLASSES = 255  # in a label map of bytes, whose 255 is no class
_SIGMA = 1 / 8  # of the side of a window


def places(length: int, window: int, overlap: float) -> list[int]:
    """Where windows start along one axis: as few as will do, evenly spread to a pixel.

    The first is at 0, the last at ``length - window``.

    Args:
        length: of the image.
        window: from 1 to ``length``.
        overlap: the share of a window that neighbours have in common at least, from 0 to below 1. At most they have
            all but one pixel in common, also where the share asks for more.

    Raises:
        ValueError: the image is smaller than the window, or another number is out of its range.
    """
    if not 1 <= window <= length:
        raise ValueError(f"a window of {window} pixels does not fit into {length}; pad the image or take less")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}; allowed: from 0 to below 1")
    # The tiny term forgives shares such as 0.55, whose product falls just above a whole number.
    step = max(1, window - math.ceil(overlap * window - 1e-9))
    gaps = math.ceil((length - window) / step)
    return [place * (length - window) // gaps for place in range(gaps + 1)] if gaps else [0]


def blend(starts: Sequence[int], window: int, margin: int = 0) -> Floats:
    """How much each window of one axis counts at each of its pixels, (n, window); over a pixel they sum to 1.

    A weight is 0 in the ``margin`` pixels at a side where a neighbour follows, above 0 everywhere else. At the image's
    two ends nothing is cut off: no other window has those pixels.

    Args:
        starts: (n,) ascending, neighbours with at least ``2 * margin`` pixels in common.
        margin: pixels, at least 0.

    Raises:
        ValueError: the margins leave a pixel to no window.
    """
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.tile(np.exp(-0.5 * (offsets / (_SIGMA * window)) ** 2), (len(starts), 1))
    weights[1:, :margin] = 0
    weights[:-1, window - margin :] = 0
    total = np.zeros(starts[-1] + window)
    for start, own in zip(starts, weights, strict=True):
        total[start : start + window] += own
    if margin < 0 or not total.all():
        raise ValueError(f"a margin of {margin} pixels leaves gaps between windows of {window} at {list(starts)}")
    return weights / np.stack([total[start : start + window] for start in starts])


def slide(
    image: torch.Tensor,
    window: tuple[int, int],
    predict: Predict,
    *,
    overlap: float = 0.5,
    batch: int = 4,
    margin: int = 0,
) -> Scores:
    """The scores of a whole image, (K, H, W), as averages of those of windows.

    Memory beside the image and ``batch`` windows with their scores: 4·K·H·W bytes for the result, at most
    4·(K + 1)·h·W for the band, and a few numbers for each row and column.

    Args:
        image: (C, H, W), on any device.
        window: (h, w), no larger than the image.
        predict: (N, C, h, w) windows to (N, K, h, w) scores, such as probabilities; N is at most ``batch``. It runs
            without gradients, and brings windows to where its network is.
        overlap: as in ``places``. Neighbours share at least ``2 * margin`` pixels, whatever it says.
        batch: windows in one call, at least 1.
        margin: pixels that a window is not believed at a side where it has a neighbour. From the receptive radius of a
            convolutional network of stride 1 on, the result is that of one pass over the whole image.

    Raises:
        ValueError: the image is smaller than the window, the margins leave nothing of it, a number is out of its
            range, or ``predict`` gives another shape.
    """
    whole: Scores | None = None
    for top, rows in _finished(image, window, predict, overlap, batch, margin):
        if whole is None:
            whole = np.empty((len(rows), *image.shape[1:]), np.float32)
        whole[:, top : top + rows.shape[1]] = rows
    assert whole is not None  # noqa: S101  # there is at least one window
    return whole


def slide_labels(
    image: torch.Tensor,
    window: tuple[int, int],
    predict: Predict,
    *,
    overlap: float = 0.5,
    batch: int = 4,
    margin: int = 0,
) -> npt.NDArray[np.uint8]:
    """The class of the highest score at each pixel, (H, W): of equal ones the first, as ``slide(...).argmax(0)``.

    Memory beside the image and ``batch`` windows with their scores: H·W bytes for the result, at most 4·(K + 1)·h·W for
    the band, and a few numbers for each row and column; never the scores of the whole image.

    Args:
        image: as for ``slide``, like all others.
        window: (h, w).
        predict: (N, C, h, w) to (N, K, h, w), with K from 2 to 255.
        overlap: as in ``places``.
        batch: windows in one call.
        margin: pixels that a window is not believed.

    Raises:
        ValueError: as ``slide``, or K is out of its range.
    """
    labels = np.empty(tuple(image.shape[1:]), np.uint8)
    for top, rows in _finished(image, window, predict, overlap, batch, margin):
        if not 2 <= len(rows) <= MOST_CLASSES:
            raise ValueError(f"labels need scores of 2 to {MOST_CLASSES} classes, not {len(rows)}")
        for row in range(rows.shape[1]):  # one at a time, for argmax gives 8 bytes a pixel
            labels[top + row] = rows[:, row].argmax(axis=0)
    return labels


def _finished(
    image: torch.Tensor, window: tuple[int, int], predict: Predict, overlap: float, batch: int, margin: int
) -> Iterator[tuple[int, Scores]]:
    """Rows from the top, when they are done: the number of the first and (K, rows, W), to be used at once."""
    height, width = _checked(image, window, batch, margin)
    tops, lefts = (
        places(length, side, max(overlap, 2 * margin / side))
        for length, side in zip((height, width), window, strict=True)
    )
    down, across = (
        blend(starts, side, margin).astype(np.float32) for starts, side in zip((tops, lefts), window, strict=True)
    )
    grid = product(range(len(tops)), range(len(lefts)))
    weighted = np.empty(window, np.float32)
    band: Scores | None = None
    for (i, j), scores in zip(grid, _scores(image, window, product(tops, lefts), predict, batch), strict=True):
        if band is None:
            band = np.zeros((len(scores), window[0], width), np.float32)
        for kind, own in zip(band, scores, strict=True):  # class by class, for the product is a copy
            np.multiply(own, down[i, :, None], out=weighted)
            weighted *= across[j]
            kind[:, lefts[j] : lefts[j] + window[1]] += weighted
        if j == len(lefts) - 1:
            done = [*tops, height][i + 1] - tops[i]
            yield tops[i], band[:, :done]
            _move_up(band, done)


def _scores(
    image: torch.Tensor, window: tuple[int, int], corners: Iterator[tuple[int, int]], predict: Predict, batch: int
) -> Iterator[Scores]:
    """What ``predict`` says of each window, (K, h, w), in the order of ``corners``."""
    height, width = window
    while taken := [*islice(corners, batch)]:
        windows = torch.stack([image[:, top : top + height, left : left + width] for top, left in taken])
        with torch.no_grad():
            scores = predict(windows)
        if scores.ndim != 4 or scores.shape[1] < 1 or (len(scores), *scores.shape[2:]) != (len(taken), *window):
            raise ValueError(f"scores of shape ({len(taken)}, K, {height}, {width}) are needed, not {scores.shape}")
        yield from scores.detach().float().cpu().numpy()


def _move_up(band: Scores, rows: int) -> None:
    """Drop the first rows, and begin as many at the end with 0; row by row, so that nothing is copied aside."""
    kept = band.shape[1] - rows
    for row in range(kept):
        band[:, row] = band[:, row + rows]
    band[:, kept:] = 0


def _checked(image: torch.Tensor, window: tuple[int, int], batch: int, margin: int) -> tuple[int, int]:
    """Height and width of the image."""
    if image.ndim != 3:
        raise ValueError(f"an image (C, H, W) is needed, not {tuple(image.shape)}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; allowed: 1 and more")
    if not 0 <= 2 * margin < min(window):
        raise ValueError(f"a margin of {margin} pixels leaves nothing of a window of {window[0]} x {window[1]}")
    return image.shape[1], image.shape[2]
