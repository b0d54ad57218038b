import errno
import os
import re
import signal
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sslmed.config import DataError, DiskError, Interrupted, TrainingAborted
from sslmed.durable import PARTIAL
from sslmed.training import checkpoint
from sslmed.training.checkpoint import STATE, Checkpointer, DurableCheckpointIO, load, steps_done

CONTENT = {
    STATE: {"step": 12, "rng": torch.arange(5, dtype=torch.uint8)},
    "state_dict": OrderedDict(weight=torch.linspace(0, 1, 40), bias=torch.tensor([1.0, -2.0], dtype=torch.bfloat16)),
    "callbacks": {"Monitor": {"best": -float("inf"), "names": ["a", None, True]}},
}
TORCH_SAVE = torch.save


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    DurableCheckpointIO().save_checkpoint(CONTENT, path)
    return path


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


# The file.


def test_what_was_saved_is_loaded(path: Path) -> None:
    assert same(load(path), CONTENT)
    assert same(DurableCheckpointIO().load_checkpoint(path), CONTENT)
    assert list(path.parent.iterdir()) == [path]


def half_written(error: BaseException | None) -> Any:
    def save(content: Any, file: Path) -> None:
        TORCH_SAVE(content, file)
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        if error is not None:
            raise error

    return save


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),  # what torch makes of it
        None,  # a disk that swallows bytes without a word
    ],
    ids=["OSError", "RuntimeError", "silent"],
)
def test_a_save_that_fails_half_way_leaves_the_earlier_checkpoint(
    error: BaseException | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", half_written(error))
    with pytest.raises(DiskError, match="untouched") as caught:
        DurableCheckpointIO().save_checkpoint({STATE: {"step": 99}}, path)
    assert str(path) in str(caught.value)
    assert same(load(path), CONTENT)
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_at_the_sync_leaves_the_earlier_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskError, match="No space left"):
        DurableCheckpointIO().save_checkpoint({STATE: {"step": 99}}, path)
    assert same(load(path), CONTENT)


def test_no_flipped_byte_goes_unnoticed(path: Path) -> None:
    """Bytes between the members are padding and change nothing; any other is found, whatever it makes torch do."""
    content = path.read_bytes()
    attributes = [match.start() + 38 for match in re.finditer(rb"PK\x01\x02", content)]  # no checksum covers these
    found = 0
    for place in [*range(0, len(content), 7), *attributes]:
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert same(load(path), CONTENT), f"byte {place} of {len(content)}"
        except DataError:
            found += 1
    assert found > 0.3 * len(content) / 7


def test_a_flipped_byte_of_a_weight_is_a_data_error(path: Path) -> None:
    content = path.read_bytes()
    weights = CONTENT["state_dict"]["weight"].numpy().tobytes()
    assert content.count(weights) == 1
    place = content.index(weights) + 21
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(DataError, match="damaged; delete it to start again"):
        load(path)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_a_data_error(share: float, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="damaged"):
        load(path)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def test_nothing_in_a_checkpoint_is_executed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({STATE: {"step": 1}, "trap": Trap()}, path)
    with pytest.raises(DataError, match="cannot be read"):
        load(path)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"])
def test_another_programs_file_is_a_data_error(content: Any, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(DataError, match="not written by sslmed"):
        load(path)


def test_steps_done_sweeps_what_a_killed_writer_left(path: Path) -> None:
    orphan = path.with_name(f".last.ckpt.0123abcd{PARTIAL}")
    orphan.write_bytes(b"half")
    assert steps_done(path) == 12
    assert list(path.parent.iterdir()) == [path]
    orphan.write_bytes(b"half")
    path.unlink()
    assert steps_done(path) == 0
    assert list(path.parent.iterdir()) == []


# When it is written.


class Saved(DurableCheckpointIO):
    """Notes the step of each checkpoint."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.steps.append(checkpoint[STATE]["step"])
        super().save_checkpoint(checkpoint, path)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    noted = Saved()
    monkeypatch.setattr("sslmed.training.trainer.DurableCheckpointIO", lambda: noted)
    return noted.steps


def keeper(folder: Path, every: int = 2, healthy: Any = lambda: None) -> Checkpointer:
    folder.mkdir(exist_ok=True)
    return Checkpointer(folder / "last.ckpt", every, healthy)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_saves_every_so_many_optimizer_steps_and_at_the_end(
    accumulate: int, tmp_path: Path, training: Any, saved: list[int]
) -> None:
    training(training.Tiny(), [keeper(tmp_path)], steps=5, accumulate=accumulate)
    assert saved == [2, 4, 5]
    assert steps_done(tmp_path / "last.ckpt") == 5


def test_it_asks_for_health_before_it_saves(tmp_path: Path, training: Any, saved: list[int]) -> None:
    module = training.Tiny()

    def healthy() -> None:
        if module.steps >= 4:
            raise TrainingAborted("ill")

    with pytest.raises(TrainingAborted, match="ill"):
        training(module, [keeper(tmp_path, healthy=healthy)])
    assert saved == [2]


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
    assert checkpoint.load(tmp_path / "part" / "last.ckpt")[STATE]["step"] == 6
