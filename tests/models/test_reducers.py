"""Crops against closed forms and bilinear sampling by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.models.reducers import MARGIN, SIDE, Reducer, crop

Box = tuple[float, float, float, float]


def points(begin: float, end: float) -> list[float]:
    """Middles of seven equal parts of the enlarged side, pixels."""
    middle, side = (begin + end) / 2, (end - begin) * MARGIN
    return [middle - side / 2 + (part + 0.5) * side / SIDE for part in range(SIDE)]


def sampled(plane: list[list[float]], across: float, down: float) -> float:
    """Bilinear between the middles of cells; beyond the map there is 0. Coordinates in cells."""
    total = 0.0
    for row in (math.floor(down - 0.5), math.floor(down - 0.5) + 1):
        for column in (math.floor(across - 0.5), math.floor(across - 0.5) + 1):
            share = (1 - abs(down - 0.5 - row)) * (1 - abs(across - 0.5 - column))
            if 0 <= row < len(plane) and 0 <= column < len(plane[0]):
                total += share * plane[row][column]
    return total


def ramps(rows: int, columns: int, stride: float) -> torch.Tensor:
    """(1, 2, rows, columns): the pixel across and down in the middle of each cell."""
    down, across = ((torch.arange(count, dtype=torch.float64) + 0.5) * stride for count in (rows, columns))
    return torch.stack([across.expand(rows, columns), down[:, None].expand(rows, columns)])[None]


@pytest.mark.parametrize("stride", [4.0, 3.5])
@pytest.mark.parametrize("box", [(20.0, 16.0, 60.0, 30.0), (31.0, 40.0, 32.0, 41.5)])
def test_a_ramp_says_where_it_is_sampled(stride: float, box: Box) -> None:
    taken = crop(ramps(20, 30, stride), torch.tensor([[box]], dtype=torch.float64), stride)
    assert taken.shape == (1, 1, 2, SIDE, SIDE)
    across, down = (torch.tensor(points(*ends), dtype=torch.float64) for ends in (box[::2], box[1::2]))
    torch.testing.assert_close(taken[0, 0, 0], across.expand(SIDE, SIDE))
    torch.testing.assert_close(taken[0, 0, 1], down[:, None].expand(SIDE, SIDE))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-10, 40)] * 2, *[st.floats(0.1, 30)] * 2), min_size=1, max_size=3))
def test_crops_are_bilinear_and_zero_beyond_the_map(drawn: list[Box]) -> None:
    boxes = [(left, top, left + width, top + height) for left, top, width, height in drawn]
    found = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    taken = crop(found, torch.tensor([boxes], dtype=torch.float64), 4.0)
    plane = found[0, 0].tolist()
    for number, box in enumerate(boxes):
        expected = [[sampled(plane, x / 4, y / 4) for x in points(*box[::2])] for y in points(*box[1::2])]
        torch.testing.assert_close(taken[0, number, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_each_image_has_its_own_crops() -> None:
    found = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[2.0, 2, 10, 12], [4, 8, 20, 20]], [[0, 0, 24, 24], [1, 3, 9, 9]]])
    together = crop(found, boxes, 4.0)
    for image in range(2):
        for number in range(2):
            alone = crop(found[image : image + 1], boxes[image : image + 1, number : number + 1], 4.0)
            torch.testing.assert_close(together[image, number], alone[0, 0])


def test_points_of_a_map_in_half_precision_are_not_rounded() -> None:
    """At the far end of 256 cells the numbers of bfloat16 are half a cell apart."""
    stream = torch.Generator().manual_seed(0)
    found = torch.randn(1, 2, 256, 256, generator=stream).bfloat16()
    boxes = torch.tensor([[[900.3, 870.7, 921.1, 893.9]]])
    taken = crop(found, boxes, 4.0)
    torch.testing.assert_close(taken.float(), crop(found.float(), boxes, 4.0), rtol=0.01, atol=0.01)


def test_logits_of_every_box_have_a_gradient_for_map_and_weights() -> None:
    torch.manual_seed(0)
    reducer = Reducer(4, classes=2)
    found = torch.randn(2, 4, 8, 8, requires_grad=True)
    boxes = torch.tensor([[[2.0, 2, 10, 12], [4, 8, 20, 20], [0, 0, 30, 30]]] * 2)
    logits = reducer(found, boxes, 4.0)
    assert logits.shape == (2, 3, 3)
    logits.square().sum().backward()
    assert found.grad is not None
    assert found.grad.any()
    assert all(each.grad is not None and each.grad.any() for each in reducer.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half = reducer(found, boxes, 4.0)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, logits, rtol=0.1, atol=0.05)


def test_padding_without_an_area_is_no_error() -> None:
    reducer = Reducer(4, classes=2)
    logits = reducer(torch.randn(1, 4, 8, 8), torch.zeros(1, 2, 4), 4.0)
    assert torch.isfinite(logits).all()
