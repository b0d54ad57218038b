"""Trainings by sslmed's own ``fit`` in a folder that goes away, on views that are there already."""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from sslmed.data.loading import Sample
from sslmed.data.targets import UNKNOWN
from sslmed.methods.method import Method
from sslmed.optim import OptimConfig
from sslmed.run import Run
from sslmed.training.fit import Fitted, fit
from sslmed.training.monitors import MonitorConfig
from sslmed.training.trainer import TrainConfig

SHIFTS = 4096
HOOKS = ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end")
QUIET = MonitorConfig(knn_every=0, pictures_every=0, collapse="off", explosion="off", frozen="off")


class ReadyViews(Dataset[Sample]):
    """Random views in place of a store's, addressed by (epoch, row): windows on one field of noise, so that they cost
    nothing and no two of 4096 are alike.
    """

    def __init__(self, views: int, channels: int, size: int) -> None:
        self.shape = (channels, size, size)
        self.noise = torch.randn(views, SHIFTS + channels * size**2, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, address: tuple[int, int]) -> Sample:
        epoch, row = address
        start = row % SHIFTS
        views = [noise[start : start + int(np.prod(self.shape))].view(self.shape) for noise in self.noise]
        return Sample(views, row, torch.tensor(UNKNOWN), row, epoch)


def fit_here(
    method: Method,
    dataset: Any,
    images: int,
    train: TrainConfig,
    callbacks: Sequence[pl.Callback],
    *,
    workers: Literal["auto"] | int = 0,
    optim: OptimConfig | None = None,
) -> Fitted:
    """Train on ``images`` rows with guard, monitor, alarms' inputs and checkpoints as a pretraining has them."""
    with tempfile.TemporaryDirectory() as folder, Run.start(Path(folder) / "run", "benchmark", "", {}) as run:
        return fit(
            method,
            dataset,
            np.arange(images),
            train,
            optim or OptimConfig(),
            run,
            monitor=QUIET,
            workers=workers,
            recipe={},
            callbacks=callbacks,
        )


class Turns(pl.Callback):
    """After each step of a training one of a plain loop, both timed. It comes before the callback that saves.

    Attributes:
        fit, loop: seconds of each step but the first; a step of ``fit`` ends where its callbacks do but the saving one,
            whose end is counted to the next.
        inside: seconds that each other callback took of them.
        save: seconds of the checkpoint at the end.
    """

    def __init__(self, plain: Callable[[], None]) -> None:
        self.plain = plain
        self.fit: list[float] = []
        self.loop: list[float] = []
        self.inside: defaultdict[str, float] = defaultdict(float)
        self.save = 0.0

    @property
    def whole(self) -> float:
        return sum(self.fit)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for hook in HOOKS if callback is not self else ():
                setattr(callback, hook, self._timed(getattr(callback, hook), type(callback).__name__))
        self._since: float | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self.inside.clear()  # of the first step
        else:
            self.fit.append(time.perf_counter() - self._since)
            started = time.perf_counter()
            self.plain()
            self.loop.append(time.perf_counter() - started)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._since is not None
        self.save = time.perf_counter() - self._since  # nothing else is done between the last step and the end
        self.inside["Checkpointer"] = max(0.0, self.inside["Checkpointer"] - self.save)

    def _timed(self, hook: Callable[..., None], name: str) -> Callable[..., None]:
        def timed(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            hook(*args, **kwargs)
            self.inside[name] += time.perf_counter() - started

        return timed
