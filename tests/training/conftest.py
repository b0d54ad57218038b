"""A training that takes milliseconds: two weights, and a stream of batches that can begin anywhere."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sslmed.training.checkpoint import Checkpointer
from sslmed.training.checkpoint_files import load
from sslmed.training.trainer import TrainConfig, build_trainer


class Tiny(pl.LightningModule):
    """Linear regression with dropout-like noise; ``at[k]`` is called in the training step number k, from 1."""

    def __init__(self, at: dict[int, Callable[["Tiny"], Any]] | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.at = at or {}
        self.steps = 0
        self.scale = 1.0
        self.monitored: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
            self.layer.bias.zero_()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.steps += 1
        if self.steps in self.at:
            self.at[self.steps](self)
        embeddings = batch + 0.1 * torch.rand_like(batch)
        loss = self.scale * self.layer(embeddings).square().mean()
        self.monitored = {"loss": loss.detach(), "embeddings": embeddings.detach()}
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    @property
    def weights(self) -> list[float]:
        return [*self.layer.weight.flatten().tolist(), *self.layer.bias.tolist()]


class Stream:
    """Batches ``start`` to ``total`` of always the same stream; its length is the whole, as StreamSampler's is."""

    def __init__(self, total: int, start: int = 0) -> None:
        self.total, self.start = total, start

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(self.start, self.total):
            yield torch.randn(4, 2, generator=torch.Generator().manual_seed(number))


@dataclass
class Training:
    """How the tests of this folder train."""

    Tiny = Tiny

    def __call__(
        self,
        module: Tiny,
        callbacks: Sequence[pl.Callback] = (),
        *,
        steps: int = 6,
        accumulate: int = 1,
        resume: Any = None,
    ) -> pl.Trainer:
        done = load(resume)["sslmed"]["step"] if resume else 0
        config = TrainConfig(max_steps=steps, batch_size=12, accumulate=accumulate, precision=32)
        trainer = build_trainer(config, steps, callbacks)
        torch.manual_seed(7)
        stream = Stream(steps * accumulate, done * accumulate)
        watch = next((each.signals for each in callbacks if isinstance(each, Checkpointer)), contextlib.nullcontext())
        with watch:
            trainer.fit(module, stream, ckpt_path=resume, weights_only=True)
        return trainer


@pytest.fixture(scope="session")
def training() -> Training:
    return Training()
