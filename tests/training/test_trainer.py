import logging
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sslmed.config import UsageError
from sslmed.training.checkpoint import DurableCheckpointIO
from sslmed.training.trainer import TrainConfig, build_trainer, lightning_precision

BF16, FP32 = "bf16-mixed", "32-true"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def pretend(gpu: bool, bf16: bool) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return including_emulation or bf16  # every GPU has it by emulation, which is slow

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": bf16, "avx512_bf16": True})

    return pretend


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("bf16", "precision"), [(True, BF16), (False, FP32)])
def test_auto_takes_bf16_only_where_the_hardware_multiplies_it(
    gpu: bool, bf16: bool, precision: str, machine: Any
) -> None:
    machine(gpu, bf16)
    assert lightning_precision(TrainConfig(precision="auto")) == precision
    assert lightning_precision(TrainConfig(precision="bf16")) == BF16
    assert lightning_precision(TrainConfig(precision=32)) == FP32


def test_auto_on_a_torch_that_names_no_capabilities(monkeypatch: pytest.MonkeyPatch, machine: Any) -> None:
    machine(gpu=False, bf16=True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert lightning_precision(TrainConfig(precision="auto")) == FP32


def test_auto_knows_this_machine() -> None:
    has_amx = not torch.cuda.is_available() and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    if not torch.cuda.is_available():
        assert lightning_precision(TrainConfig(precision="auto")) == (BF16 if has_amx else FP32)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (TrainConfig(batch_size=8), 100 * 12),
        (TrainConfig(epochs=3, batch_size=8), 36),
        (TrainConfig(epochs=3, batch_size=100), 3),
        (TrainConfig(max_steps=7, batch_size=8), 7),
        (TrainConfig(epochs=2, batch_size=8, accumulate=4), 24),  # steps are the optimizer's
    ],
)
def test_total_steps_of_a_hundred_images(config: TrainConfig, steps: int) -> None:
    assert config.total_steps(100) == steps


def test_fewer_images_than_a_step_needs() -> None:
    for config in (TrainConfig(batch_size=101), TrainConfig(batch_size=101, max_steps=5)):
        with pytest.raises(UsageError, match=r"train\.batch_size=100 or less"):
            config.total_steps(100)
    for images in (0, 1):  # recipes allow no batch of one
        with pytest.raises(UsageError, match=f"there are {images} training images; a batch needs two"):
            TrainConfig(batch_size=8).total_steps(images)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 3, "max_steps": 10}, "epochs is 3 and max_steps is 10; give one of them"),
        ({"batch_size": 10, "accumulate": 4}, "batch_size is 10 with accumulate 4; give a multiple"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"precision": "16"}, "precision"),
        ({"precision": 64}, "precision"),
        ({"devices": 0}, "devices"),
        ({"save_every_steps": 0}, "save_every_steps"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**settings)


def test_the_trainer_does_nothing_by_itself(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = build_trainer(TrainConfig(batch_size=8, accumulate=2, precision=32), 5, [])
    assert trainer.loggers == []
    assert trainer.callbacks == []
    assert trainer.max_steps == 5
    assert trainer.accumulate_grad_batches == 2
    assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    assert list(tmp_path.iterdir()) == []


def test_training_is_quiet(training: Any, capfd: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        training(training.Tiny())
    assert [str(warning.message) for warning in caught] == []
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert logging.getLogger("pytorch_lightning").level == logging.ERROR
