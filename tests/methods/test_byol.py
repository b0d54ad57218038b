"""BYOL's details: heads, views, batch statistics, and when the target moves. Its loss: tests/parity."""

import pytest
import pytorch_lightning as pl
import torch
from courses import course
from torch import nn
from torch.utils.data import DataLoader

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.methods.byol import BYOL, BYOLConfig
from sslmed.methods.method import Progress
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.trainer import TrainConfig, build_trainer

SMALL = {"hidden": 32, "out": 16}


def small(**settings: object) -> BYOL:
    torch.manual_seed(0)
    return BYOL(BYOLConfig(**SMALL | settings), build(BackboneConfig(name="test_resnet"), 32, 0))


def batch(rows: int = 4, seed: int = 0) -> Batch:
    views = list(torch.randn(2, rows, 1, 32, 32, generator=torch.Generator().manual_seed(seed)))
    ids = torch.arange(rows)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def test_the_heads_are_the_references() -> None:
    method = small()
    for head in (method.projector, method.predictor):
        assert [type(part) for part in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [part.bias is not None for part in head if isinstance(part, nn.Linear)] == [True, False]
    assert [method.projector[0].in_features, method.projector[3].out_features] == [method.backbone.num_features, 16]
    assert [method.predictor[0].in_features, method.predictor[3].out_features] == [16, 16]
    assert (BYOLConfig().hidden, BYOLConfig().out) == (4096, 256)


def test_no_gradient_reaches_the_target_and_its_batch_statistics_are_its_own() -> None:
    method = small().train()
    method.loss(batch())["loss"].backward()
    average = method.averaged[1]
    assert all(parameter.grad is None for parameter in average.parameters())
    assert method.target_projector[1].running_mean.abs().sum() > 0, "the target runs in training mode"


@pytest.mark.parametrize("pooled", [False, True])
def test_batchnorm_sees_each_view_alone_unless_told_otherwise(pooled: bool) -> None:
    method, data = small(pool_batchnorm=pooled), batch()
    seen: list[int] = []
    for part in (method.projector[1], method.predictor[1], method.target_projector[1]):
        part.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    method.loss(data)
    assert seen == ([8] * 3 if pooled else [4] * 6)


def test_views_are_asymmetric_where_solarisation_is_legal() -> None:
    first, second = small().views(MODALITIES["photo"])
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    xray = MODALITIES["xray"]
    assert small().views(xray) == (xray.view, xray.view)
    photo = MODALITIES["photo"]
    assert small(asymmetric=False).views(photo) == (photo.view, photo.view)


def test_the_momentum_is_rescaled_with_the_batch_and_said() -> None:
    method, xray = small(momentum=0.99), MODALITIES["xray"]
    (note,) = method.notes(xray, course(64))
    assert "0.99 is quoted for batch 256; at batch 64 it is 0.997491" in note
    assert not method.notes(xray, course(256))
    photo = with_views(MODALITIES["photo"], {"blur": 0.0})
    assert "replace views.blur; method.asymmetric=false" in method.notes(photo, course(256))[0]
    assert not small(asymmetric=False).notes(photo, course(256))
    assert not method.notes(MODALITIES["photo"], course(256))
    assert not small(momentum_rule="constant").notes(xray, course(64))


@pytest.mark.parametrize("step", [1, 50, 100])
def test_the_target_follows_by_the_formula_at_first_middle_and_last_step(step: int) -> None:
    method = small(momentum=0.9, momentum_rule="constant")
    with torch.no_grad():
        for parameter in [*method.backbone.parameters(), *method.projector.parameters()]:
            parameter += 1
    online, average = method.averaged
    pairs = [(a.clone(), o.clone()) for a, o in zip(average.parameters(), online.parameters(), strict=True)]
    method.after_step(Progress(step, 100, 0, 256))
    momentum = 1 - 0.1 * (torch.cos(torch.tensor((step - 1) / 100 * torch.pi, dtype=torch.float64)) + 1) / 2
    for (old, target), new in zip(pairs, average.parameters(), strict=True):
        torch.testing.assert_close(new, (momentum * old + (1 - momentum) * target).float())


def test_the_target_moves_only_after_performed_steps() -> None:
    method = small(momentum=0.5, momentum_rule="constant")
    method.prepare(OptimConfig(warmup=0), batch_size=8, total_steps=2, steps_per_epoch=2)
    moved: list[bool] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            self.before = [p.clone() for p in method.target_backbone.parameters()]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            after = method.target_backbone.parameters()
            moved.append(any(not torch.equal(a, b) for a, b in zip(self.before, after, strict=True)))

    config = TrainConfig(max_steps=2, batch_size=8, accumulate=4, precision=32, devices="cpu")
    trainer = build_trainer(config, 2, [Watch()])
    trainer.fit(method.train(), DataLoader([batch(2, seed) for seed in range(8)], batch_size=None))
    assert moved == [False, False, False, True] * 2
