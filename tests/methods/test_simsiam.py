"""SimSiam's details: heads, stop-gradient, rates and decay. Its loss: tests/parity."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES
from sslmed.methods.simsiam import SimSiam, SimSiamConfig, symmetric_loss
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig, scheduled

SMALL = {"hidden": 32, "out": 16, "bottleneck": 8}


def small(**settings: Any) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam(SimSiamConfig(**SMALL | settings), build(BackboneConfig(name="test_resnet"), 32, 0)).train()


def batch(rows: int = 8) -> Batch:
    views = list(torch.randn(2, rows, 1, 32, 32, generator=torch.Generator().manual_seed(0)))
    ids = torch.arange(rows)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def test_the_heads_are_the_references() -> None:
    method = small()
    hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(part) for part in method.projector] == [*hidden, *hidden, nn.Linear, nn.BatchNorm1d]
    assert all(part.bias is None for part in method.projector if isinstance(part, nn.Linear))
    assert not method.projector[-1].affine
    assert [type(part) for part in method.predictor] == [*hidden, nn.Linear]
    assert [part.bias is None for part in method.predictor if isinstance(part, nn.Linear)] == [True, False]
    assert [method.predictor[0].out_features, method.predictor[3].out_features] == [8, 16]
    knobs = SimSiamConfig()
    assert (knobs.hidden, knobs.out, knobs.bottleneck) == (2048, 2048, 512)


def test_no_gradient_reaches_the_projection_that_is_predicted() -> None:
    p1, p2, z1, z2 = (torch.randn(8, 4, requires_grad=True) for _ in range(4))
    symmetric_loss(p1, p2, z1, z2).backward()
    assert p1.grad is not None
    assert p2.grad is not None
    assert z1.grad is None
    assert z2.grad is None


def test_the_loss_is_minus_one_where_predictions_are_right() -> None:
    z = torch.randn(8, 4, dtype=torch.float64)
    assert symmetric_loss(3 * z, z, z, 2 * z).item() == pytest.approx(-1)
    assert symmetric_loss(-z, -z, z, z).item() == pytest.approx(1)


@pytest.mark.parametrize("stopped", [True, False])
def test_without_stopping_the_gradient_it_collapses(stopped: bool) -> None:
    """Figure 2 of the paper on a toy: the spread of normalised outputs stays near 1 / sqrt(d), or goes to 0."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    width = 8
    encoder = nn.Sequential(
        nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Linear(64, width, bias=False)
    )
    predictor = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, width))
    optimizer = torch.optim.SGD([*encoder.parameters(), *predictor.parameters()], lr=0.1, momentum=0.9)
    for _ in range(200):
        images = torch.randn(64, width, generator=generator)
        views = [images + 0.3 * torch.randn(64, width, generator=generator) for _ in range(2)]
        z1, z2 = encoder(views[0]), encoder(views[1])
        p1, p2 = predictor(z1), predictor(z2)
        if stopped:
            loss = symmetric_loss(p1, p2, z1, z2)
        else:
            loss = -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spread = F.normalize(z1.detach(), dim=1).std(dim=0).mean().item() * math.sqrt(width)
    assert spread > 0.8 if stopped else spread < 0.15
    assert loss < -0.99 or stopped


def test_outputs_begin_spread_out() -> None:
    z = small().loss(batch(64))["embeddings"]
    assert F.normalize(z, dim=1).std(dim=0).mean().item() == pytest.approx(1 / math.sqrt(16), rel=0.2)


def test_everything_decays_and_the_predictors_rate_stays() -> None:
    method = small()
    groups = method.parameter_groups(1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-4, 1e-4]
    assert groups[1]["params"] == list(method.predictor.parameters())
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))
    made = scheduled(OptimConfig(name="sgd", lr=0.05, lr_rule="linear", warmup=0.2), groups, 512, 10)
    schedule, rates = made["lr_scheduler"]["scheduler"], []
    for _ in range(10):
        rates.append(schedule.get_last_lr())
        made["optimizer"].step()
        schedule.step()
    assert {rate for _, rate in rates} == {0.1}
    assert rates[0][0] == 0
    assert rates[2][0] == 0.1
    assert rates[9][0] < 0.01


def test_both_views_follow_the_modality() -> None:
    for modality in MODALITIES.values():
        assert small().views(modality) == (modality.view, modality.view)
