"""What all heads share: who is trained from when on, at which rate, and in which mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sslmed.data.loading import Batch
from sslmed.heads.classification import Classification, ClassificationConfig
from sslmed.heads.head import HeadConfig, full
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.checkpoint import Checkpointer
from sslmed.training.signals import SignalWatch
from sslmed.training.trainer import TrainConfig, build_trainer


def make(network: str = "test_resnet", **settings: object) -> Classification:
    torch.manual_seed(0)
    head = Classification(ClassificationConfig(**settings), build(BackboneConfig(name=network), 32, 0), 2, "class")
    with torch.no_grad():
        head.head[-1].weight.normal_(std=0.1)
    return head


class Stream:
    """Batches ``start`` to ``total`` of always the same stream."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.start, self.total):
            images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(number))
            ids = torch.arange(4)
            yield Batch([images], ids % 2, ids, ids, 0, 0)


class Modes(pl.Callback):
    """Whether the backbone is in training mode in each batch, and has gradients before each zeroing of them."""

    def __init__(self) -> None:
        self.training: list[bool] = []
        self.gradients: list[bool] = []

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(any(each.grad is not None for each in pl_module.backbone.parameters()))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.training.append(pl_module.backbone.network.bn1.training)


def train(
    head: Classification, steps: int, callbacks: list[pl.Callback], accumulate: int = 1, done: int = 0, **how: Any
) -> None:
    config = TrainConfig(max_steps=steps, batch_size=12, accumulate=accumulate, precision=32, devices="cpu")
    head.prepare(OptimConfig(lr=0.01, warmup=0.2), 12, steps, 1)
    stream = Stream(steps * accumulate, done * accumulate)
    keeper = next((each for each in callbacks if isinstance(each, Checkpointer)), None)
    trainer = build_trainer(config, steps, callbacks)
    if keeper is None:
        trainer.fit(head.train(), stream, weights_only=True, **how)
    else:
        with keeper.signals:
            trainer.fit(head.train(), stream, weights_only=True, **how)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_probe_steps_are_the_optimizers(accumulate: int) -> None:
    head, modes = make(probe_steps=3), Modes()
    train(head, 5, [modes], accumulate)
    assert modes.training == [False] * 3 * accumulate + [True] * 2 * accumulate
    assert modes.gradients == [False] * 4 + [True], (
        "what the step before has left: the fourth is the first to leave some"
    )
    assert head.monitored["loss"].isfinite()
    assert not head.monitored["loss"].requires_grad


def test_a_frozen_backbone_stays_in_evaluation_mode() -> None:
    head, modes = make(frozen="all"), Modes()
    train(head, 2, [modes])
    assert modes.training == [False, False]
    assert not any(modes.gradients)
    head.train()
    assert not any(module.training for module in head.backbone.network.modules())
    assert head.head.training


def test_frozen_layers_keep_evaluation_mode_and_others_do_not() -> None:
    head = make(frozen=1).train()
    assert not head.backbone.network.bn1.training
    assert head.backbone.network.layer4[0].bn1.training
    assert head.backbone.training


class Killed(Exception):
    pass


class Kill(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("killed", [2, 5])
def test_killed_in_the_probe_or_after_it_and_resumed(killed: int, tmp_path: Path) -> None:
    """The same weights bit for bit, though the backbone's have no optimizer state during the probe."""
    settings = {"probe_steps": 4, "layer_decay": 0.7, "frozen": 1}
    whole = make(**settings)
    train(whole, 8, [])
    path = tmp_path / "last.ckpt"
    keeper = Checkpointer(path, 1, SignalWatch())
    with pytest.raises(Killed):
        train(make(**settings), 8, [Kill(killed), keeper])
    part = make(**settings)
    train(part, 8, [Checkpointer(path, 1, SignalWatch())], done=killed, ckpt_path=path)
    after, expected = part.state_dict(), whole.state_dict()
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_the_head_and_what_is_trained_of_the_backbone_are_in_one_group_each() -> None:
    for settings in ({}, {"frozen": 2}, {"layer_decay": 0.5}, {"frozen": 2, "layer_decay": 0.5}, {"frozen": "all"}):
        head = make(probe_steps=7, **settings)
        groups = head.parameter_groups(0.1)
        members = [id(parameter) for group in groups for parameter in group["params"]]
        assert len(members) == len(set(members))
        assert set(members) == {id(value) for value in head.parameters() if value.requires_grad}
        assert all(group["params"] for group in groups)
        own = {id(value) for value in head.head.parameters()}
        for group in groups:
            of_head = {id(value) in own for value in group["params"]}
            assert len(of_head) == 1
            assert (group.get("begin", 0), group.get("share", 1.0) == 1.0) == (
                (0, True) if of_head == {True} else (7, "layer_decay" not in settings or group["share"] == 1.0)
            )


def test_class_weights_and_the_temperature_are_not_saved_with_the_weights() -> None:
    head = make(balance="weights")
    keys = set(head.state_dict())
    head.balance(torch.tensor([3, 5]))
    head.temperature = 3.0
    assert set(head.state_dict()) == keys
    assert head.double().weights.dtype == torch.float64, "a buffer, which moves with the module"


def test_full_never_narrows() -> None:
    for given, expected in (("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64",) * 2):
        assert full(torch.zeros(1, dtype=getattr(torch, given))).dtype == getattr(torch, expected)


@pytest.mark.parametrize(
    "settings",
    [{"frozen": -1}, {"frozen": "some"}, {"probe_steps": -1}, {"layer_decay": 0}, {"layer_decay": 1.1}, {"ema": 1}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        HeadConfig(**settings)
