"""Fit a Method or a Head on a stream of batches: what several commands share."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from sslmed import distributed
from sslmed.data.loading import ViewDataset, stream_loader
from sslmed.data.sampling import Rows, StreamSampler, steps_per_epoch
from sslmed.keyed_rng import key
from sslmed.optim import OptimConfig
from sslmed.run import Run
from sslmed.training.checkpoint import Checkpointer, load, steps_done
from sslmed.training.monitors import Monitor
from sslmed.training.trainer import TrainConfig, build_trainer

if TYPE_CHECKING:
    from sslmed.heads.head import Head
    from sslmed.methods.method import Method


@dataclass(frozen=True)
class Fitted:
    """How a training went: optimizer steps in all, and the wall time of this process."""

    steps: int
    seconds: float


def seed_everything(seed: int) -> None:
    """Seed what keyed streams do not cover: the initial weights of heads and dropout-like layers."""
    torch.manual_seed(key(seed, "torch")[0] % 2**63)


def fit(
    module: "Method | Head",
    dataset: ViewDataset,
    rows: Rows,
    train: TrainConfig,
    optim: OptimConfig,
    run: Run,
    monitor: Monitor,
    *,
    workers: int,
    callbacks: Sequence[pl.Callback] = (),
    strata: Rows | None = None,
) -> Fitted:
    """Train ``module`` on ``rows`` to the end, from the run's checkpoint if it has one.

    Args:
        strata: (rows,) numbers; each is met equally often. None takes all rows alike.

    Raises:
        TrainingAborted: non-finite loss, or what a monitor was told to stop at.
        Interrupted: a signal; the checkpoint is saved.
    """
    total = train.total_steps(len(rows))
    done = steps_done(run.checkpoint)
    run.rewind(done)
    module.prepare(optim, train.batch_size, total, steps_per_epoch(len(rows), train.batch_size))
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning leaves modes as they are, and a loaded backbone comes in evaluation mode
    sampler = StreamSampler(
        rows,
        train.batch_size,
        total,
        train.seed,
        accumulate=train.accumulate,
        start=done * train.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        strata=strata,
    )
    keeper = Checkpointer(run.checkpoint, train.save_every_steps, monitor.check_finite)
    trainer = build_trainer(train, total, [monitor, *callbacks, keeper])
    started = time.monotonic()
    if done < total:
        loader = stream_loader(dataset, sampler, workers)
        with keeper.signals:
            trainer.fit(module, loader, ckpt_path=run.checkpoint if done else None, weights_only=True)
    else:
        _finish(trainer, module, load(run.checkpoint))
    return Fitted(total, time.monotonic() - started)


def _finish(trainer: pl.Trainer, module: "Method | Head", checkpoint: dict[str, Any]) -> None:
    """What the end of a training does, for one that was killed after its last step."""
    module.load_state_dict(checkpoint["state_dict"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        callback.on_train_end(trainer, module)
