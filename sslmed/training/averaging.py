"""A moving average of the weights while they are trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn


class WeightAverage(pl.Callback):
    """After each optimizer step: average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)).

    BatchNorm's statistics are averaged likewise. The average is part of the checkpoint. A decay of 0 averages nothing.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.decay:
            begin = self.average or pl_module.state_dict()
            self.average = {name: tensor.detach().clone().to(pl_module.device) for name, tensor in begin.items()}

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        skipped = getattr(pl_module, "skipped", False)
        if self.decay and not skipped and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._update(pl_module.state_dict(), trainer.global_step)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside the block ``module`` has the averaged weights."""
        if not self.average:
            yield
            return
        own = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(self.average)
        try:
            yield
        finally:
            module.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = state["average"]

    def go_back(self, state: dict[str, Any]) -> None:
        """Take the average of an earlier ``state_dict`` while training."""
        for name, tensor in state["average"].items():
            self.average[name].copy_(tensor)

    @torch.no_grad()
    def _update(self, weights: dict[str, torch.Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)  # BatchNorm's counter
