"""VICReg's details: its three parts, the half on the variance, the expander. Its loss: tests/parity."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from courses import course
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES
from sslmed.methods.vicreg import VICReg, VICRegConfig, covariance, lack_of_spread, parts, vicreg_loss
from sslmed.models.backbones import BackboneConfig, build

SMALL = {"hidden": 32, "out": 16}
WEIGHTS = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


def small(**settings: Any) -> VICReg:
    torch.manual_seed(0)
    return VICReg(VICRegConfig(**SMALL | settings), build(BackboneConfig(name="test_resnet"), 32, 0)).train()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_collapse_costs_the_variance_alone() -> None:
    z = torch.full((8, 4), 3.0, dtype=torch.float64, requires_grad=True)
    loss = vicreg_loss(z, z, **WEIGHTS)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(25 * (1 - 0.01))  # sqrt(1e-4), the mean of both views
    assert torch.isfinite(z.grad).all()


def test_spread_out_and_uncorrelated_embeddings_cost_nothing() -> None:
    orthogonal, _ = torch.linalg.qr(torch.cat([torch.ones(8, 1).double(), random(8, 4)], dim=1))
    z = orthogonal[:, 1:] * 7**0.5  # unbiased variance 1
    assert [part.item() for part in parts(z, z)] == pytest.approx([0, 0, 0], abs=1e-12)
    assert lack_of_spread(3 * z) == 0, "more spread than 1 is not held against it"
    assert lack_of_spread(z / 2).item() == pytest.approx(1 - (0.25 + 1e-4) ** 0.5)


def test_repeated_dimensions_cost_their_covariance_over_their_number() -> None:
    column = random(8, 1)
    z = column.expand(8, 5)
    assert covariance(z).item() == pytest.approx(column.var().item() ** 2 * 20 / 5)


def test_the_variance_term_is_halved() -> None:
    """solo-learn leaves the half out: the same tensors then cost one variance term more."""
    a, b = 0.3 * random(2, 16, 6)
    official = vicreg_loss(a, b, **WEIGHTS)["loss"]
    hinges = [F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() for z in (a, b)]
    solo = 25 * F.mse_loss(a, b) + 25 * sum(hinges) + covariance(a) + covariance(b)
    assert (solo - official).item() == pytest.approx(25 * sum(hinges).item() / 2)
    assert vicreg_loss(a, b, **WEIGHTS | {"variance": 50.0})["loss"].item() == pytest.approx(solo.item())


def test_the_expander_is_the_references() -> None:
    method = small()
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(part) for part in method.expander] == [*hidden, *hidden, nn.Linear]
    assert [part.bias is not None for part in method.expander if isinstance(part, nn.Linear)] == [True, True, False]
    knobs = VICRegConfig()
    assert (knobs.invariance, knobs.variance, knobs.covariance, knobs.hidden, knobs.out) == (25, 25, 1, 8192, 8192)


def test_its_parts_are_logged_unweighted() -> None:
    method, ids = small(invariance=3.0, variance=2.0, covariance=0.5), torch.arange(8)
    views = list(torch.randn(2, 8, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    found = method.loss(Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0))
    expected = 3 * found["invariance"] + 2 * found["variance"] + 0.5 * found["covariance"]
    torch.testing.assert_close(found["loss"], expected)


def test_views_are_byols_where_solarisation_is_legal() -> None:
    first, second = small().views(MODALITIES["photo"])
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    xray, photo = MODALITIES["xray"], MODALITIES["photo"]
    assert small().views(xray) == (xray.view, xray.view)
    assert small(asymmetric=False).views(photo) == (photo.view, photo.view)
    assert not small().notes(xray, course(256))
