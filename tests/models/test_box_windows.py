"""Boxes of a large image from windows: objects at seams, and a real detector in windows and in one pass."""

import math
from itertools import pairwise
from typing import Any

import detection
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.models.box_windows import _seams, _starts, slide_boxes

Box = tuple[int, int, int, int]
STRIDE = 8


def painted(size: tuple[int, int], boxes: list[Box]) -> torch.Tensor:
    """Rectangles of the values 1, 2, and so on."""
    image = torch.zeros(1, *size)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        image[0, top:bottom, left:right] = number
    return image


def finder(windows: torch.Tensor, most: int = 40, jitter: float = 0.0) -> torch.Tensor:
    """The boxes around what a window shows of each rectangle; the more of it the higher the score.

    ``jitter`` is by how many pixels a box is drawn towards the side of the window on which it lies.
    """
    found = torch.zeros(len(windows), most, 6)
    found[..., 5] = -1
    for own, window in zip(found, windows[:, 0], strict=True):
        for at, value in enumerate(window.unique()[window.unique() > 0].tolist()[:most]):
            rows, columns = torch.nonzero(window == value, as_tuple=True)
            box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            box[[0, 2]] += jitter * torch.sign((box[0] + box[2]) / 2 - window.shape[1] / 2)
            seen = len(rows) / 10000
            own[at] = torch.tensor([*box.tolist(), 0.5 + seen, 0])
        own[:] = own[own[:, 4].argsort(descending=True, stable=True)]
    return found


def slid(image: torch.Tensor, window: tuple[int, int], predict: Any = finder, **changes: Any) -> torch.Tensor:
    return slide_boxes(image, window, predict, **({"stride": STRIDE, "suppress": 0.6} | changes))


def as_boxes(found: torch.Tensor) -> list[Box]:
    return sorted(tuple(map(int, row)) for row in found[:, :4].tolist())  # type: ignore[misc]


@given(st.integers(16, 200), st.integers(0, 500), st.sampled_from([4, 8, 16]))
def test_windows_start_at_multiples_of_the_stride_and_cover_the_image(window: int, more: int, stride: int) -> None:
    window = max(window, 2 * stride)
    length = window + more
    starts = _starts(length, window, stride)
    assert starts[0] == 0
    assert all(start % stride == 0 for start in starts)
    assert starts[-1] + window >= length
    assert len(starts) == 1 or starts[-2] + window < length, "no window is needless"
    steps = {after - before for before, after in pairwise(starts)}
    assert len(steps) <= 1
    assert not steps or window / 2 - stride < steps.pop() <= max(window / 2, stride)
    seams = _seams(starts, window)
    assert (seams[0], seams[-1]) == (-math.inf, math.inf)
    for number, start in enumerate(starts[1:], start=1):
        assert seams[number] - start == starts[number - 1] + window - seams[number], "in the middle of what is shared"


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """Rectangles apart from each other, no larger than four fifths of what windows share, anywhere in the image."""
    window = draw(st.sampled_from([(32, 32), (32, 48), (40, 36)]))
    size = tuple(side + draw(st.integers(0, 80)) for side in window)
    boxes: list[Box] = []
    for _ in range(draw(st.integers(0, 5))):
        width, height = (draw(st.integers(3, int(0.8 * side / 2))) for side in reversed(window))
        left, top = draw(st.integers(0, size[1] - width)), draw(st.integers(0, size[0] - height))
        apart = (left + width <= box[0] or box[2] <= left or top + height <= box[1] or box[3] <= top for box in boxes)
        if all(apart):
            boxes.append((left, top, left + width, top + height))
    return {"size": size, "window": window, "boxes": boxes}


@settings(max_examples=80, deadline=None)
@given(scenes())
def test_every_object_is_found_once_and_whole(given: dict[str, Any]) -> None:
    found = slid(painted(given["size"], given["boxes"]), given["window"])
    assert as_boxes(found) == sorted(given["boxes"])
    assert (found[:, 4].diff() <= 0).all()


def test_an_object_at_the_border_of_an_image_that_is_continued_is_found() -> None:
    box = (83, 0, 86, 3)  # the last window reaches 14 pixels beyond the image, and sees the object that much wider
    assert as_boxes(slid(painted((40, 86), [box]), (40, 36))) == [box]


@pytest.mark.parametrize("at", range(64, 97))
def test_an_object_at_a_seam_is_found_once(at: int) -> None:
    """Windows of 64 start at 0, 32 and 64: the first seam is at 48, the second at 80."""
    box = (at - 10, 20, at + 10, 40)
    assert as_boxes(slid(painted((64, 128), [box]), (64, 64))) == [box]


