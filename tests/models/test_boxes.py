"""Overlaps, the GIoU loss and suppression against slow references written box by box."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.models.boxes import giou_loss, iou, nms, nms_of_many

Box = tuple[float, float, float, float]
SOME = settings(max_examples=60, deadline=None)


@st.composite
def box(draw: st.DrawFn) -> Box:
    """On a grid of eighths, so that equal boxes, shared edges and boxes within boxes come up."""
    left, top = (draw(st.integers(-20, 20)) / 8 for _ in range(2))
    width, height = (draw(st.integers(1, 40)) / 8 for _ in range(2))
    return left, top, left + width, top + height


def slow_iou(a: Box, b: Box) -> tuple[float, float, float]:
    """IoU, the union, and the smallest box around both."""
    wide = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    high = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (a, b)]
    union = sum(areas) - wide * high
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return wide * high / union, union, hull


def slow_nms(boxes: Sequence[Box], scores: Sequence[float], classes: Sequence[int], threshold: float) -> list[bool]:
    kept: list[int] = []
    for number in sorted(range(len(boxes)), key=lambda each: (-scores[each], each)):
        rivals = [other for other in kept if classes[other] == classes[number]]
        if all(slow_iou(boxes[other], boxes[number])[0] <= threshold for other in rivals):
            kept.append(number)
    return [number in kept for number in range(len(boxes))]


def tensor(boxes: Sequence[Box]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)


@SOME
@given(st.lists(box(), max_size=5), st.lists(box(), max_size=5))
def test_iou_of_each_with_each(first: list[Box], second: list[Box]) -> None:
    found = iou(tensor(first), tensor(second))
    assert found.shape == (len(first), len(second))
    expected = [[slow_iou(a, b)[0] for b in second] for a in first]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).reshape(found.shape))


@SOME
@given(box(), box())
def test_the_giou_loss_by_value_and_gradient(a: Box, b: Box) -> None:
    found, truth = tensor([a]).requires_grad_(), tensor([b])
    loss = giou_loss(found, truth)
    share, union, hull = slow_iou(a, b)
    assert loss.item() == pytest.approx(1 - share + (hull - union) / hull)
    if len({*a, *b}) == 8:  # where no edges coincide, the loss has a gradient
        assert torch.autograd.gradcheck(lambda each: giou_loss(each, truth), found)


def test_giou_of_identical_boxes_and_of_boxes_far_apart() -> None:
    one = tensor([(0, 0, 2, 3)])
    assert giou_loss(one, one).item() == 0
    assert giou_loss(one, one + 1e6).item() == pytest.approx(2, abs=1e-5)


@SOME
@given(st.data(), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_suppression_is_greedy(data: st.DataObject, threshold: float) -> None:
    boxes = data.draw(st.lists(box(), max_size=12))
    scores = data.draw(st.lists(st.integers(0, 4), min_size=len(boxes), max_size=len(boxes)))
    classes = data.draw(st.lists(st.integers(0, 1), min_size=len(boxes), max_size=len(boxes)))
    kept = nms(tensor(boxes), torch.tensor(scores, dtype=torch.float32), torch.tensor(classes), threshold)
    assert kept.tolist() == slow_nms(boxes, scores, classes, threshold)


def test_suppression_along_a_chain_takes_as_many_rounds_as_boxes() -> None:
    chain = [(4.0 * number, 0.0, 4.0 * number + 10, 10.0) for number in range(31)]  # neighbours overlap by 0.43
    scores = torch.arange(31, 0, -1, dtype=torch.float32)
    kept = nms(tensor(chain), scores, torch.zeros(31, dtype=torch.int64), 0.3)
    assert kept.tolist() == [number % 2 == 0 for number in range(31)]


@SOME
@given(st.integers(0, 2**31), st.sampled_from([3, 7, 64]))
def test_suppression_of_many_is_the_same(seed: int, block: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    corners = torch.rand(40, 2, generator=stream) * 8
    boxes = torch.cat([corners, corners + 1 + torch.rand(40, 2, generator=stream) * 4], dim=-1)
    scores = torch.randint(0, 9, (40,), generator=stream) / 8
    classes = torch.randint(0, 2, (40,), generator=stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslmed.models.boxes._BLOCK", block)
        assert torch.equal(nms_of_many(boxes, scores, classes, 0.3), nms(boxes, scores, classes, 0.3))


def test_suppression_of_a_batch_is_that_of_each_image() -> None:
    stream = torch.Generator().manual_seed(0)
    corners = torch.rand(3, 20, 2, generator=stream) * 10
    boxes = torch.cat([corners, corners + 1 + torch.rand(3, 20, 2, generator=stream) * 4], dim=-1)
    scores, classes = torch.rand(3, 20, generator=stream), torch.randint(0, 2, (3, 20), generator=stream)
    together = nms(boxes, scores, classes, 0.3)
    assert 0 < together.sum() < 60
    for number in range(3):
        alone = nms(boxes[number], scores[number], classes[number], 0.3)
        assert torch.equal(together[number], alone)


def test_identical_boxes_leave_the_first_of_each_class() -> None:
    same = tensor([(0, 0, 1, 1)] * 4)
    kept = nms(same, torch.tensor([0.5, 0.7, 0.7, 0.1]), torch.tensor([0, 0, 0, 1]), 0.5)
    assert kept.tolist() == [False, True, False, True]


def test_no_boxes_at_all() -> None:
    none = torch.zeros(2, 0, 4)
    assert iou(none, torch.ones(2, 0, 4)).shape == (2, 0, 0)
    assert giou_loss(none, none).shape == (2, 0)
    assert nms(none, none[..., 0], none[..., 0].long(), 0.5).shape == (2, 0)


@pytest.mark.parametrize(
    "wrong", [(0, 0, 0, 1), (0, 0, 1, 0), (2, 0, 1, 1), (0, 2, 1, 1), (float("nan"), 0, 1, 1)], ids=str
)
def test_boxes_without_area_are_refused(wrong: Box) -> None:
    good, bad = tensor([(0, 0, 1, 1)]), tensor([wrong])
    for call in (
        lambda: iou(good, bad),
        lambda: iou(bad, good),
        lambda: giou_loss(bad, good),
        lambda: giou_loss(good, bad),
        lambda: nms(bad, torch.ones(1), torch.zeros(1), 0.5),
    ):
        with pytest.raises(ValueError, match="no area"):
            call()
