"""What is hidden: as much as is asked, of the shape that is asked, wherever it may lie."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from sslmed.models.occlusions import MOST_BLOCKS, any_of, around, centre, drawn_rectangles, random_pattern, some_blocks

SIZES = [(32, 32), (96, 80), (5, 7)]
each_size = pytest.mark.parametrize("size", SIZES)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


@each_size
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_a_pattern_covers_its_share_to_the_pixel(size: tuple[int, int], share: float) -> None:
    mask = random_pattern(uniform(20, 1, 10, 10), uniform(20, 2, seed=1), torch.full((20,), share), size)
    assert mask.shape == (20, *size)
    assert (mask.sum(dim=(1, 2)) == round(share * size[0] * size[1])).all()
    assert not torch.equal(mask[0], mask[1])


def test_a_pattern_is_made_of_blots_anywhere() -> None:
    mask = random_pattern(uniform(300, 1, 10, 10), uniform(300, 2, seed=1), torch.full((300,), 0.25), (64, 64))
    blots = [ndimage.label(each)[1] for each in mask[:40].numpy()]
    assert 2 < np.mean(blots) < 25, "not pixels, not one piece"
    often = mask.float().mean(dim=0)
    assert 0.12 < often.min() < often.max() < 0.4, "every pixel is hidden about as often"


@each_size
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_blocks_cover_at_least_their_share_and_not_a_block_more(size: tuple[int, int], share: float) -> None:
    mask = some_blocks(uniform(60, MOST_BLOCKS, 4), share, size)
    area = mask.float().mean(dim=(1, 2))
    block = max(size[0] // 4, 1) * max(size[1] // 4, 1) / (size[0] * size[1])
    assert area.min() >= share - 1e-6
    assert area.max() < share + block + 1e-6
    assert min(size) < 8 or len(area.unique()) > 1


def test_blocks_are_rectangles_of_an_eighth_to_a_quarter() -> None:
    masks = some_blocks(uniform(200, MOST_BLOCKS, 4), 0.001, (32, 32))  # one block each
    sides = set()
    for mask in masks.numpy():
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert mask.sum() == len(rows) * len(columns)
        sides |= {len(rows), len(columns)}
    assert sides == set(range(4, 9))


def test_the_centre_is_half_of_each_side() -> None:
    mask = centre(2, (8, 12), torch.device("cpu"))
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[2:6, 3:9] = True
    assert torch.equal(mask, expected.expand(2, -1, -1))
    assert centre(1, (1, 1), torch.device("cpu")).all()


@pytest.mark.parametrize("width", [0, 1, 3])
def test_around_is_a_ring(width: int) -> None:
    mask = uniform(3, 15, 12, seed=2) > 0.97
    expected = np.stack([ndimage.maximum_filter(each, 2 * width + 1, mode="constant") for each in mask.numpy()])
    assert torch.equal(around(mask, width), torch.from_numpy(expected) & ~mask)


@pytest.mark.parametrize(("size", "margin"), [((32, 24), 3), ((6, 6), 3), ((3, 2), 3)])
def test_rectangles_have_every_size_and_place_within_the_margin(size: tuple[int, int], margin: int) -> None:
    shortest, longest = (1, 1), (max(size[0] // 3, 1), max(size[1] // 3, 1))
    reached = drawn_rectangles(uniform(800, 2, 4, seed=3), size, shortest, longest, margin)
    for axis, (side, rows) in enumerate(zip(size, reached, strict=True)):
        long = rows.sum(dim=2)
        first = rows.to(torch.uint8).argmax(dim=2)
        assert set(long.flatten().tolist()) == set(range(1, longest[axis] + 1))
        edge = torch.minimum((side - long) // 2, torch.tensor(margin))
        assert (first >= edge).all()
        assert (first + long <= side - edge).all()
        assert (rows.to(torch.int8).diff(dim=2) == 1).sum(dim=2).max() <= 1, "in one piece"
        assert first.max() + long[first == first.max()].max() == side - edge.min() or side < 2 * margin


def test_the_union_of_the_drawn_ones() -> None:
    rows, columns = drawn_rectangles(uniform(4, 3, 4, seed=4), (10, 9), (2, 2), (5, 5), 0)
    drawn = torch.tensor([[True, False, True], [False] * 3, [True] * 3, [False, True, False]])
    found = any_of(rows, columns, drawn)
    for n in range(4):
        expected = np.zeros((10, 9), bool)
        for b in range(3):
            if drawn[n, b]:
                expected |= np.outer(rows[n, b].numpy(), columns[n, b].numpy())
        np.testing.assert_array_equal(found[n].numpy(), expected)
