"""When checkpoints are written, what a signal does, and what a resumed training ends with."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from sslmed.config import Interrupted, TrainingAborted
from sslmed.training.checkpoint import Checkpointer, DurableCheckpointIO
from sslmed.training.checkpoint_files import STATE, load, newest
from sslmed.training.signals import SignalWatch


class Saved(DurableCheckpointIO):
    """Notes the step of each checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.steps.append(checkpoint[STATE]["step"])
        super().save_checkpoint(checkpoint, path)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    noted = Saved()
    monkeypatch.setattr("sslmed.training.trainer.DurableCheckpointIO", lambda: noted)
    return noted.steps


def keeper(folder: Path, every: int = 2, earlier: int = 1) -> Checkpointer:
    folder.mkdir(exist_ok=True)
    return Checkpointer(folder / "last.ckpt", every, SignalWatch(), earlier)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_saves_every_so_many_optimizer_steps_and_at_the_end(
    accumulate: int, tmp_path: Path, training: Any, saved: list[int]
) -> None:
    training(training.Tiny(), [keeper(tmp_path)], steps=5, accumulate=accumulate)
    assert saved == [2, 4, 5]
    assert newest(tmp_path / "last.ckpt", print) == (tmp_path / "last.ckpt", 5)


@pytest.mark.parametrize(("earlier", "kept"), [(0, []), (1, [4]), (3, [2, 3, 4])])
def test_earlier_ones_are_kept_beside_it(earlier: int, kept: list[int], tmp_path: Path, training: Any) -> None:
    training(training.Tiny(), [keeper(tmp_path, every=1, earlier=earlier)], steps=5)
    names = [f"step-{step:08}.ckpt" for step in kept]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", *names]
    assert [load(tmp_path / name)[STATE]["step"] for name in names] == kept


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, training: Any, saved: list[int]) -> None:
    """The loss of step 4 is still finite, but its gradient is not."""

    def explode(module: Any) -> None:
        module.layer.weight.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(TrainingAborted, match=r"no longer finite at step 4.*\n?.*optim\.lr") as caught:
        training(training.Tiny(at={4: explode}), [keeper(tmp_path)])
    assert caught.value.exit_code == 3
    assert saved == [2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_leaves(
    number: signal.Signals, code: int, tmp_path: Path, training: Any, saved: list[int]
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    module = training.Tiny(at={3: lambda _: os.kill(os.getpid(), number)})
    with pytest.raises(Interrupted, match=rf"stopped by {number.name} after step 3.*--resume") as caught:
        training(module, [keeper(tmp_path, every=100)])
    assert caught.value.exit_code == code
    assert saved == [3]
    assert module.steps == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_waits_for_the_last_part_of_an_accumulated_step(
    tmp_path: Path, training: Any, saved: list[int]
) -> None:
    module = training.Tiny(at={4: lambda _: os.kill(os.getpid(), signal.SIGINT)})
    with pytest.raises(Interrupted, match="after step 2"):
        training(module, [keeper(tmp_path, every=100)], accumulate=3)
    assert module.steps == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step(
    number: signal.Signals, code: int, tmp_path: Path, training: Any, saved: list[int]
) -> None:
    """Lightning's own handler stands between its set-up and the first step; accumulating, it would end with code 0."""

    class Impatient(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), number)

    module = training.Tiny()
    with pytest.raises(Interrupted, match=f"{number.name} before the first step") as caught:
        training(module, [Impatient(), keeper(tmp_path)], accumulate=3)
    assert caught.value.exit_code == code
    assert module.steps == 0
    assert saved == []


def test_a_signal_after_the_last_step_still_ends_the_process(tmp_path: Path, training: Any, saved: list[int]) -> None:
    class Late(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        training(training.Tiny(), [keeper(tmp_path), Late()])
    assert saved[-1] == 6


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, training: Any, saved: list[int]) -> None:
    def twice(_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    module = training.Tiny(at={3: twice})
    with pytest.raises(Interrupted, match="second Ctrl-C") as caught:
        training(module, [keeper(tmp_path)])
    assert caught.value.exit_code == 130
    assert saved == [2]


@pytest.mark.parametrize(("accumulate", "stop"), [(1, 3), (1, 5), (2, 5)])
def test_an_interrupted_training_goes_on_to_the_last_bit(
    accumulate: int, stop: int, tmp_path: Path, training: Any
) -> None:
    """Momentum, step count and the random state that dropout-like layers use all matter here."""
    whole = training.Tiny()
    training(whole, [keeper(tmp_path / "whole", every=100)], accumulate=accumulate)
    module = training.Tiny(at={stop: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        training(module, [keeper(tmp_path / "part", every=100)], accumulate=accumulate)
    resumed = training.Tiny()
    training(
        resumed, [keeper(tmp_path / "part", every=100)], accumulate=accumulate, resume=tmp_path / "part" / "last.ckpt"
    )
    assert resumed.weights == whole.weights
    assert resumed.steps < whole.steps
    assert load(tmp_path / "part" / "last.ckpt")[STATE]["step"] == 6
