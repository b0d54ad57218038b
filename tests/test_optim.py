"""The schedule in performed steps, the learning-rate rules and who decays."""

import math

import pytest
import torch
from torch import nn

from sslmed.optim import OptimConfig, build_optimizer, decay_groups, warmup_cosine


def test_warm_up_climbs_from_zero_and_the_cosine_ends_at_the_final_rate() -> None:
    factor = warmup_cosine(OptimConfig(warmup=0.1, final_lr=0.2), total_steps=100)
    assert [factor(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert factor(55) == pytest.approx(0.2 + 0.8 * 0.5)
    assert factor(100) == pytest.approx(0.2)
    assert factor(200) == pytest.approx(0.2), "never up again"


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert warmup_cosine(OptimConfig(warmup=0), 10)(0) == 1.0


@pytest.mark.parametrize(("rule", "expected"), [("constant", 0.3), ("linear", 0.3 * 4), ("sqrt", 0.3 * 2)])
def test_learning_rate_rules(rule: str, expected: float) -> None:
    assert OptimConfig(lr=0.3, lr_rule=rule).peak_lr(1024) == pytest.approx(expected)


def test_simclr_reference_square_root_rule() -> None:
    # arXiv 2002.05709, appendix B.1: 0.075 x sqrt(batch), which is 1.2 x sqrt(batch / 256)
    assert OptimConfig(lr=1.2, lr_rule="sqrt").peak_lr(4096) == pytest.approx(0.075 * math.sqrt(4096))


def test_biases_and_norm_layers_do_not_decay() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decayed, spared = decay_groups([network], 0.1)
    assert {tuple(p.shape) for p in decayed["params"]} == {(4, 1, 3, 3), (2, 4)}
    assert len(spared["params"]) == 4
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_get_no_group() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    assert all(not group["params"] for group in decay_groups([layer], 0.1))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_alone_shrinks_weights_and_spares_biases(name: str) -> None:
    layer = nn.Linear(3, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.1), decay_groups([layer], 0.5), 256)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert layer.weight.norm() < before[0].norm()
    assert torch.equal(layer.bias, before[1])
