"""Masks made of rectangles, which hide whole parts of an image where single patches would leave their neighbours."""

import math

import numpy as np
import numpy.typing as npt

LEAST_ASPECT = 0.3  # height / width goes from it to its inverse
TRIES = 10  # to place one more rectangle


def blockwise_mask(stream: np.random.Generator, grid: tuple[int, int], count: int) -> npt.NDArray[np.bool_]:
    """Which of the patches of a grid (rows, columns) are hidden: (rows, columns), at most ``count`` of them.

    Rectangles are drawn and laid anywhere, over one another too, until ``count`` patches are hidden or no further
    rectangle fits. One has at least the patches of a third of the shorter side squared, where as many are left to hide
    (BEiT, arXiv 2106.08254, algorithm 1; iBOT's reference, loader.py).
    """
    rows, columns = grid
    least = (min(grid) // 3) ** 2
    hidden = np.zeros(grid, dtype=bool)
    left = count
    while left > 0:
        for _ in range(TRIES):
            area = stream.uniform(min(least, left), left)
            aspect = math.exp(stream.uniform(math.log(LEAST_ASPECT), -math.log(LEAST_ASPECT)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height <= rows and 0 < width <= columns):
                continue
            top, start = stream.integers(rows - height + 1), stream.integers(columns - width + 1)
            block = hidden[top : top + height, start : start + width]
            new = block.size - int(block.sum())
            if 0 < new <= left:
                block[:] = True
                left -= new
                break
        else:
            break
    return hidden
