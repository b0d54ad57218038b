"""Fit a Method or a Head on a stream of batches: what several commands share."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytorch_lightning as pl
import torch

from sslmed import distributed
from sslmed.config import ElsewhereError, SslmedError, TemporaryError
from sslmed.data.loading import Loader, ViewDataset, stream_loader
from sslmed.data.raw_batches import RawCollate, RawDataset
from sslmed.data.sampling import Rows, StreamSampler, steps_per_epoch
from sslmed.keyed_rng import key
from sslmed.models.compilation import compile_parts
from sslmed.models.sync_batchnorm import synchronise
from sslmed.optim import OptimConfig
from sslmed.run import Run
from sslmed.training import checkpoint_files as files
from sslmed.training import launch
from sslmed.training.checkpoint import Checkpointer
from sslmed.training.checkpoint_files import Found
from sslmed.training.guard import Guard
from sslmed.training.input_speed import choose
from sslmed.training.loggers import Mirrors
from sslmed.training.monitors import Monitor, MonitorConfig
from sslmed.training.signals import SignalWatch
from sslmed.training.trainer import TrainConfig, build_trainer, device, lightning_precision
from sslmed.training.wait_meter import WaitMeter
from sslmed.training.watchdog import Watchdog

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
    dataset: ViewDataset | RawDataset,
    rows: Rows,
    train: TrainConfig,
    optim: OptimConfig,
    run: Run,
    *,
    monitor: MonitorConfig,
    workers: Literal["auto"] | int,
    recipe: Mapping[str, Any],
    probe: Callable[[], dict[str, float]] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    strata: Rows | None = None,
    signals: SignalWatch | None = None,
) -> Fitted:
    """Train ``module`` on ``rows`` to the end, from the run's checkpoint if it has one.

    Args:
        workers: ``data.workers``.
        recipe: what loggers are told of the run.
        probe: see `Monitor`.
        strata: (rows,) numbers; each is met equally often. None takes all rows alike.
        signals: those that ``callbacks`` heed.

    Raises:
        TrainingAborted: numbers that stay non-finite, or what a monitor was told to stop at.
        Interrupted, TemporaryError: a signal; the checkpoint is saved.
        TemporaryError: another process of this training is gone.
    """
    signals = signals or SignalWatch()
    total, epoch_steps = train.total_steps(len(rows)), steps_per_epoch(len(rows), train.batch_size)
    found = distributed.first(lambda: _found(run))
    done = found[1] if found else 0
    run.rewind(done)
    module.prepare(optim, train.batch_size, total, epoch_steps)
    _make_ready(module, train, fresh=not done)
    loader, meter = _loader(module, dataset, rows, train, run, workers, strata, done) if done < total else (None, None)
    if train.compile:  # after what was tried on a copy
        compile_parts(module, device(train))
    started = time.monotonic()
    with signals, _mirrored(run, train, recipe, done) as mirrors:
        watcher = Monitor(monitor, run, train.batch_size, epoch_steps, probe, signals, meter)
        keeper = Checkpointer(
            run.checkpoint, train.save_every_steps, signals, train.keep_checkpoints - 1, mirrors.flush
        )
        keeper.found = Found(Path(found[0]), done) if found else None
        guard = Guard(train.skip_steps, train.rollbacks, train.save_every_steps, run)
        watchdog = Watchdog(run, 54 * train.timeout)  # before collectives give up, after 60
        ordered = [watchdog, guard, watcher, *callbacks, keeper, *([meter] if meter else [])]
        trainer = build_trainer(train, total, ordered, bool(module.without_gradient))
        if loader is not None:
            with _said_well(run, watchdog):
                trainer.fit(module, loader, ckpt_path=found[0] if found else None, weights_only=True)
        elif found:
            _finish(trainer, module, files.load(Path(found[0])))
    return Fitted(total, time.monotonic() - started)


def _loader(
    module: "Method | Head",
    dataset: ViewDataset | RawDataset,
    rows: Rows,
    train: TrainConfig,
    run: Run,
    workers: Literal["auto"] | int,
    strata: Rows | None,
    done: int,
) -> tuple[Loader, WaitMeter]:
    """The batches after ``done`` steps, by as many workers as keep up, and what measures whether they do."""
    sampler = StreamSampler(
        rows,
        train.batch_size,
        train.total_steps(len(rows)),
        train.seed,
        accumulate=train.accumulate,
        start=done * train.accumulate,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        strata=strata,
    )
    collate = RawCollate(train.seed) if isinstance(dataset, RawDataset) else None
    chosen = choose(
        workers,
        dataset,
        sampler,
        module,
        device=torch.device(device(train)),
        bf16=lightning_precision(train) == "bf16-mixed",
        processes_per_node=launch.place().local_world_size,
        collate=collate,
    )
    for line in chosen.lines:
        run.say(line)
    pin = device(train) == "cuda"
    loader = stream_loader(dataset, sampler, chosen.workers, chosen.prefetch, pin=pin, collate=collate)
    meter = WaitMeter(run.say, chosen)
    loader.arrived = meter.arrived
    return loader, meter


@contextmanager
def _mirrored(run: Run, train: TrainConfig, recipe: Mapping[str, Any], done: int) -> Iterator[Mirrors]:
    """Whatever the run logs goes to its loggers as well; the first process has them."""
    names = () if distributed.rank() else train.loggers
    mirrors = Mirrors(names, run.path, str(run.fact("id")), recipe, run.say, start=done)
    run.mirror(mirrors.log)
    ended = False
    try:
        yield mirrors
        ended = True
    finally:
        mirrors.close(ended)


def _found(run: Run) -> list[Any] | None:
    found = files.newest(run.checkpoint, run.say)
    return None if found is None else [str(found.path), found.step]


def _make_ready(module: "Method | Head", train: TrainConfig, fresh: bool) -> None:
    """What is done to the network before it is trained."""
    world = distributed.world_size()
    if world > 1:
        if module.sync_batchnorm:
            synchronise(module, device(train))
        if fresh:  # or all processes would drop the same
            torch.manual_seed(key(train.seed, "torch", distributed.rank())[0] % 2**63)
    if train.checkpoint_gradients:
        module.backbone.checkpoint_gradients()
    module.to(memory_format=torch.channels_last)
    module.train()  # Lightning leaves modes as they are, and a loaded backbone comes in evaluation mode


@contextmanager
def _said_well(run: Run, watchdog: Watchdog) -> Iterator[None]:
    """A scheduler's signal asks for the job again; a lost process is no bug."""
    try:
        with launch.losses_told():
            yield
    except SslmedError as error:
        if error.agreed and isinstance(error, TemporaryError):
            launch.requeue(run.say)
        if error.agreed and distributed.rank():
            elsewhere = ElsewhereError(str(error), error.exit_code)
            elsewhere.agreed = True
            raise elsewhere from error
        raise
    finally:
        watchdog.close()


def _finish(trainer: pl.Trainer, module: "Method | Head", checkpoint: dict[str, Any]) -> None:
    """What the end of a training does, for one that was killed after its last step."""
    module.load_state_dict(checkpoint["state_dict"])
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        callback.on_train_end(trainer, module)
