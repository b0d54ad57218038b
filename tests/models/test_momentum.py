"""The moving average against its formula; what it must not touch."""

import math

import pytest
import torch
from torch import nn

from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.momentum import cosine_momentum, follow, follower, momentum_at, momentum_notes


def test_parameters_follow_and_buffers_keep_their_own_statistics() -> None:
    online = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = follower(online)
    before = [parameter.clone() for parameter in average.parameters()]
    with torch.no_grad():
        for parameter in online.parameters():
            parameter += 1
        online[1].running_mean += 5
    follow(average, online, 0.9)
    for old, new in zip(before, average.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * (old + 1), rtol=0, atol=1e-15)
    assert not average[1].running_mean.any()


def test_a_follower_has_no_gradient_no_noise_and_its_own_memory() -> None:
    backbone = build(BackboneConfig(name="test_vit", drop_path=0.3), 32, 0)
    average = follower(nn.Sequential(backbone, nn.Dropout(0.5)))
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert average.training, "its BatchNorm normalises by the batch"
    images = torch.randn(4, 1, 32, 32)
    assert torch.equal(average(images), average(images))
    ours = {parameter.data_ptr() for parameter in average.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in backbone.parameters()}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.996), (250, 1 - 0.004 * (1 + math.sqrt(0.5)) / 2), (500, 0.998), (1000, 1.0)],
)
def test_the_cosine_starts_at_the_base_and_ends_at_one(step: int, expected: float) -> None:
    assert cosine_momentum(0.996, step, 1000) == pytest.approx(expected, abs=1e-15)


def test_the_memory_in_samples_is_that_of_the_reference_batch() -> None:
    samples = 8192
    small, large = momentum_at(64, 0.99, "scaled"), momentum_at(1024, 0.99, "scaled")
    assert small ** (samples / 64) == pytest.approx(0.99 ** (samples / 256), rel=1e-12)
    assert large ** (samples / 1024) == pytest.approx(0.99 ** (samples / 256), rel=1e-12)
    assert small > 0.99 > large


def test_the_memory_is_one_of_samples_or_of_steps() -> None:
    assert momentum_at(256, 0.99, "scaled") == 0.99
    assert momentum_at(512, 0.99, "scaled") == pytest.approx(0.99**2)
    assert momentum_at(64, 0.99, "scaled") == pytest.approx(0.99**0.25)
    assert momentum_at(64, 0.99, "constant") == 0.99


def test_a_changed_momentum_is_said() -> None:
    (note,) = momentum_notes(64, 0.99, "scaled")
    assert "method.momentum 0.99 is quoted for batch 256; at batch 64 it is 0.997491" in note
    assert not momentum_notes(256, 0.99, "scaled")
    assert not momentum_notes(64, 0.99, "constant")
