"""When checkpoints are written, and a resume that repeats to the last bit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO

from sslmed import distributed
from sslmed.config import Interrupted, SslmedError, TemporaryError, TrainingAborted
from sslmed.training import checkpoint_files as files
from sslmed.training.checkpoint_files import STATE, Found
from sslmed.training.signals import SignalWatch


class DurableCheckpointIO(CheckpointIO):
    """How Lightning's checkpoint dictionary gets to disk and back.

    A failed write is kept for ``settle``: raised at once on rank 0 alone, it would leave the others waiting.
    """

    def __init__(self) -> None:
        self._failure: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            files.write(checkpoint, Path(path))
        except Exception as error:
            self._failure = error

    def settle(self) -> None:
        """Raise what the last write could not do."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return files.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpointer(pl.Callback):
    """Saves every ``every`` optimizer steps, at the end, and when a signal asks for the end.

    It also carries torch's random state of every process, which only dropout-like layers use, over the gap. Train
    inside a ``with`` block of its ``signals``. It must be the last of the callbacks: what the others do in a step is
    part of what is saved.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        signals: SignalWatch,
        earlier: int = 1,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        """``earlier`` is how many checkpoints are kept beside the last; ``saved`` is called after each."""
        self.path, self.every, self.signals, self.earlier, self.saved = path, every, signals, earlier, saved
        self.found: Found | None = None
        self._random_state: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if received := self.signals.agreed():
            raise _ending(received, "before the first step. Go on with --resume.")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[STATE] = {"step": trainer.global_step, **random_state()}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._random_state = checkpoint[STATE]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_state is not None:  # only now: setting up may have drawn from it
            torch.set_rng_state(self._random_state["rng"][distributed.rank()])
            if torch.cuda.is_available() and self._random_state["cuda_rng"]:
                torch.cuda.set_rng_state(self._random_state["cuda_rng"][distributed.rank()])
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
        received = self.signals.agreed()
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        skipped = getattr(pl_module, "skipped", False)  # weights that may yet go back are kept as they were before
        if (received or last or trainer.global_step % self.every == 0) and not (skipped and not last):
            self.save(trainer)
        if received:
            kept = "is saved" if self.found and self.found.step == trainer.global_step else "is from before a bad step"
            saved = f"after step {trainer.global_step}; the checkpoint {kept}."
            raise _ending(received, f"{saved} Go on with the same command and --resume.")

    def save(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint now; every process must come here.

        Raises:
            TrainingAborted: the weights are no longer finite; the last checkpoint stays.
            DiskError: it could not be written; the last one stays.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trainer.lightning_module.parameters()):
            raise TrainingAborted(
                f"the weights are no longer finite at step {trainer.global_step}; the last checkpoint is from before. "
                "Lower optim.lr or lengthen optim.warmup, then start a new run."
            )
        distributed.first(self._keep_the_last)
        trainer.save_checkpoint(self.path)
        distributed.first(cast(DurableCheckpointIO, trainer.strategy.checkpoint_io).settle)
        self.found = Found(self.path, trainer.global_step)
        self.saved()

    def _keep_the_last(self) -> None:
        # one that a signal has left between two others is not what a roll-back would go to
        if self.found is not None and self.found.path == self.path and self.found.step % self.every == 0:
            files.keep(self.path, self.found.step, self.earlier)


def random_state() -> dict[str, list[torch.Tensor]]:
    """torch's state on every process, of the CPU and of its GPU."""
    gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {
        "rng": distributed.gather_cpu(torch.get_rng_state()),
        "cuda_rng": [state for own in gpu for state in distributed.gather_cpu(own)],
    }


def _ending(received: signal.Signals, what: str) -> SslmedError:
    """SIGUSR1 is how a scheduler says that time is up: the run is to come again."""
    message = f"stopped by {received.name} {what}"
    ending = TemporaryError(message) if received is signal.SIGUSR1 else Interrupted(message, received)
    ending.agreed = True
    return ending