@pytest.mark.parametrize("jitter", [-2.0, -1.0, 1.0, 2.0])
@pytest.mark.parametrize("middle", [46, 47, 48, 49, 50])
def test_windows_that_disagree_about_a_seam_lose_nothing(middle: int, jitter: float) -> None:
    """Each sees the object on its neighbour's side of the seam, or each on its own."""
    image = painted((64, 128), [(middle - 10, 20, middle + 10, 40)])
    found = slid(image, (64, 64), lambda windows: finder(windows, jitter=jitter))
    assert len(found) == 1
    assert found[0, 0].item() == pytest.approx(middle - 10, abs=2)


def test_an_object_as_large_as_half_a_window_is_found_once_and_almost_whole() -> None:
    for left in range(0, 97, 3):
        box = (left, 20, left + 32, 52)
        (found,) = as_boxes(slid(painted((72, 128), [box]), (64, 64)))
        assert abs(found[0] - box[0]) + abs(found[2] - box[2]) <= 4
        assert found[1] == 20
        assert found[3] == 52


def test_an_image_of_one_window_is_asked_once() -> None:
    asked: list[torch.Size] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        asked.append(windows.shape)
        return finder(windows)

    boxes = [(0, 0, 10, 12), (30, 20, 48, 32)]
    assert as_boxes(slid(painted((32, 48), boxes), (32, 48), predict)) == boxes
    assert asked == [(1, 1, 32, 48)]


def test_windows_come_in_batches_without_gradients_and_the_border_is_continued() -> None:
    asked: list[torch.Tensor] = []

    def predict(windows: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        asked.extend(windows)
        assert len(windows) <= 4
        return finder(windows).bfloat16()

    image = torch.arange(50.0 * 70).reshape(1, 50, 70)
    slid(image, (32, 32), predict)
    starts = [(top, left) for top in (0, 16, 32) for left in (0, 16, 32, 48)]
    assert len(asked) == len(starts)
    for (top, left), window in zip(starts, asked, strict=True):
        rows = torch.arange(top, top + 32).clamp_max(49)
        columns = torch.arange(left, left + 32).clamp_max(69)
        assert torch.equal(window[0], image[0][rows][:, columns])


def test_what_lies_beyond_the_image_is_left_out_or_cut() -> None:
    """A window that reaches beyond the image says something there."""

    def predict(windows: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([[24.0, 4, 31, 11, 0.9, 0], [10, 4, 24, 16, 0.8, 0], [0, 0, 0, 0, 0, -1]])
        return rows.expand(len(windows), 3, 6)

    found = slid(torch.zeros(1, 32, 36), (32, 32), predict)  # windows at 0 and 16, which ends at 48
    assert found[:, :4].tolist() == [[10, 4, 24, 16], [26, 4, 36, 16]]


def test_nothing_is_found_where_nothing_is() -> None:
    found = slid(torch.zeros(1, 100, 100), (32, 32))
    assert found.shape == (0, 6)


def test_classes_do_not_suppress_each_other() -> None:
    def predict(windows: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([[2.0, 2, 12, 12, 0.9, 0], [2, 2, 12, 12, 0.8, 1], [2, 2, 12, 11, 0.7, 1]])
        return rows.expand(len(windows), 3, 6)

    found = slid(torch.zeros(1, 32, 32), (32, 32), predict)
    assert found[:, 4:].tolist() == [pytest.approx([0.9, 0]), pytest.approx([0.8, 1])]


@pytest.mark.parametrize("size", [(512, 768), (768, 512)], ids=str)
def test_a_convolutional_network_says_the_same_in_windows_and_in_one_pass(size: tuple[int, int]) -> None:
    """What it says of a place reaches less than the 128 pixels that lie between a seam and a window's border."""
    head = detection.detector("test_resnet", depth=0, detections=300).eval()
    with torch.no_grad():
        head.head.detector.distances.bias.fill_(1.0)
        head.head.detector.distances.weight.mul_(0.3)
    stream = torch.Generator().manual_seed(1)
    image = torch.randn(1, *size, generator=stream)
    with torch.no_grad():
        whole = head(image[None])[0]
    whole = whole[whole[:, 5] >= 0]
    found = slide_boxes(image, (512, 512), head, stride=32, suppress=head.config.overlap)
    assert len(found) > len(whole) > 60, "of a window as many boxes enter suppression as of the whole image"
    ends = whole[:, [0, 2]] if size[1] > size[0] else whole[:, [1, 3]]
    assert ((ends[:, 0] < 384) & (ends[:, 1] > 384)).any(), "some lie across the seam"
    apart = (found[: len(whole), None] - whole).abs().amax(dim=-1)  # the order of nearly equal scores may differ
    assert apart.amin(dim=0).max() < 2e-3
    assert apart.amin(dim=1).max() < 2e-3
