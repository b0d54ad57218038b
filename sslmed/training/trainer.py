"""The one place that builds a Lightning Trainer."""

import logging
import warnings
from collections.abc import Sequence
from typing import Annotated, Literal, Self

import pytorch_lightning as pl
import torch
from pydantic import Field, model_validator
from pytorch_lightning.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]

from sslmed.config import Config
from sslmed.data.sampling import steps_per_epoch
from sslmed.training.checkpoint import DurableCheckpointIO

DEFAULT_EPOCHS = 100


class TrainConfig(Config):
    """How long and on what.

    Attributes:
        epochs: passes over the data; ``max_steps`` counts optimizer steps instead. Give one of them; default 100
            epochs.
        batch_size: samples an optimizer step, over all processes and accumulated batches.
        accumulate: parts in which a step's batch is computed, to save memory; negatives and BatchNorm see one part.
        precision: ``32``; ``bf16``, mixed; ``auto``, bf16 where the hardware multiplies it (a GPU, or a CPU with AMX).
        devices: ``auto`` and 1 are one GPU if there is one, else the CPU; ``cpu`` is the CPU in any case.
        save_every_steps: optimizer steps between checkpoints.
        seed: of every random choice.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] = 256
    accumulate: Annotated[int, Field(ge=1)] = 1
    precision: Literal["auto", "bf16", 32] = "auto"
    devices: Literal["auto", "cpu", 1] = "auto"
    save_every_steps: Annotated[int, Field(ge=1)] = 500
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

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

    def total_steps(self, images: int) -> int:
        """Optimizer steps of a training on ``images`` images."""
        each = steps_per_epoch(images, self.batch_size)
        return self.max_steps or (self.epochs or DEFAULT_EPOCHS) * each


def build_trainer(config: TrainConfig, total_steps: int, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """A Trainer that does nothing by itself: no logger, bar, validation or checkpoint but ours.

    The whole training is one Lightning epoch, because our stream of batches has no seams (see ``data.sampling``).
    """
    silence()
    return pl.Trainer(
        accelerator="gpu" if device(config) == "cuda" else "cpu",
        devices=1,
        precision=lightning_precision(config),
        max_epochs=1,
        max_steps=total_steps,
        accumulate_grad_batches=config.accumulate,
        callbacks=list(callbacks),
        plugins=[
            DurableCheckpointIO(),
            LightningEnvironment(),
        ],  # else SLURM is noticed, and Lightning requeues by itself
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


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
    ):
        warnings.filterwarnings("ignore", message=message)


def _has_fast_bf16(kind: Literal["cuda", "cpu"]) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.11
    return bool(capabilities.get("amx_bf16", False))
