"""What every pretext task is: a LightningModule that owns its views, its loss and its projection heads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pytorch_lightning as pl
import torch
from torch import nn

from sslmed.config import Config
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.raw_batches import RawBatch
from sslmed.data.views import ViewConfig
from sslmed.models.backbones import Backbone, BackboneConfig
from sslmed.optim import OptimConfig, Parameters, decay_groups, scheduled


@dataclass(frozen=True)
class Progress:
    """How far training is, in performed optimizer steps (``step`` of ``total``) and in epochs begun.

    ``batch_size`` is that of an optimizer step, over all processes and accumulated batches.
    """

    step: int
    total: int
    epoch: int
    batch_size: int


@dataclass(frozen=True)
class Course:
    """What a training is going to be.

    Attributes:
        batch_size: images of an optimizer step, over all processes and accumulated parts.
        shape: channels, height and width of a whole view.
        total: optimizer steps.
        steps_per_epoch: alike.
        accumulate: parts of a step, one after another.
        processes: that share each part.
    """

    batch_size: int
    shape: tuple[int, int, int]
    total: int
    steps_per_epoch: int
    accumulate: int = 1
    processes: int = 1

    @property
    def at_once(self) -> int:
        """Images that ``loss`` sees together, over all processes."""
        return self.batch_size // self.accumulate

    @property
    def epochs(self) -> int:
        """Epochs that are begun."""
        return -(-self.total // self.steps_per_epoch)


@dataclass(frozen=True)
class Overfit:
    """How the contract test sees that 8 fixed scans are learnt in ``steps``.

    ``quantity`` is one of the scalars that ``loss`` returns. At the end it is at most ``ratio`` of what it was at the
    beginning, or at least ``least``.
    """

    steps: int
    quantity: str = "loss"
    ratio: float | None = None
    least: float | None = None


class Method(pl.LightningModule, ABC):
    """A pretext task.

    A subclass is one file: a ``Config`` with a ``name``, ``views``, ``loss``, and whatever modules it needs. It is
    built from its config and a backbone and never sees the trainer, the store or the world size. It randomises only
    through ``sslmed.keyed_rng`` with the batch's seed, epoch and ids.

    Attributes:
        compares_views: the views of a sample may come from two images that belong together (``data.positives``).
        example: a small network that the method takes, for the contract tests.
        example_settings: of its config, where the default is too large for them.
        overfit: how the contract test sees that it learns.
        without_gradient: trainable parameters that the loss does not reach, by name.
        sync_batchnorm: BatchNorm takes its statistics from the batches of all processes.
        skipped: the optimizer step at hand changes nothing, because its numbers are not finite.
    """

    Config: ClassVar[type[Config]]
    compares_views: ClassVar[bool] = False
    example: ClassVar[BackboneConfig] = BackboneConfig(name="test_resnet")
    example_settings: ClassVar[dict[str, Any]] = {}
    overfit: ClassVar[Overfit] = Overfit(steps=60, ratio=0.5)
    without_gradient: frozenset[str] = frozenset()
    sync_batchnorm: ClassVar[bool] = False

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.monitored: dict[str, torch.Tensor] = {}
        self.skipped = False

    @abstractmethod
    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """The views that a batch carries, in order."""

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """``loss``, a scalar with gradient; ``embeddings`` (N, D) that must not collapse; any scalars worth logging."""

    def check(self, course: Course) -> None:
        """Refuse settings that do not fit the training; called before anything is written.

        Raises:
            UsageError: they do not.
        """

    def before_step(self, progress: Progress) -> None:
        """Called when the gradients of a step are there, not when it is skipped: to clip or cancel them.

        ``progress.step`` counts the performed steps before this one, from 0.
        """

    def after_step(self, progress: Progress) -> None:
        """Called once after every performed, not skipped, optimizer step: momentum encoders, queues, temperatures."""

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What the user should know before such a training on such images, a sentence a line."""
        return []

    def pictures(self, batch: Batch) -> torch.Tensor | None:
        """What the network makes of images, to look at: (rows, columns, C, H, W) in the views' units, or nothing."""
        return None

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module] | None:
        """The trained module and the one that follows it as a moving average, where there is one."""
        return None

    def parameter_groups(self, weight_decay: float) -> Parameters:
        """Parameter groups for the optimizer; by default weight decay on everything but biases and norm layers."""
        return decay_groups([self], weight_decay)

    @property
    def exported(self) -> nn.Module:
        """The timm network that leaves the run."""
        return self.backbone.network

    @property
    def exported_decoder(self) -> dict[str, torch.Tensor] | None:
        """Tensors that leave the run beside that network, by the names of the segmentation head, which may start there.

        Its neck and its decoder without the last layer; nothing where a method has none like them.
        """
        return None

    @final
    def prepare(self, optim: OptimConfig, batch_size: int, total_steps: int, steps_per_epoch: int) -> None:
        """Set what the optimizer and the schedule need; called once before training."""
        self._optim, self._batch_size = optim, batch_size
        self._total_steps, self._steps_per_epoch = total_steps, steps_per_epoch

    @final
    def on_after_batch_transfer(self, batch: Batch | RawBatch, dataloader_idx: int) -> Batch:
        """The views of a raw batch are made where it has come to."""
        return batch.render() if isinstance(batch, RawBatch) else batch

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        outputs = self.loss(batch)
        self.monitored = {name: value.detach() for name, value in outputs.items()}
        return outputs["loss"]

    @final
    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups(self._optim.weight_decay)
        return scheduled(self._optim, groups, self._batch_size, self._total_steps)

    @final
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.skipped:  # the guard, a callback, has looked at the gradients before
            self.before_step(self._progress(self.trainer.global_step))

    @final
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.skipped:
            return
        self.after_step(self._progress(self.trainer.global_step + 1))  # Lightning counts this step only after the hook

    def _progress(self, step: int) -> Progress:
        return Progress(step, self._total_steps, step // self._steps_per_epoch, self._batch_size)
