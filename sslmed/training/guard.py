"""What happens when numbers are no longer finite: skip the step, go back to the last checkpoint, stop.

A skipped step changes nothing: no weight, moment, momentum network or BatchNorm statistic. It still counts: schedule
and stream of batches move on, so that a resumed run meets the same steps. Going back takes the weights and moments of
the last checkpoint of the usual rhythm, and goes on with the data that come next: the same ones would lead to the same
numbers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from sslmed import distributed
from sslmed.config import TrainingAborted
from sslmed.durable import write_atomically
from sslmed.run import Run
from sslmed.training import checkpoint_files as files
from sslmed.training.averaging import WeightAverage

MOST_IN_ALL = 10  # times as many skipped steps as are allowed in a row, and one in a hundred
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # what a forward pass changes by itself


class Guard(pl.Callback):
    """Looks at the loss and the norm of the gradient before every optimizer step. The first of the callbacks.

    The norm is left in the module's ``monitored`` as ``gradient_norm``; its ``skipped`` says that the step at hand
    changes nothing.

    Args:
        skip: steps in a row that may be skipped.
        rollbacks: how often the weights may go back, in all.
        every: optimizer steps between checkpoints; one that a signal has left is no place to go back to.
    """

    def __init__(self, skip: int, rollbacks: int, every: int, run: Run) -> None:
        self.skip, self.rollbacks, self.every, self.run = skip, rollbacks, every, run
        self.in_a_row = self.skipped = self.rolled_back = 0
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._losses: list[torch.Tensor] = []
        self._ids: list[torch.Tensor] = []
        self._random_state: dict[str, torch.Tensor] = {}
        self._resumed_with: dict[str, torch.Tensor] = {}
        self._keyed: dict[str, int | None] = {}
        self._wrong: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("in_a_row", "skipped", "rolled_back")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.skipped, self.rolled_back = (state[name] for name in ("in_a_row", "skipped", "rolled_back"))

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The first step draws from this: `Checkpointer`, the last of the callbacks, sets it after this one's turn."""
        saved = {name: checkpoint[files.STATE][name] for name in ("rng", "cuda_rng")}
        self._resumed_with = {name: states[distributed.rank()] for name, states in saved.items() if states}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            pl_module.skipped = False
            self._statistics = [(tensor, tensor.clone()) for tensor in _statistics(pl_module)]
            self._losses, self._ids, self._wrong = [], [], {}
            self._keyed = {name: getattr(batch, name, None) for name in ("seed", "epoch")}
            self._random_state, self._resumed_with = self._resumed_with or _random_state(), {}
        self._ids.append(getattr(batch, "ids", torch.empty(0, dtype=torch.int64)))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._losses.append(pl_module.monitored["loss"])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        norm = torch.stack(torch._foreach_norm(list(gradients.values()))).norm()
        pl_module.monitored["gradient_norm"] = norm
        finite = bool(torch.isfinite(torch.stack([norm, *self._losses])).all())
        if not distributed.largest(int(not finite)):
            return
        pl_module.skipped = True
        self._wrong = {
            "gradient_norm": float(norm),
            "loss": [float(loss) for loss in self._losses],
            "gradients_not_finite": [name for name, each in gradients.items() if not bool(torch.isfinite(each).all())],
        }
        for parameter in pl_module.parameters():
            parameter.grad = None  # an optimizer leaves alone what has no gradient
        for tensor, before in self._statistics:
            tensor.copy_(before)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if not pl_module.skipped:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        step = trainer.global_step
        path = self._write_down(step)
        what = f"loss or gradient of step {step} is not finite (its images: {path.relative_to(self.run.path)})"
        last = step == trainer.max_steps  # nothing would show any more that it has got better
        many = self.skipped > MOST_IN_ALL * (self.skip + 1) + step // 100  # now and then, but without end
        if self.in_a_row <= self.skip and not many and not (last and self.in_a_row > 1):
            self.run.say(f"warning: {what}; the step is skipped")
            return
        spent = last or many or self.rolled_back >= self.rollbacks
        found = None if spent else distributed.first(self._step_and_name)
        if found is None:
            kept = (
                "the last checkpoint is from before" if self.run.checkpoint.exists() else "there is no checkpoint yet"
            )
            raise TrainingAborted(
                f"{what}, after {self.skipped - 1} others, {self.in_a_row - 1} in a row; {kept}. "
                "Look at these images, lower optim.lr or lengthen optim.warmup, then start a new run."
            )
        self.in_a_row = 0
        self.rolled_back += 1
        self.run.say(f"warning: {what}; the weights go back to step {found[0]}, and training goes on with other images")
        _take_weights(trainer, files.load(self.run.checkpoint.with_name(found[1])))

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, TrainingAborted) and not self._wrong:  # an alarm; else it has been written down
            self._wrong = {"loss": [float(loss) for loss in self._losses], "reason": str(exception)}
            self._write_down(trainer.global_step)

    def _step_and_name(self) -> list[Any] | None:
        found = files.newest(self.run.checkpoint, self.run.say, self.every)
        return None if found is None else [found.step, found.path.name]

    def _write_down(self, step: int) -> Path:
        """What is needed to see the step again: ``torch.load(path, weights_only=True)``."""
        folder = self.run.path / "debug"
        folder.mkdir(exist_ok=True)
        rank = f"-rank-{distributed.rank()}" if distributed.world_size() > 1 else ""
        path = folder / f"step-{step:08}{rank}.pt"
        ids = [each.cpu() for each in self._ids]
        with write_atomically(path) as partial:
            torch.save({"step": step, **self._keyed, "ids": ids, **self._wrong, **self._random_state}, partial)
        return path


def _statistics(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        for name in STATISTICS:
            tensor = part._buffers.get(name)
            if tensor is not None:
                yield tensor


def _random_state() -> dict[str, torch.Tensor]:
    gpu = {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {"rng": torch.get_rng_state(), **gpu}


def _take_weights(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Weights and moments of ``checkpoint``; step, schedule and stream stay where they are."""
    trainer.lightning_module.load_state_dict(checkpoint["state_dict"])
    trainer.optimizers[0].load_state_dict(checkpoint["optimizer_states"][0])
    for config in trainer.lr_scheduler_configs:
        for group, lr in zip(trainer.optimizers[0].param_groups, config.scheduler.get_last_lr(), strict=True):
            group["lr"] = lr
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAverage):
            callback.go_back(checkpoint["callbacks"][callback.state_key])
