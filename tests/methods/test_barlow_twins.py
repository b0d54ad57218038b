"""Barlow Twins' details: the cross-correlation, the projector, the share of biases. Its loss: tests/parity."""

from typing import Any

import pytest
import torch
from courses import course
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.methods.barlow_twins import BarlowTwins, BarlowTwinsConfig, barlow_twins_loss, cross_correlation, parts
from sslmed.models.backbones import BackboneConfig, build

SMALL = {"hidden": 32, "out": 16}


def small(**settings: Any) -> BarlowTwins:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0)
    return BarlowTwins(BarlowTwinsConfig(**SMALL | settings), backbone).train()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def uncorrelated(rows: int = 8, columns: int = 4) -> torch.Tensor:
    """Centred columns of unit deviation, orthogonal to each other."""
    orthogonal, _ = torch.linalg.qr(torch.cat([torch.ones(rows, 1).double(), random(rows, columns)], dim=1))
    return orthogonal[:, 1:] * rows**0.5


def test_a_cross_correlation_of_identity_costs_nothing() -> None:
    z = uncorrelated()
    torch.testing.assert_close(cross_correlation(z, z), torch.eye(4).double(), rtol=0, atol=2e-5)  # epsilon
    assert barlow_twins_loss(z, z, 0.0051)["loss"].item() == pytest.approx(0, abs=1e-8)


def test_opposite_views_and_repeated_dimensions_cost_what_the_paper_says() -> None:
    z = uncorrelated()
    assert barlow_twins_loss(z, -z, 0.0051)["loss"].item() == pytest.approx(4 * 2**2, rel=1e-4)
    repeated = z[:, :1].expand(8, 4)
    assert barlow_twins_loss(repeated, repeated, 0.0051)["loss"].item() == pytest.approx(0.0051 * 12, rel=1e-4)


def test_neither_shift_nor_scale_of_a_dimension_matters() -> None:
    a, b = random(2, 8, 4)
    moved = 5 + torch.tensor([10.0, 20.0, -30.0, 40.0]).double() * a
    expected = cross_correlation(a, b) * torch.tensor([1.0, 1.0, -1.0, 1.0]).double()[:, None]
    torch.testing.assert_close(cross_correlation(moved, b), expected, rtol=0, atol=1e-4)


def test_a_constant_dimension_correlates_with_nothing() -> None:
    z = random(8, 4)
    z[:, 2] = 7
    z.requires_grad_()
    loss = barlow_twins_loss(z, z.detach(), 0.0051)["loss"]
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert not cross_correlation(z, z)[2].any()


def test_it_is_no_mean_over_dimensions() -> None:
    """The reference sums; lightly and this do too."""
    matrix = torch.full((5, 5), 0.5)
    assert [part.item() for part in parts(matrix)] == [5 * 0.25, 20 * 0.25]


def test_the_projector_is_the_references() -> None:
    method = small()
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(part) for part in method.projector] == [*hidden, *hidden, nn.Linear]
    assert all(part.bias is None for part in method.projector if isinstance(part, nn.Linear))
    knobs = BarlowTwinsConfig()
    assert (knobs.redundancy, knobs.hidden, knobs.out, knobs.bias_share) == (0.0051, 8192, 8192, 1.0)


def test_biases_and_norms_have_their_share_of_the_rate() -> None:
    method = small(bias_share=0.024)
    weights, rest = method.parameter_groups(1e-6)
    assert "share" not in weights
    assert rest["share"] == 0.024
    assert all(parameter.ndim <= 1 for parameter in rest["params"])
    assert len(weights["params"]) + len(rest["params"]) == len(list(method.parameters()))


def test_its_parts_are_logged_unweighted() -> None:
    method, ids = small(redundancy=0.5), torch.arange(8)
    views = list(torch.randn(2, 8, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    found = method.loss(Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0))
    torch.testing.assert_close(found["loss"], found["invariance"] + 0.5 * found["redundancy"])


def test_views_are_byols_where_solarisation_is_legal() -> None:
    first, second = small().views(MODALITIES["photo"])
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    xray, photo = MODALITIES["xray"], MODALITIES["photo"]
    assert small().views(xray) == (xray.view, xray.view)
    assert small(asymmetric=False).views(photo) == (photo.view, photo.view)
    assert "replace views.blur" in small().notes(with_views(photo, {"blur": 0.0}), course(256))[0]
    assert not small().notes(xray, course(256))
