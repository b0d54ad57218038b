"""What every method is given: hooks around the performed steps, and a look at the batch size before."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from courses import course
from torch.utils.data import DataLoader

from sslmed.data.loading import Batch
from sslmed.methods.method import Progress
from sslmed.methods.simclr import SimCLR, SimCLRConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.trainer import TrainConfig, build_trainer


class Watched(SimCLR):
    """Notes when its hooks are called, and cancels the gradient of its projector."""

    def __init__(self) -> None:
        super().__init__(SimCLRConfig(hidden=8, out=4), build(BackboneConfig(name="test_resnet"), 32, 0))
        self.calls: list[tuple[str, int, int]] = []

    def before_step(self, progress: Progress) -> None:
        assert all(parameter.grad is not None for parameter in self.parameters())
        self.calls.append(("before", progress.step, progress.epoch))
        for parameter in self.projector.parameters():
            parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        self.calls.append(("after", progress.step, progress.epoch))


def batch(seed: int) -> Batch:
    views = list(torch.randn(2, 2, 1, 32, 32, generator=torch.Generator().manual_seed(seed)))
    ids = torch.arange(2)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


class SkipSecond(pl.Callback):
    """What the guard does at a step that is not finite."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            pl_module.skipped = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        pl_module.skipped = trainer.global_step == 1
        for parameter in pl_module.parameters() if pl_module.skipped else ():
            parameter.grad = None


def test_hooks_come_once_a_performed_step_and_gradients_can_be_cancelled() -> None:
    method = Watched()
    before = [parameter.clone() for parameter in method.projector.parameters()]
    method.prepare(OptimConfig(warmup=0), batch_size=4, total_steps=4, steps_per_epoch=2)
    config = TrainConfig(max_steps=4, batch_size=4, accumulate=2, precision=32, devices="cpu")
    trainer = build_trainer(config, 4, [SkipSecond()])
    trainer.fit(method.train(), DataLoader([batch(seed) for seed in range(8)], batch_size=None))
    assert method.calls == [
        *(("before", 0, 0), ("after", 1, 0)),
        *(("before", 2, 1), ("after", 3, 1)),
        *(("before", 3, 1), ("after", 4, 2)),
    ]
    assert all(torch.equal(one, two) for one, two in zip(before, method.projector.parameters(), strict=True))
    moved = build(BackboneConfig(name="test_resnet"), 32, 0).parameters()
    assert any(not torch.equal(one, two) for one, two in zip(moved, method.backbone.parameters(), strict=True))


@pytest.mark.parametrize("batch_size", [2, 256])
def test_by_default_every_batch_size_is_taken(batch_size: int) -> None:
    Watched().check(course(batch_size))


def test_a_course_counts_epochs_that_are_begun_and_images_that_meet() -> None:
    assert [course(total=total, steps_per_epoch=10).epochs for total in (1, 10, 11)] == [1, 1, 2]
    assert course(64, accumulate=4, processes=2).at_once == 16
