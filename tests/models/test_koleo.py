"""KoLeo on points whose distances are known, on the same points, and among patients. Its formula: tests/parity."""

import math

import pytest
import torch

from sslmed.models.koleo import LEAST_DISTANCE, koleo


def test_points_evenly_around_a_circle() -> None:
    angles = torch.arange(6, dtype=torch.float64) * math.pi / 3
    points = 7 * torch.stack([angles.cos(), angles.sin()], dim=1)  # neighbours are 1 apart on the unit circle
    assert koleo(points).item() == pytest.approx(0, abs=1e-12)


def test_its_gradient_pushes_neighbours_apart() -> None:
    points = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    koleo(points).backward()
    with torch.no_grad():
        moved = points - 0.01 * points.grad
    assert koleo(moved) < koleo(points)
    assert moved[0, 1] > points[0, 1]
    assert moved[1, 1] < points[1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_points_that_are_the_same_are_finite_and_have_no_gradient(dtype: torch.dtype) -> None:
    points = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    loss = koleo(points)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-math.log(LEAST_DISTANCE))
    assert not points.grad.any()
    zero = torch.zeros(3, 8, requires_grad=True)
    koleo(zero).backward()
    assert torch.isfinite(zero.grad).all()


def test_rows_of_a_group_are_not_neighbours_and_a_row_without_others_counts_nothing() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0]])
    groups = torch.tensor([0, 0, 1, 2])
    root = -math.log(math.sqrt(2))
    assert koleo(points, groups).item() == pytest.approx(root, abs=0.01)
    assert koleo(points).item() > 2
    assert koleo(points, torch.zeros(4, dtype=torch.int64)).item() == 0
    assert koleo(points[:1]).item() == 0
