"""Early stopping on val patients: keep the weights of the best check, stop when checks no longer improve."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import pytorch_lightning as pl
import torch
from pydantic import Field

from sslmed import distributed
from sslmed.config import Config
from sslmed.run import Run
from sslmed.training.averaging import WeightAverage
from sslmed.training.signals import SignalWatch


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
    step ``begin`` the best weights are kept, but nothing counts towards stopping. A check that one of ``signals`` cuts
    short comes first after a resume. Of several processes the first one scores.
    """

    def __init__(
        self,
        config: StopConfig,
        run: Run,
        name: str,
        score: Callable[[], float],
        average: WeightAverage | None = None,
        begin: int = 0,
        signals: SignalWatch | None = None,
    ) -> None:
        self.begin = begin
        self.signals = signals or SignalWatch()
        self._owed: int | None = None  # the step of a check that a signal has cut short
        self.config, self.run, self.name, self.score = config, run, name, score
        self.average = average or WeightAverage(0)
        self.best, self.best_step, self.worse = -math.inf, 0, 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_up(pl_module)
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
        self._check(step, pl_module)
        self._stop_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_up(pl_module)
        if self.weights:
            pl_module.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_step", "worse", "weights", "_owed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def _make_up(self, module: pl.LightningModule) -> None:
        if self._owed is not None:
            self._check(self._owed, module)

    def _check(self, step: int, module: pl.LightningModule) -> None:
        with self.average.applied(module):
            score = distributed.first(lambda: self.signals.cut(self.score))
            if score is not None and score > self.best:
                self.weights = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        self._owed = step if score is None else None
        if score is None:
            return
        self.run.log(step, **{f"val_{self.name}": score})
        if score > self.best:
            self.best, self.best_step, self.worse = score, step, 0
        elif step > self.begin:
            self.worse += 1

    def _stop_if_due(self, trainer: pl.Trainer) -> None:
        if self.config.patience and self.worse >= self.config.patience:
            trainer.should_stop = True
