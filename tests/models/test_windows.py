import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslmed.models.windows import blend, places, slide, slide_labels

torch.manual_seed(0)
POINTWISE = nn.Sequential(nn.Conv2d(2, 5, 1), nn.GELU(), nn.Conv2d(5, 3, 1), nn.Softmax(dim=1)).eval()
LOCAL = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1)).eval()
RADIUS = 2  # of LOCAL: two 3x3 convolutions

FRACTIONS = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.55, 0.9]), st.floats(0, 0.95))


def image(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, height, width, generator=torch.Generator().manual_seed(seed))


@st.composite
def settings_of(draw: Any, smallest: int = 1) -> dict[str, Any]:
    window = draw(st.integers(smallest, 12)), draw(st.integers(smallest, 12))
    size = tuple(side + draw(st.integers(0, 25)) for side in window)
    return {"size": size, "window": window, "overlap": draw(FRACTIONS), "batch": draw(st.integers(1, 7))}


@given(st.integers(1, 300), st.data(), FRACTIONS)
def test_places_cover_the_length(length: int, data: Any, overlap: float) -> None:
    window = data.draw(st.integers(1, length))
    starts = places(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert {at for start in starts for at in range(start, start + window)} == set(range(length))
    # Neighbours overlap enough, or by all but one pixel; gaps are even; one window less would not do.
    needed = min(math.ceil(overlap * window - 1e-9), window - 1)
    assert (window - gaps >= needed).all()
    if len(starts) > 1:
        assert gaps.max() - gaps.min() <= 1
        assert (len(starts) - 2) * (window - needed) < length - window


def test_known_places() -> None:
    assert places(10, 10, 0.5) == [0]
    assert places(20, 10, 0.5) == [0, 5, 10]
    assert places(20, 10, 0) == [0, 10]
    assert places(21, 10, 0) == [0, 5, 11]
    assert places(200, 100, 0.55) == [0, 33, 66, 100]  # 55.00000000000001 of 100 are 55
    assert places(3, 1, 0.9) == [0, 1, 2]


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(9, 10, 0.5), (9, 0, 0.5), (9, 3, 1), (9, 3, -0.1), (9, 3, math.nan)]
)
def test_places_that_cannot_be_are_refused(length: int, window: int, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"does not fit|overlap is"):
        places(length, window, overlap)


