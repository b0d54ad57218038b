"""Noise, swaps, shuffles and tone curves against independent loops; what must stay stays; small images work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.models.corruptions import (
    LEVELS,
    ascending,
    coarse_field,
    moved,
    shuffle_sources,
    swap_cells,
    swap_sources,
    tone_curve,
    toned,
    unit_range,
)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape))


def permutes(sources: torch.Tensor) -> bool:
    return torch.equal(sources.sort(dim=1).values, torch.arange(sources.shape[1]).expand_as(sources))


# Coarse noise.


@pytest.mark.parametrize("size", [(7, 12), (32, 32)])
def test_a_field_is_bilinear_between_its_nodes(size: tuple[int, int]) -> None:
    nodes, phase = uniform(2, 3, 6, 6), uniform(2, 2, seed=1)
    found = coarse_field(nodes, phase, size)
    for n, c, y, x in [(0, 0, 0, 0), (1, 2, 6, 11), (0, 1, 3, 5), (1, 0, size[0] - 1, size[1] - 1)]:
        down, across = (
            (at + 0.5) * 4 / side + phase[n, k] for k, (at, side) in enumerate(zip((y, x), size, strict=True))
        )
        i, j = int(down), int(across)
        a, b = down - i, across - j
        corners = nodes[n, c, i : i + 2, j : j + 2]
        expected = (1 - a) * ((1 - b) * corners[0, 0] + b * corners[0, 1])
        expected = expected + a * ((1 - b) * corners[1, 0] + b * corners[1, 1])
        torch.testing.assert_close(found[n, c, y, x], expected)


def test_a_field_keeps_its_precision_under_autocast() -> None:
    nodes, phase = uniform(2, 1, 10, 10).float(), uniform(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(coarse_field(nodes, phase, (32, 32)), coarse_field(nodes, phase, (32, 32)).float())
        rounded = coarse_field(nodes, phase, (32, 32))
    assert torch.equal(rounded, coarse_field(nodes, phase, (32, 32)))


# Swapped patches.


def swapped_by_hand(
    image: np.ndarray, order: np.ndarray, phase: np.ndarray, patch: tuple[int, int], swaps: int
) -> np.ndarray:
    (height, width), (p, q) = image.shape, patch
    rows, columns = swap_cells((height, width), patch)
    top, left = (
        int(u * (side - n * k + 1)) for u, side, n, k in zip(phase, image.shape, (rows, columns), patch, strict=True)
    )
    chosen, result = np.argsort(order, kind="stable"), image.copy()
    for k in range(swaps):
        places = []
        for cell in (chosen[k], chosen[swaps + k]):
            y, x = top + cell // columns * p, left + cell % columns * q
            places.append((slice(y, y + p), slice(x, x + q)))
        result[places[0]], result[places[1]] = image[places[1]], image[places[0]]
    return result


@pytest.mark.parametrize(
    ("size", "patch", "swaps"), [((32, 32), (4, 4), 10), ((30, 41), (5, 3), 20), ((9, 9), (2, 3), 4)]
)
def test_patches_change_places_in_pairs(size: tuple[int, int], patch: tuple[int, int], swaps: int) -> None:
    rows, columns = swap_cells(size, patch)
    images = uniform(5, 2, *size, seed=2)
    order, phase = uniform(5, rows * columns, seed=3), uniform(5, 2, seed=4)
    sources = swap_sources(order, phase, size, patch, swaps)
    found = moved(images, sources)
    for n in range(5):
        for c in range(2):
            expected = swapped_by_hand(images[n, c].numpy(), order[n].numpy(), phase[n].numpy(), patch, swaps)
            np.testing.assert_array_equal(found[n, c].numpy(), expected)
    assert permutes(sources)
    assert torch.equal(moved(found, sources), images), "swapping twice is nothing"
    assert ((sources != torch.arange(sources.shape[1])).sum(dim=1) == 2 * swaps * patch[0] * patch[1]).all()


def test_a_grid_lies_at_every_offset() -> None:
    size, patch = (32, 32), (4, 4)
    rows, columns = swap_cells(size, patch)
    order = uniform(400, rows * columns, seed=5)
    sources = swap_sources(order, uniform(400, 2, seed=6), size, patch, rows * columns // 2)
    touched = (sources != torch.arange(32 * 32)).view(-1, 32, 32)
    firsts = touched.any(dim=2).long().argmax(dim=1)
    assert set(firsts.tolist()) == set(range(5)), "so that no edge is always in the same place"


# Shuffled windows.


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_a_shuffle_is_a_permutation_within_windows_of_at_most_the_longest_sides(
    height: int, width: int, seed: int
) -> None:
    longest = (max(height // 10, 1), max(width // 10, 1))
    sources = shuffle_sources(
        uniform(3, height, seed=seed),
        uniform(3, width, seed=seed + 1),
        uniform(3, height * width, seed=seed + 2),
        longest,
    )
    assert permutes(sources)
    places = torch.arange(height * width)
    down = (sources // width - places // width).abs()
    across = (sources % width - places % width).abs()
    assert down.max() < longest[0]
    assert across.max() < longest[1]


def test_windows_are_the_crossings_of_strips_and_each_order_is_possible() -> None:
    """Strips of 2 and 3, of 1 and 2: the pixels of a window come from that window, and in every order alike."""
    heights, widths = torch.tensor([[0.5, 0.9, 0, 0, 0]]), torch.tensor([[0.0, 0.5, 0]])  # of at most 3
    count = 6000
    sources = shuffle_sources(heights.expand(count, -1), widths.expand(count, -1), uniform(count, 15, seed=7), (3, 3))
    windows = [[0, 3], [1, 2, 4, 5], [6, 9, 12], [7, 8, 10, 11, 13, 14]]
    for window in windows:
        assert set(sources[:, window].unique().tolist()) == set(window)
        for place in window:
            shares = torch.bincount(sources[:, place], minlength=15)[window] / count
            assert (shares - 1 / len(window)).abs().max() < 0.03
    orders = {tuple(row) for row in sources[:, windows[2]].tolist()}
    assert len(orders) == 6


# Tone curves.


def curve_by_hand(points: np.ndarray, inverted: bool, values: np.ndarray) -> np.ndarray:
    """As the reference does it: 100,000 points of the curve by Bernstein polynomials, sorted, np.interp."""
    t = np.linspace(0, 1, 100_000)
    basis = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    x = np.array([0, points[0], points[2], 1]) @ basis
    y = np.array([0, points[1], points[3], 1]) @ basis
    x, y = (np.sort(x), y[::-1]) if inverted else (np.sort(x), np.sort(y))
    return np.interp(values, x, y)


def test_curves_are_the_references() -> None:
    points, inverted = uniform(40, 4, seed=8), torch.arange(40) % 2 == 0
    curves = tone_curve(points, inverted)
    grid = np.linspace(0, 1, LEVELS)
    for n in range(40):
        expected = curve_by_hand(points[n].numpy(), bool(inverted[n]), grid)
        np.testing.assert_allclose(curves[n].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("points", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 1, 0], [1, 0, 0, 1], [0.3, 0.9, 0.8, 0.1]])
@pytest.mark.parametrize("inverted", [False, True])
def test_curves_rise_from_0_to_1_or_fall_from_1_to_0(points: list[float], inverted: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        (curve,) = tone_curve(torch.tensor([points], dtype=dtype), torch.tensor([inverted]))
        steps = curve.diff() * (-1 if inverted else 1)
        assert steps.min() >= -1e-6
        assert (curve[0], curve[-1]) == ((1, 0) if inverted else (0, 1))
        assert curve.min() >= 0
        assert curve.max() <= 1


def test_grey_values_follow_their_images_curve() -> None:
    points, inverted = uniform(6, 4, seed=9), torch.arange(6) % 2 == 0
    unit = uniform(6, 2, 9, 7, seed=10)
    unit[:, :, 0, 0], unit[:, :, 0, 1] = 0.0, 1.0
    found = toned(unit, tone_curve(points, inverted))
    for n in range(6):
        grid = np.linspace(0, 1, LEVELS)
        expected = np.interp(unit[n].numpy(), grid, curve_by_hand(points[n].numpy(), bool(inverted[n]), grid))
        np.testing.assert_allclose(found[n].numpy(), expected, atol=2e-5)
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(found[:, :, 0, 0], inverted[:, None].expand(6, 2).double())


# Ranges.


def test_each_image_is_scaled_by_its_own_range() -> None:
    images = torch.stack([torch.full((1, 4, 4), 7.0), torch.arange(16.0).view(1, 4, 4) - 3])
    unit, low, high = unit_range(images)
    assert (unit[0] == 0).all(), "flat"
    assert (unit[1].min(), unit[1].max()) == (0, 1)
    torch.testing.assert_close(low + unit * (high - low), images)


def test_rows_ascend() -> None:
    values = uniform(3, 50, seed=11)
    assert torch.equal(ascending(values), values.sort(dim=1).values)
