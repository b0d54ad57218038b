"""Checkpoints that survive, and a resume that repeats to the last bit.

Lightning's own writer moves a file from $TMPDIR over the good checkpoint; on a full disk both are lost (measured).
This one writes beside the target, checks what it wrote and renames. A checkpoint holds tensors and primitives only.
"""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO

from sslmed.config import DataError, DiskError, Interrupted, TrainingAborted
from sslmed.durable import PARTIAL, write_atomically
from sslmed.training.signals import SignalWatch

STATE = "sslmed"  # our entry in Lightning's checkpoint
START_AGAIN = "delete it to start again"


class DurableCheckpointIO(CheckpointIO):
    """How Lightning's checkpoint dictionary gets to disk and back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with write_atomically(path) as partial:
            try:
                torch.save(checkpoint, partial)
            except RuntimeError as error:  # torch hides a full disk behind "unexpected pos"
                raise DiskError(f"cannot write {path}: {error}. The earlier checkpoint is untouched.") from error
            if not _whole(partial):
                raise DiskError(f"{path} reads back differently from what was written; the earlier one is untouched")

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """The checkpoint dictionary, on the CPU, after every member's checksum has been read.

    Raises:
        DataError: the file is damaged or not a checkpoint of sslmed.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if _whole(path) else None
    except Exception as error:  # a file that is no checkpoint may make torch raise anything
        raise DataError(f"the checkpoint {path} cannot be read ({type(error).__name__}); {START_AGAIN}") from error
    if checkpoint is None:
        raise DataError(f"the checkpoint {path} is damaged; {START_AGAIN}")
    if not isinstance(checkpoint, dict) or STATE not in checkpoint:
        raise DataError(f"{path} was not written by sslmed")
    return checkpoint


def _whole(path: Path) -> bool:
    """Whether every member of the archive has the content that its checksum is of.

    No checksum covers the attributes; a member that a flipped bit makes a folder would be read as uninitialised memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None and not any(member.external_attr for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, struct.error):
        return False


def steps_done(path: Path) -> int:
    """Optimizer steps that the checkpoint holds; 0 when there is none. Sweeps what a killed writer left behind."""
    for orphan in path.parent.glob(f".*{PARTIAL}"):
        orphan.unlink()
    return int(load(path)[STATE]["step"]) if path.exists() else 0


class Checkpointer(pl.Callback):
    """Saves every ``every`` optimizer steps, at the end, and when a signal asks for the end.

    It also carries torch's random state, which only dropout-like layers use, over the gap. Train inside a ``with``
    block of its ``signals``.
    """

    def __init__(self, path: Path, every: int, healthy: Callable[[], None]) -> None:
        """``healthy`` raises when the weights are not worth keeping; it is called before each save."""
        self.path = path
        self.every = every
        self.healthy = healthy
        self.signals = SignalWatch()
        self._random_state: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()  # Lightning has just taken SIGTERM, and would end without a checkpoint and with code 0
        if self.signals.received:
            raise Interrupted(
                f"stopped by {self.signals.received.name} before the first step. Go on with --resume.",
                self.signals.received,
            )

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        checkpoint[STATE] = {"step": trainer.global_step, "rng": torch.get_rng_state(), "cuda_rng": gpus}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_state = checkpoint[STATE]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_state is not None:  # only now: making the loader's iterator draws from the same state
            torch.set_rng_state(self._random_state["rng"])
            if torch.cuda.is_available() and self._random_state["cuda_rng"]:
                torch.cuda.set_rng_state_all(self._random_state["cuda_rng"])
            self._random_state = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if self.signals.received:
            self._save(trainer)
            raise Interrupted(
                f"stopped by {self.signals.received.name} after step {trainer.global_step}; the checkpoint is saved. "
                "Go on with the same command and --resume.",
                self.signals.received,
            )
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        if last or trainer.global_step % self.every == 0:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        self.healthy()
        # a finite loss can have an infinite gradient
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.lightning_module.parameters()):
            raise TrainingAborted(
                f"the weights are no longer finite at step {trainer.global_step}; the last checkpoint is from before. "
                "Lower optim.lr or lengthen optim.warmup, then start a new run."
            )
        trainer.save_checkpoint(self.path)
