"""Early stopping on val patients: keep the weights of the best check, stop when checks no longer improve."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field

from sslmed.config import Config
from sslmed.run import Run
from sslmed.training.averaging import WeightAverage


class StopConfig(Config):
    """When fine-tuning ends early.

    Attributes:
        check_every: optimizer steps between checks on val patients.
        patience: checks in a row without a better score; 0 never stops early, but still keeps the best weights.
    """

    check_every: Annotated[int, Field(ge=1)] = 20
    patience: Annotated[int, Field(ge=0)] = 5


class EarlyStopping(pl.Callback):
    """Calls ``score`` every ``check_every`` steps and at the end. Its state, best weights included, is checkpointed.

    ``average`` is what is scored and kept where it averages anything; it must come before among the callbacks. Up to
    step ``begin`` the best weights are kept, but nothing counts towards stopping.
    """

    def __init__(
        self,
        config: StopConfig,
        run: Run,
        name: str,
        score: Callable[[], float],
        average: WeightAverage | None = None,
        begin: int = 0,
    ) -> None:
        self.begin = begin
        self.config, self.run, self.name, self.score = config, run, name, score
        self.average = average or WeightAverage(0)
        self.best, self.best_step, self.worse = -math.inf, 0, 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_due(trainer)  # killed between the check that ended training and the end

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.config.check_every and step != trainer.max_steps:
            return
        with self.average.applied(pl_module):
            self._check(step, pl_module)
        self._stop_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.weights:
            pl_module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
        self.weights = state["weights"]

    def _check(self, step: int, module: pl.LightningModule) -> None:
        score = self.score()
        self.run.log(step, **{f"val_{self.name}": score})
        if score > self.best:
            self.best, self.best_step, self.worse = score, step, 0
            self.weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        elif step > self.begin:
            self.worse += 1

    def _stop_if_due(self, trainer: pl.Trainer) -> None:
        if self.config.patience and self.worse >= self.config.patience:
            trainer.should_stop = True
