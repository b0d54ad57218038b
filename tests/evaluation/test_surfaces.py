import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import cdist

from sslmed.evaluation.surfaces import Surface, distances

RANDOM = np.random.default_rng(0)
SPACINGS = {2: (0.7, 1.9), 3: (5.0, 0.7, 1.1)}


def outline(mask: Any) -> list[tuple[int, ...]]:
    """Pixels with an axis neighbour that is not in the set."""
    pixels = {tuple(int(at) for at in place) for place in np.argwhere(mask)}
    beside = [tuple(step * (axis == one) for axis in range(mask.ndim)) for one in range(mask.ndim) for step in (-1, 1)]
    return sorted(
        place for place in pixels if any(tuple(np.add(place, step).tolist()) not in pixels for step in beside)
    )


def slow(truth: Any, predicted: Any, spacing: Any) -> Surface:
    """Every distance between two outlines, none of them by a transform."""
    one, other = outline(truth), outline(predicted)
    if not one or not other:
        worst = math.sqrt(sum((n * s) ** 2 for n, s in zip(truth.shape, spacing, strict=True)))
        return Surface(*[worst if one or other else math.nan] * 2)
    table = cdist(np.array(one) * spacing, np.array(other) * spacing)
    forth, back = table.min(axis=1), table.min(axis=0)
    percentiles = [percentile_95(forth), percentile_95(back)]
    return Surface(max(percentiles), (forth.sum() + back.sum()) / (len(forth) + len(back)))


def percentile_95(values: Any) -> float:
    """Between the two nearest order statistics, linearly."""
    ordered, place = sorted(values.tolist()), 0.95 * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def single(shape: tuple[int, ...], at: tuple[int, ...]) -> Any:
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


def box(shape: tuple[int, ...], low: int, high: int) -> Any:
    mask = np.zeros(shape, bool)
    mask[(slice(low, high),) * len(shape)] = True
    return mask


def cases() -> dict[str, tuple[Any, Any]]:
    found = {}
    for shape in ((9, 12), (1, 7), (6, 7, 8), (1, 6, 5), (4, 1, 1)):
        empty, full = np.zeros(shape, bool), np.ones(shape, bool)
        corner, opposite = single(shape, (0,) * len(shape)), single(shape, (-1,) * len(shape))
        found |= {
            f"{shape} sparse": (RANDOM.random(shape) < 0.3, RANDOM.random(shape) < 0.2),
            f"{shape} dense": (RANDOM.random(shape) < 0.95, RANDOM.random(shape) < 0.9),
            f"{shape} corners": (corner, opposite),
            f"{shape} pixel in full": (corner, full),
            f"{shape} full": (full, full),
            f"{shape} empty": (empty, empty),
            f"{shape} one empty": (empty, corner),
            f"{shape} other empty": (full, empty),
            f"{shape} touching borders": (box(shape, 0, 5), box(shape, 2, 99)),
        }
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isotropic", [True, False])
def test_the_distances_are_those_of_brute_force(name: str, isotropic: bool) -> None:
    truth, predicted = CASES[name]
    spacing = (1.0,) * truth.ndim if isotropic else SPACINGS[truth.ndim]
    found, expected = distances(truth, predicted, spacing), slow(truth, predicted, spacing)
    assert (found.hd95, found.asd) == pytest.approx((expected.hd95, expected.asd), abs=1e-6, nan_ok=True)
    if isotropic:
        assert repr(distances(truth, predicted)) == repr(found)
        assert repr(distances(truth, predicted, 1)) == repr(found)


def test_a_known_pair() -> None:
    """Two pixels three columns and four rows apart; then a row of 21 of which one end sticks out."""
    apart = distances(single((9, 9), (1, 1)), single((9, 9), (5, 4)))
    assert (apart.hd95, apart.asd) == (5, 5)
    long, short = np.zeros((3, 40), bool), np.zeros((3, 40), bool)
    long[1, :21] = short[1, :20] = True
    found = distances(long, short)
    assert found.hd95 == 0  # 1 of 21 is below a twentieth
    assert found.asd == pytest.approx(1 / 41)


def test_what_is_inside_a_mask_is_no_surface() -> None:
    solid, ring, hollow = (box((20, 20), 5, 15) for _ in range(3))
    ring[6:14, 6:14] = False
    assert distances(ring, solid) == Surface(0, 0)
    hollow[8:12, 8:12] = False  # the hole has an outline of its own, 16 pixels beside the 36 outside
    assert distances(hollow, solid) == Surface(2, 16 * 2 / (16 + 36 + 36))


MASKS = arrays.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=6).flatmap(
    lambda shape: st.tuples(arrays.arrays(bool, shape), arrays.arrays(bool, shape))
)


@given(MASKS, st.floats(0.1, 5))
@settings(max_examples=60, deadline=None)
def test_symmetric_bounded_and_blind_to_flips(pair: tuple[Any, Any], scale: float) -> None:
    truth, predicted = pair
    spacing = [scale * step for step in SPACINGS[truth.ndim]]
    found = distances(truth, predicted, spacing)
    values = pytest.approx((found.hd95, found.asd), nan_ok=True, rel=1e-12)
    swapped = distances(predicted, truth, spacing)
    assert (swapped.hd95, swapped.asd) == values
    turned = distances(np.flip(truth), np.flip(predicted), spacing)
    assert (turned.hd95, turned.asd) == values
    diagonal = math.hypot(*(n * s for n, s in zip(truth.shape, spacing, strict=True)))
    if truth.any() and predicted.any():
        assert 0 <= found.hd95 < diagonal
        assert 0 <= found.asd < diagonal
    elif truth.any() or predicted.any():
        assert found == Surface(diagonal, diagonal)
    else:
        assert math.isnan(found.hd95)
        assert math.isnan(found.asd)
    if truth.any():
        assert distances(truth, truth, spacing) == Surface(0, 0)


def test_memory_is_that_of_the_box_around_both() -> None:
    truth, predicted = np.zeros((2, 100, 200, 200), bool)
    truth[20:80, 60:140, 60:140] = predicted[22:84, 60:140, 60:140] = True
    tracemalloc.start()
    try:
        found = distances(truth, predicted, (5, 1, 1))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.hd95 == 20
    box_pixels, surface_pixels = 64 * 80 * 80, 2 * 2 * (80 * 80 + 2 * 62 * 80)
    assert peak < 16 * box_pixels + 60 * surface_pixels < 51 * box_pixels  # what distances at every pixel would take


@pytest.mark.parametrize(
    ("truth", "predicted", "spacing", "message"),
    [
        (np.ones((2, 2), bool), np.ones((2, 3), bool), 1, "two masks"),
        (np.ones(4, bool), np.ones(4, bool), 1, "two masks"),
        (np.ones((2, 2), np.uint8), np.ones((2, 2), bool), 1, "boolean"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1, 1), "one an axis"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 0), "positive"),
        (np.ones((2, 2), bool), np.ones((2, 2), bool), (1, math.nan), "positive"),
    ],
)
def test_what_is_no_pair_of_masks_is_refused(truth: Any, predicted: Any, spacing: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distances(truth, predicted, spacing)
