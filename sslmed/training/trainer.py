"""The one place that builds a Lightning Trainer."""

import logging
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import pytorch_lightning as pl
import torch
from pydantic import Field, model_validator
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
from pytorch_lightning.strategies import DDPStrategy, Strategy

from sslmed import distributed
from sslmed.config import Config, UsageError
from sslmed.data.sampling import steps_per_epoch
from sslmed.training.checkpoint import DurableCheckpointIO
from sslmed.training.launch import Environment, place
from sslmed.training.loggers import LoggerName, refuse_missing

DEFAULT_EPOCHS = 100


class TrainConfig(Config):
    """How long and on what.

    Attributes:
        epochs: passes over the data; ``max_steps`` counts optimizer steps instead. Give one of them; default 100
            epochs.
        batch_size: samples an optimizer step, over all processes and accumulated batches.
        accumulate: parts in which a step's batch is computed, to save memory; negatives and BatchNorm see one part.
        precision: ``32``; ``bf16``, mixed; ``auto``, bf16 where the hardware multiplies it (a GPU, or a CPU with AMX).
        devices: ``auto`` is one GPU if there is one, else the CPU; ``cpu`` is the CPU in any case; a number above 1
            starts as many processes here, each with a GPU of its own, or on the CPU where there is none. Under torchrun
            or srun the launcher has said how many: leave it at ``auto``.
        save_every_steps: optimizer steps between checkpoints.
        keep_checkpoints: how many are kept; if the last is damaged, a resume goes on from the one before.
        seed: of every random choice.
        skip_steps: how many steps in a row are skipped when loss or gradient is not finite; one more, and the weights
            go back to the last checkpoint.
        rollbacks: how often they may, before training stops.
        compile: let torch.compile fuse operations; worth its minutes on a GPU.
        checkpoint_gradients: compute activations again in the backward pass, to save memory.
        timeout: minutes after which processes give up on one that does not answer.
        loggers: besides metrics.jsonl.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 256
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["auto", "bf16", 32] = "auto"
    devices: Literal["auto", "cpu"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    save_every_steps: Annotated[int, Field(ge=1)] = 500
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    skip_steps: Annotated[int, Field(ge=0)] = 3
    rollbacks: Annotated[int, Field(ge=0)] = 1
    compile: bool = False
    checkpoint_gradients: bool = False
    timeout: Annotated[float, Field(gt=0, le=1440)] = 10.0
    loggers: tuple[LoggerName, ...] = ()

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"epochs is {self.epochs} and max_steps is {self.max_steps}; give one of them")
        return self

    @model_validator(mode="after")
    def _equal_parts(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size is {self.batch_size} with accumulate {self.accumulate}; give a multiple of it"
            )
        if self.batch_size // self.accumulate < 2:
            raise ValueError(f"accumulate is {self.accumulate}; allowed: at most half of batch_size, {self.batch_size}")
        return self

    def check(self, images: int) -> None:
        """Refuse what could not be carried out on ``images`` images here.

        Raises:
            UsageError: a step needs more images, or cannot be shared out to all processes.
            MissingDependencyError: a logger is not installed.
        """
        self.total_steps(images)
        parts = self.accumulate * distributed.world_size()
        if self.batch_size % parts or self.batch_size // parts < 2:
            raise UsageError(
                f"train.batch_size is {self.batch_size}; allowed for {distributed.world_size()} processes and "
                f"accumulate {self.accumulate}: multiples of {parts}, from {2 * parts}"
            )
        for name in self.loggers:
            refuse_missing(name)

    def total_steps(self, images: int) -> int:
        """Optimizer steps of a training on ``images`` images."""
        each = steps_per_epoch(images, self.batch_size)
        return self.max_steps or (self.epochs or DEFAULT_EPOCHS) * each


def build_trainer(
    config: TrainConfig, total_steps: int, callbacks: Sequence[pl.Callback], some_without_gradient: bool = False
) -> pl.Trainer:
    """A Trainer that does nothing by itself: no logger, bar, validation or checkpoint but ours.

    The whole training is one Lightning epoch, because our stream of batches has no seams (see ``data.sampling``).

    Args:
        some_without_gradient: there are steps in which not every trainable parameter gets one.
    """
    silence()
    here = place()
    together = distributed.world_size() > 1
    # else SLURM is noticed, and Lightning requeues by itself
    environment = [] if together else [LightningEnvironment()]
    trainer = pl.Trainer(
        accelerator="gpu" if device(config) == "cuda" else "cpu",
        devices=here.local_world_size if together else 1,
        num_nodes=here.nodes if together else 1,
        strategy=_side_by_side(some_without_gradient) if together else "auto",
        precision=lightning_precision(config),
        max_epochs=1,
        max_steps=total_steps,
        accumulate_grad_batches=config.accumulate,
        callbacks=list(callbacks),
        plugins=[DurableCheckpointIO(), *environment],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    _leave_signals_alone(trainer)
    return trainer


def _leave_signals_alone(trainer: pl.Trainer) -> None:
    """Signals are `signals.SignalWatch`'s.

    Lightning broadcasts from within its handler, which hangs where one process alone got the signal, and asks all
    processes before every batch, which makes a GPU wait.
    """
    connector: Any = trainer._signal_connector
    loop: Any = trainer.fit_loop.epoch_loop
    connector.register_signal_handlers = lambda: None
    if hasattr(loop, "_broadcast_sigterm_tensor"):  # since 2.6
        loop._broadcast_sigterm_tensor = lambda: None


def _side_by_side(some_without_gradient: bool) -> Strategy:
    return DDPStrategy(
        cluster_environment=Environment(place()),
        find_unused_parameters=some_without_gradient,
        gradient_as_bucket_view=True,  # else every gradient is held twice
    )


def processes(config: TrainConfig) -> int:
    """How many processes are to be started here for a training that nobody has launched; 1 is this one alone.

    Raises:
        UsageError: there are not so many GPUs, or a launcher has started another number.
    """
    here, wanted = place(), config.devices
    if not isinstance(wanted, int):
        return 1
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here.launched and wanted not in (here.local_world_size, here.world_size):
        raise UsageError(
            f"train.devices is {wanted}, but the launcher has started {here.local_world_size} processes here, "
            f"{here.world_size} in all; remove train.devices"
        )
    if gpus and wanted > gpus:
        raise UsageError(f"train.devices is {wanted}, but there are {gpus} GPUs; allowed: auto, cpu, or 1 to {gpus}")
    return 1 if here.launched else wanted


def device(config: TrainConfig) -> Literal["cuda", "cpu"]:
    """Where training, probes and predictions run."""
    return "cuda" if config.devices != "cpu" and torch.cuda.is_available() else "cpu"


def lightning_precision(config: TrainConfig) -> Literal["bf16-mixed", "32-true"]:
    """Lightning's name for the precision on this machine. bf16 on a CPU without AMX is many times slower than fp32."""
    bf16 = _has_fast_bf16(device(config)) if config.precision == "auto" else config.precision == "bf16"
    return "bf16-mixed" if bf16 else "32-true"


def silence() -> None:
    """Switch off Lightning's tips, device lines and warnings about choices that are made here on purpose."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*not resumable.*",  # our loader starts at the right batch by itself
        ".*in eval mode at the start of training.*",  # a frozen backbone is
        ".*LeafSpec.*",  # Lightning 2.6 calls a torch helper by its old name
        ".*find_unused_parameters=True was specified.*",  # they come and go with the steps of a probe
    ):
        warnings.filterwarnings("ignore", message=message)


def _has_fast_bf16(kind: Literal["cuda", "cpu"]) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
    return bool(capabilities.get("amx_bf16", False))