@given(st.integers(1, 100), st.data(), FRACTIONS)
def test_weights_sum_to_1_and_are_0_in_inner_margins_alone(length: int, data: Any, overlap: float) -> None:
    window = data.draw(st.integers(1, length))
    margin = data.draw(st.integers(0, (window - 1) // 2))
    starts = places(length, window, max(overlap, 2 * margin / window))
    weights = blend(starts, window, margin)
    total = np.zeros(length)
    for start, own in zip(starts, weights, strict=True):
        total[start : start + window] += own
    np.testing.assert_allclose(total, 1, atol=1e-12)
    expected = np.ones((len(starts), window), bool)
    for place in range(len(starts)):
        expected[place, : margin * (place > 0)] = False
        expected[place, window - margin * (place < len(starts) - 1) :] = False
    np.testing.assert_array_equal(weights.astype(np.float32) > 0, expected)


def test_the_weights_are_the_shares_of_a_gaussian_of_an_eighth_of_the_side() -> None:
    bell = [math.exp(-0.5 * ((at - 7.5) / 2) ** 2) for at in range(16)]
    first, second = blend([0, 8], 16)
    np.testing.assert_allclose(first[:8], 1)
    np.testing.assert_allclose(first[8:], [bell[8 + at] / (bell[8 + at] + bell[at]) for at in range(8)], rtol=1e-12)
    np.testing.assert_allclose(second, first[::-1], rtol=1e-12)


@pytest.mark.parametrize(("starts", "window", "margin"), [([0, 8], 10, 2), ([0, 11], 10, 0), ([0, 5], 10, -1)])
def test_gaps_between_windows_are_refused(starts: list[int], window: int, margin: int) -> None:
    with pytest.raises(ValueError, match="leaves gaps"):
        blend(starts, window, margin)


@given(settings_of())
@settings(max_examples=60, deadline=None)
def test_a_pointwise_network_gives_what_one_pass_gives(given: dict[str, Any]) -> None:
    whole = image(*given.pop("size"))
    with torch.no_grad():
        expected = POINTWISE(whole[None])[0].numpy()
    found = slide(whole, predict=POINTWISE, **given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(settings_of(smallest=2 * RADIUS + 3), st.integers(RADIUS, RADIUS + 1))
@settings(max_examples=60, deadline=None)
def test_a_margin_of_the_receptive_radius_gives_what_one_pass_gives(given: dict[str, Any], margin: int) -> None:
    whole = image(*given.pop("size"))
    with torch.no_grad():
        expected = LOCAL(whole[None])[0].numpy()
    np.testing.assert_allclose(slide(whole, predict=LOCAL, margin=margin, **given), expected, atol=1e-5)


def test_a_margin_below_the_receptive_radius_does_not() -> None:
    whole = image(40, 40)
    with torch.no_grad():
        expected = LOCAL(whole[None])[0].numpy()
    assert np.abs(slide(whole, (16, 16), LOCAL, margin=RADIUS - 1) - expected).max() > 1e-3


def test_windows_are_blended_by_their_weights() -> None:
    """Each window says its own number; what comes out is the Gaussian mean of 2D windows, the long way."""
    size, window, starts = (14, 11), (8, 6), ([0, 3, 6], [0, 2, 5])
    said: list[float] = []

    def numbered(windows: torch.Tensor) -> torch.Tensor:
        said.extend(len(said) + 1.0 + torch.arange(len(windows)).double().numpy())
        return torch.tensor(said[-len(windows) :])[:, None, None, None].expand(-1, 1, *window)

    def bell(side: int) -> Any:
        return np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (side / 8)) ** 2)

    above, below = np.zeros((2, *size))
    number = 0.0
    for top in starts[0]:
        for left in starts[1]:
            number += 1
            place = np.s_[top : top + window[0], left : left + window[1]]
            above[place] += number * np.outer(bell(8), bell(6))
            below[place] += np.outer(bell(8), bell(6))
    assert (places(14, 8, 0.5), places(11, 6, 0.5)) == starts
    np.testing.assert_allclose(slide(torch.zeros(1, *size), window, numbered, batch=2)[0], above / below, rtol=1e-5)
    assert len(said) == 9


@given(settings_of(smallest=3), st.floats(-50, 50), st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_constant_scores_stay_constant(given: dict[str, Any], level: float, margin: int) -> None:
    def constant(windows: torch.Tensor) -> torch.Tensor:
        return torch.full((), level).expand(len(windows), 2, *windows.shape[2:])  # nothing there to write into

    found = slide(image(*given.pop("size")), predict=constant, margin=margin, **given)
    np.testing.assert_allclose(found, level, rtol=1e-5, atol=1e-30)


@given(settings_of(smallest=3), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_the_labels_are_those_of_the_highest_score(given: dict[str, Any], margin: int) -> None:
    whole = image(*given.pop("size"))
    labels = slide_labels(whole, predict=LOCAL, margin=margin, **given)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, slide(whole, predict=LOCAL, margin=margin, **given).argmax(axis=0))


def test_of_equal_scores_the_first_class() -> None:
    labels = slide_labels(image(9, 9), (4, 4), lambda windows: torch.zeros(len(windows), 3, 4, 4))
    assert not labels.any()


def test_windows_come_in_batches_without_gradients_in_any_precision() -> None:
    sizes: list[int] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        sizes.append(len(windows))
        return nn.Parameter(windows[:, :1].bfloat16())

    found = slide(torch.ones(1, 20, 20), (10, 10), predict, batch=4)  # 9 windows: batches go on over the end of a row
    assert sizes == [4, 4, 1]
    assert torch.is_grad_enabled()
    np.testing.assert_allclose(found, 1, atol=1e-6)


def held(call: Any) -> int:
    """The most bytes of numpy arrays at once."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("window", [(32, 128), (48, 96), (32, 256)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
def test_memory_is_that_of_a_band(window: tuple[int, int], overlap: float) -> None:
    height, width, classes = 1500, 256, 6
    slack = 50_000 + 8 * (height + width) / (1 - overlap)  # the interpreter's, and the weights along the axes

    def predict(windows: torch.Tensor) -> torch.Tensor:
        return windows.expand(-1, classes, -1, -1)

    whole = image(height, width)[:1]
    band = 4 * (classes + 1) * window[0] * width
    assert held(lambda: slide_labels(whole, window, predict, overlap=overlap)) < band + height * width + slack
    everything = 4 * classes * height * width
    assert held(lambda: slide(whole, window, predict, overlap=overlap)) < everything + band + slack


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(1, 7, 20)}, "does not fit"),
        ({"image": torch.zeros(1, 20, 7)}, "does not fit"),
        ({"image": torch.zeros(20, 20)}, "an image"),
        ({"overlap": 1.0}, "overlap is"),
        ({"batch": 0}, "batch is 0"),
        ({"margin": 4}, "leaves nothing"),
        ({"margin": -1}, "leaves nothing"),
        ({"predict": lambda windows: windows[:, :, ::2]}, "scores of shape"),
        ({"predict": lambda windows: windows[:1]}, "scores of shape"),
        ({"predict": lambda windows: windows[:, 0]}, "scores of shape"),
    ],
)
def test_what_cannot_be_slid_over_is_refused(changes: dict[str, Any], message: str) -> None:
    given = {"image": torch.zeros(2, 20, 20), "window": (8, 8), "predict": lambda windows: windows} | changes
    for function in (slide, slide_labels):
        with pytest.raises(ValueError, match=message):
            function(**given)


@pytest.mark.parametrize("classes", [1, 256])
def test_labels_are_those_that_a_byte_can_tell(classes: int) -> None:
    with pytest.raises(ValueError, match="2 to 255 classes"):
        slide_labels(torch.zeros(1, 9, 9), (4, 4), lambda windows: windows.expand(-1, classes, -1, -1))
