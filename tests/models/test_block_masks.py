"""Blocks and contexts: whole rectangles, never overlapping each other, as many patches in every image of an epoch."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.config import UsageError
from sslmed.models.block_masks import BlockRule

PAPER = BlockRule(4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0))
GRID = (14, 14)


def rectangle(ids: torch.Tensor, columns: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of the patches, which must be all of it in order."""
    rows, places = (ids // columns).tolist(), (ids % columns).tolist()
    top, left, height, width = min(rows), min(places), max(rows) - min(rows) + 1, max(places) - min(places) + 1
    whole = [(top + y) * columns + left + x for y in range(height) for x in range(width)]
    assert ids.tolist() == whole
    return top, left, height, width


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 20), st.integers(4, 20), st.integers(0, 99), st.integers(0, 99))
def test_targets_are_rectangles_of_the_epochs_size_and_the_context_lies_beside_them(
    rows: int, columns: int, seed: int, epoch: int
) -> None:
    grid = (rows, columns)
    sizes = PAPER.sizes(grid, seed, epoch)
    context, targets = PAPER.draw(grid, seed, epoch, torch.arange(6))
    assert context.shape == (6, sizes.kept)
    assert targets.shape == (6, 4, sizes.target[0] * sizes.target[1])
    for image in range(6):
        for block in targets[image]:
            top, left, *size = rectangle(block, columns)
            assert tuple(size) == sizes.target
            assert top + size[0] <= rows
            assert left + size[1] <= columns
        assert not set(context[image].tolist()) & set(targets[image].flatten().tolist())
        assert (context[image].diff() > 0).all(), "in order, no patch twice"
        assert context[image].max() < rows * columns
        inside = [(context[image] // columns), (context[image] % columns)]
        assert all(int(axis.max() - axis.min()) < side for axis, side in zip(inside, sizes.context, strict=True))


def test_sizes_follow_scale_and_aspect() -> None:
    found = [PAPER.sizes((48, 48), 0, epoch) for epoch in range(120)]
    areas = np.array([each.target[0] * each.target[1] / 2304 for each in found])
    aspects = np.array([each.target[0] / each.target[1] for each in found])
    contexts = np.array([each.context[0] * each.context[1] / 2304 for each in found])
    assert 0.14 < areas.min() < 0.16
    assert 0.19 < areas.max() < 0.21
    assert 0.7 < aspects.min() < 0.85
    assert 1.4 < aspects.max() < 1.55
    assert 0.82 < contexts.min() < 0.88
    assert 0.97 < contexts.max() <= 1
    assert abs(np.corrcoef(areas, aspects)[0, 1]) < 0.3


def test_an_images_blocks_depend_on_seed_epoch_and_the_image_alone() -> None:
    ids = torch.tensor([4, 11, 300, 2])
    whole = PAPER.draw(GRID, 1, 2, ids)
    part = PAPER.draw(GRID, 1, 2, ids[[3, 1]])
    assert all(torch.equal(few, many[[3, 1]]) for few, many in zip(part, whole, strict=True))
    assert not torch.equal(PAPER.draw(GRID, 1, 3, ids)[0][:, :20], whole[0][:, :20])
    assert not torch.equal(PAPER.draw(GRID, 2, 2, ids)[0][:, :20], whole[0][:, :20])
    assert len({PAPER.sizes(GRID, 0, epoch) for epoch in range(50)}) > 8, "sizes change from epoch to epoch"


def test_blocks_lie_anywhere_alike() -> None:
    sizes = PAPER.sizes(GRID, 0, 0)
    _, targets = PAPER.draw(GRID, 0, 0, torch.arange(1500))
    corners = Counter(targets[:, :, 0].flatten().tolist())
    places = (GRID[0] - sizes.target[0] + 1) * (GRID[1] - sizes.target[1] + 1)
    assert len(corners) == places
    assert min(corners.values()) > 0.5 * 6000 / places
    assert max(corners.values()) < 1.6 * 6000 / places


def test_nine_of_ten_images_have_so_many_patches_free_and_those_left_out_lie_anywhere() -> None:
    sizes = PAPER.sizes(GRID, 0, 0)
    context, targets = PAPER.draw(GRID, 0, 0, torch.arange(1000))
    shown = torch.zeros(1000, 196).scatter_(1, context, 1).view(1000, *GRID)
    assert 30 < sizes.kept < 100
    covered = torch.zeros(1000, 196).scatter_(1, targets.flatten(1), 1).view(1000, *GRID)
    odds = shown.sum(dim=0) / (1 - covered).sum(dim=0)  # the paper's cut by order would leave the last rows at 0
    assert odds[-2:].mean() > 0.8 * odds[:2].mean()


@pytest.mark.parametrize(
    ("grid", "settings", "said"),
    [
        ((3, 12), {}, r"grid of at least 4 x 4, not 3 x 12; lower backbone.patch"),
        ((12, 12), {"targets": 16, "scale": (0.3, 0.5)}, r"16 targets of .* leave .* which needs 6"),
        ((12, 12), {"scale": (0.01, 0.2)}, r"targets of 1 x 1 patches have fewer than 6"),
        ((12, 12), {"context": (0.02, 1.0)}, r"leave 0 of a context of 2 x 2"),
    ],
)
def test_blocks_too_small_are_refused_in_words(grid: tuple[int, int], settings: dict[str, Any], said: str) -> None:
    knobs: dict[str, Any] = {"targets": 4, "scale": (0.15, 0.2), "aspect": (0.75, 1.5), "context": (0.85, 1.0)}
    with pytest.raises(UsageError, match=said):
        BlockRule(**knobs | settings).check(grid)


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (12, 12), (14, 14), (16, 16), (32, 32), (4, 30)])
def test_the_papers_blocks_fit_usual_grids(grid: tuple[int, int]) -> None:
    PAPER.check(grid)
