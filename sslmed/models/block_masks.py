"""Blocks of patches to predict, and a context to predict them from, as in I-JEPA."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sslmed.config import UsageError
from sslmed.keyed_rng import rng

Grid = tuple[int, int]
Range = tuple[float, float]
Patches = np.ndarray[Any, np.dtype[np.int64]]
LEAST_SIDE = 4  # of a grid; in a smaller one blocks are single patches
LEAST_SHARE = 10 / 256  # of a grid that a block or context has at least: the reference's 10 of ViT-H/14's 16 x 16
DRAWS, SHORT = 128, 0.1  # from which the context's length is taken, and the share of them that may be shorter


@dataclass(frozen=True)
class BlockSizes:
    """Height and width of every target and of the context before targets are cut from it; patches that it keeps."""

    target: Grid
    context: Grid
    kept: int


@dataclass(frozen=True)
class BlockRule:
    """How blocks are drawn (I-JEPA, arXiv 2301.08243, section 3 and appendix A.1).

    All images of an epoch have blocks of one size, drawn by seed and epoch; where they lie is drawn image by image. So
    an image's blocks depend on nothing else: not on its batch, which may be cut in parts or spread over processes. The
    reference draws sizes anew for every batch, and cuts all contexts of a process's batch to the shortest of them.
    Here the context's length belongs to the sizes: nine of ten draws have as many patches free or more; an image with
    fewer is drawn anew, and one with more leaves some out at random, where the reference leaves out the last rows.

    Attributes:
        targets: blocks to predict; they may overlap.
        scale: least and greatest share of the patches that a target covers.
        aspect: its least and greatest height / width.
        context: least and greatest share that the context covers, of the grid's own shape, before targets are cut out.
    """

    targets: int
    scale: Range
    aspect: Range
    context: Range

    def sizes(self, grid: Grid, seed: int, epoch: int) -> BlockSizes:
        """The sizes of an epoch."""
        return _sizes(self, grid, seed, epoch)

    def draw(self, grid: Grid, seed: int, epoch: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the context's patches (N, K) and of the targets' (N, targets, T), int64, on the CPU."""
        sizes = self.sizes(grid, seed, epoch)
        drawn = [_placed(self, sizes, grid, rng(seed, epoch, sample, "blocks")) for sample in ids.tolist()]
        contexts, targets = zip(*drawn, strict=True)
        return torch.from_numpy(np.stack(contexts)), torch.from_numpy(np.stack(targets))

    def check(self, grid: Grid) -> None:
        """Refuse a grid in which blocks or what is left of the context would be too small.

        Raises:
            UsageError: with the number of patches that is too few.
        """
        remedy = "lower backbone.patch or raise data.size"
        if min(grid) < LEAST_SIDE:
            raise UsageError(
                f"blocks of patches need a grid of at least {LEAST_SIDE} x {LEAST_SIDE}, not {grid[0]} x {grid[1]}; "
                f"{remedy}"
            )
        least = max(1, round(LEAST_SHARE * grid[0] * grid[1]))
        for aspect in self.aspect:
            smallest = _block(grid, self.scale[0], aspect)
            if smallest[0] * smallest[1] < least:
                raise UsageError(f"targets of {smallest[0]} x {smallest[1]} patches have fewer than {least}; {remedy}")
            largest, context = _block(grid, self.scale[1], aspect), _context(grid, self.context[0])
            kept = _kept(self, largest, context, grid, 0)
            if kept < least:
                raise UsageError(
                    f"{self.targets} targets of {largest[0]} x {largest[1]} patches leave {kept} of a context of "
                    f"{context[0]} x {context[1]}, which needs {least}: lower target_scale or targets, or raise "
                    "context_scale"
                )


@functools.lru_cache(maxsize=16)
def _sizes(rule: BlockRule, grid: Grid, seed: int, epoch: int) -> BlockSizes:
    stream = rng(seed, epoch, 0, "block sizes")
    scale, aspect, context = (float(stream.uniform(*ends)) for ends in (rule.scale, rule.aspect, rule.context))
    target, around = _block(grid, scale, aspect), _context(grid, context)
    return BlockSizes(target, around, _kept(rule, target, around, grid, seed))


def _block(grid: Grid, scale: float, aspect: float) -> Grid:
    area = scale * grid[0] * grid[1]
    height, width = (area * aspect) ** 0.5, (area / aspect) ** 0.5
    return max(1, min(grid[0], round(height))), max(1, min(grid[1], round(width)))


def _context(grid: Grid, scale: float) -> Grid:
    return round(grid[0] * scale**0.5), round(grid[1] * scale**0.5)


def _kept(rule: BlockRule, target: Grid, context: Grid, grid: Grid, seed: int) -> int:
    """What the context of nine images of ten has free."""
    sizes = BlockSizes(target, context, 0)
    streams = (rng(seed, 0, number, "free patches") for number in range(DRAWS))
    counts = sorted(int(_thrown(rule, sizes, grid, stream)[0].sum()) for stream in streams)
    return counts[int(SHORT * DRAWS)]


def _placed(rule: BlockRule, sizes: BlockSizes, grid: Grid, stream: np.random.Generator) -> tuple[Patches, Patches]:
    while True:  # as a rule once, and as ``kept`` was thrown before, not for ever
        free, corners = _thrown(rule, sizes, grid, stream)
        found = np.flatnonzero(free)
        if len(found) >= sizes.kept:
            break
    within = np.add.outer(np.arange(sizes.target[0]) * grid[1], np.arange(sizes.target[1])).ravel()
    targets = (corners[:, 0] * grid[1] + corners[:, 1])[:, None] + within
    return np.sort(stream.choice(found, sizes.kept, replace=False)), targets


def _thrown(
    rule: BlockRule, sizes: BlockSizes, grid: Grid, stream: np.random.Generator
) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Patches]:
    """Blocks somewhere: where the context is free of targets (rows, columns), and the targets' corners (targets, 2)."""
    corners = stream.integers(np.subtract(grid, sizes.target) + 1, size=(rule.targets, 2))
    top, left = stream.integers(np.subtract(grid, sizes.context) + 1)
    free = np.zeros(grid, bool)
    free[top : top + sizes.context[0], left : left + sizes.context[1]] = True
    for row, column in corners:
        free[row : row + sizes.target[0], column : column + sizes.target[1]] = False
    return free, corners
