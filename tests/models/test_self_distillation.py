"""Head, centre and schedules of self-distillation against closed forms. The losses: tests/parity."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslmed.models.self_distillation import Centre, DistillationConfig, DistillationHead, entropy, targets

SMALL = DistillationConfig(out=7, hidden=16, bottleneck=5)


def test_the_temperature_climbs_epoch_by_epoch_as_in_the_reference() -> None:
    config = DistillationConfig(first_temperature=0.04, teacher_temperature=0.07, warmup_epochs=4)
    expected = [*torch.linspace(0.04, 0.07, 4, dtype=torch.float64).tolist(), 0.07, 0.07]
    assert [config.temperature(epoch) for epoch in range(6)] == pytest.approx(expected)
    at_once = DistillationConfig(warmup_epochs=0)
    assert at_once.temperature(0) == 0.07
    assert DistillationConfig(warmup_epochs=1).temperature(0) == 0.04


def test_the_head_is_the_references() -> None:
    head = DistillationHead(12, SMALL)
    assert [type(part) for part in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    widths = [tuple(part.weight.shape) for part in head.mlp if isinstance(part, nn.Linear)]
    assert widths == [(16, 12), (16, 16), (5, 16)]
    assert not any(part.bias.any() for part in head.mlp if isinstance(part, nn.Linear))
    wide = DistillationHead(512, DistillationConfig(out=4, hidden=512))
    assert wide.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert list(head.state_dict())[-1] == "last.weight"
    assert head.last.bias is None


def test_batchnorm_stands_before_each_activation_and_sees_all_views_together() -> None:
    head = DistillationHead(12, SMALL, batchnorm=True)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert [type(part) for part in head.mlp] == [*kinds, *kinds, nn.Linear]
    features = torch.randn(3, 4, 12)
    together = head(features)
    torch.testing.assert_close(together, head(features.flatten(0, 1)).unflatten(0, (3, 4)))
    assert not torch.allclose(together[0], head(features[0]))


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_the_last_layer_is_torchs_weight_norm_by_value_and_gradient(norm_last_layer: bool) -> None:
    config = SMALL.model_copy(update={"norm_last_layer": norm_last_layer})
    head = DistillationHead(12, config).double()
    features = torch.randn(6, 12, dtype=torch.float64)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False).double(), dim=0)
    with torch.no_grad():
        layer.parametrizations.weight.original1.copy_(head.last.weight)
        layer.parametrizations.weight.original0.fill_(1)
    expected = layer(F.normalize(head.mlp(features), dim=-1))
    found = head(features)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() <= 1
    weights = torch.randn(6, 7, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(head.last.weight.grad, layer.parametrizations.weight.original1.grad)
    if norm_last_layer:
        assert head.lengths is None
    else:
        torch.testing.assert_close(head.lengths.grad, layer.parametrizations.weight.original0.grad)


def test_logits_are_fp32_under_autocast() -> None:
    head = DistillationHead(12, SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(2, 3, 12)).dtype == torch.float32
    assert head(torch.randn(2, 3, 12)).shape == (2, 3, 7)


def test_the_centre_is_the_moving_average_of_means() -> None:
    centre, module = Centre(3, 0.9), nn.Linear(1, 1)
    first, second = torch.randn(4, 2, 3), torch.randn(2, 3)
    centre.note(module, first)
    assert not centre.value.any()
    module.weight.grad = torch.zeros(1, 1)  # the second part of a step
    centre.note(module, second)
    centre.move()
    mean = torch.cat([first.flatten(0, 1), second]).mean(dim=0)
    torch.testing.assert_close(centre.value, 0.1 * mean)
    centre.move()
    torch.testing.assert_close(centre.value, 0.1 * mean, msg="nothing was noted")
    assert list(centre.state_dict()) == ["value"]


def test_a_constant_shift_of_the_teacher_and_its_centre_changes_nothing() -> None:
    teacher, shift = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(targets(teacher + shift, shift, 0.04), targets(teacher, zero, 0.04))


def test_entropy_is_zero_for_one_outcome_and_the_logarithm_for_all_alike() -> None:
    assert entropy(torch.eye(4)).item() == 0
    assert entropy(torch.full((2, 4), 0.25)).item() == pytest.approx(math.log(4))
