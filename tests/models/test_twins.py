"""Which rows find their own."""

import torch

from sslmed.models.twins import twin_accuracy


def test_it_counts_nearest_twins_and_a_collapse_has_none() -> None:
    points = torch.eye(4)
    assert twin_accuracy(points, 3 * points) == 1
    assert twin_accuracy(points, points[[1, 0, 2, 3]]) == 0.5
    assert twin_accuracy(torch.ones(4, 3), torch.ones(4, 3)) == 0


def test_it_tells_a_tight_cluster_apart_under_bf16() -> None:
    points = 1 + 0.02 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert twin_accuracy(points, points) == 1
