"""What every supervised task is: a LightningModule that puts a head on a backbone, in the same shape as a Method."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, final

import pytorch_lightning as pl
import torch
from pydantic import Field
from torch import nn

from sslmed.config import Config, UsageError
from sslmed.data.loading import Batch
from sslmed.data.raw_batches import RawBatch
from sslmed.models.backbones import Backbone
from sslmed.optim import OptimConfig, Parameters, decay_groups, scheduled

Kind = Literal["class", "findings", "mask", "boxes"]
Maps = Sequence[torch.Tensor]


class HeadConfig(Config):
    """How the backbone below a head is trained.

    Attributes:
        frozen: layers of the backbone, counted from the input, that stay as they are: a number, or ``all``. A
            transformer's patch embedding is one layer, as each of its blocks and each residual block of a ResNet is.
        probe_steps: optimizer steps at the beginning that train the head alone; only then the backbone begins, with a
            warm-up of its own (linear probing, then fine-tuning: Kumar et al., arXiv 2202.10054).
        layer_decay: factor on the learning rate from one layer of the backbone to the one before it (BEiT, arXiv
            2106.08254, appendix H; MAE's fine-tuning takes 0.75 for ViT-L and 0.65 for ViT-B).
        ema: of the moving average of the weights, which then is what is checked, kept and tested; 0 is none. In the
            first t steps it is at most (1 + t) / (10 + t), so that the beginning is forgotten.
    """

    frozen: Literal["all"] | Annotated[int, Field(ge=0)] = 0
    probe_steps: Annotated[int, Field(ge=0)] = 0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def tiles(self) -> bool:
        """Whether the network is given windows at an image's own resolution, and not all of it."""
        return False

    @property
    def weighted(self) -> bool:
        """Whether rare classes count more in the loss."""
        return False

    @property
    def drawn_evenly(self) -> bool:
        """Whether the images of every class are drawn equally often."""
        return False


class Head(pl.LightningModule, ABC):
    """A supervised task on a backbone.

    A subclass is one file: a ``Config`` with a ``name``, what it ``needs`` of the backbone, ``logits``, ``loss``,
    ``predict`` and ``metrics``. It sets ``self.head``, the module that is saved beside the backbone.

    Attributes:
        kinds: of targets that it learns: one class an image, several findings an image, a class a pixel, or boxes.
        needs: ``pooled`` features (N, D); or a ``pyramid``, which is a list of the images (N, C, H, W) and the
            backbone's maps from fine to coarse.
        temperature: what logits are divided by before they become probabilities; set by calibration on val patients.
        offset: what is added to them then; of boxes only, whose scores before calibration are no probabilities.
        locates: gives boxes, though it learns labels alone: by ``heat``, of the classes ``located``.
        sync_batchnorm: BatchNorm takes its statistics from the batches of all processes: those of few labels are small.
        skipped: the optimizer step at hand changes nothing, because its numbers are not finite.
    """

    Config: ClassVar[type[HeadConfig]]
    kinds: ClassVar[tuple[Kind, ...]]
    needs: ClassVar[Literal["pooled", "pyramid"]]
    locates: ClassVar[bool] = False
    sync_batchnorm: ClassVar[bool] = True
    head: nn.Module
    weights: torch.Tensor | None

    def __init__(self, config: Any, backbone: Backbone, classes: int, kind: Kind) -> None:
        super().__init__()
        if kind not in self.kinds:
            raise UsageError(f"{config.name} learns {' or '.join(self.kinds)}, not {kind}")
        self.config = config
        self.backbone = backbone
        self.classes = classes
        self.kind = kind
        self.temperature, self.offset = 1.0, 0.0
        self.register_buffer("weights", None, persistent=False)
        self.monitored: dict[str, torch.Tensor] = {}
        self.skipped = False
        if config.frozen:
            self.backbone.freeze(config.frozen)

    @abstractmethod
    def logits(self, features: Any) -> torch.Tensor:
        """(N, classes), (N, classes, H, W) of masks, (N, places, classes) of boxes; at least fp32."""

    @abstractmethod
    def loss(self, features: Any, target: torch.Tensor) -> torch.Tensor:
        """The scalar loss of features and target, which is as in `Batch.target`."""

    @abstractmethod
    def predict(self, features: Any) -> torch.Tensor:
        """Probabilities, of the shape of ``logits``; of boxes (N, most, 6), see `Localization.predict`."""

    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured; the first decides early stopping and is better when larger."""

    def named(self, classes: Sequence[str]) -> None:
        """Take note of what the classes are called, once, before anything else.

        Raises:
            UsageError: the config names a class that is not among them.
        """

    def start_from(self, decoder: Mapping[str, torch.Tensor] | None) -> tuple[str, ...]:
        """Take over neck and decoder of a pretext task, before training, where the head has such; what to say of it.

        Args:
            decoder: tensors by the names that they have in `Segmentation.head`; None where the start has none.

        Raises:
            DataError: they do not fit.
        """
        return ()

    def balance(self, counts: torch.Tensor) -> None:
        """Take note of how often the train images show each class, before training; used when the config asks for it.

        Args:
            counts: (classes,) images or pixels; of findings (classes, 2), without and with.
        """

    def mixed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and the target that training sees of a batch."""
        return batch.views[0], batch.target

    def features(self, images: torch.Tensor) -> Any:
        """What the head ``needs``, of images (N, C, H, W)."""
        return self.backbone(images) if self.needs == "pooled" else [images, *self.backbone.maps(images)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities, or boxes, of images (N, C, H, W)."""
        return self.predict(self.features(images))

    @property
    def without_gradient(self) -> frozenset[str]:
        """Trainable parameters that not every step reaches, by name: the backbone's while the head is probed."""
        if not self.config.probe_steps:
            return frozenset()
        return frozenset(f"backbone.{name}" for name, _ in self.backbone.named_parameters())

    @final
    def parameter_groups(self, weight_decay: float) -> Parameters:
        """The head's parameters, and those of the backbone that are trained, each layer with its share of the rate.

        The backbone's begin after ``probe_steps``.
        """
        layers = [([*self.backbone.network.parameters()], 1.0)]
        if self.config.layer_decay < 1:
            number, depth = self.backbone.layers()  # the head stands at ``depth``, with a share of 1
            named = [*self.backbone.network.named_parameters()]
            layers = [
                ([p for name, p in named if number[name] == layer], self.config.layer_decay ** (depth - layer))
                for layer in range(depth + 1)
            ]
        groups = decay_groups([self.head], weight_decay)
        for members, share in layers:
            own = decay_groups([nn.ParameterList(members)], weight_decay)
            groups += [group | {"share": share, "begin": self.config.probe_steps} for group in own]
        return [group for group in groups if group["params"]]

    @final
    def prepare(self, optim: OptimConfig, batch_size: int, total_steps: int, steps_per_epoch: int) -> None:
        """Set what the optimizer and the schedule need; called once before training."""
        if self.config.probe_steps >= total_steps and self.config.frozen != "all":
            raise UsageError(
                f"head.probe_steps is {self.config.probe_steps}, of {total_steps} steps in all: the backbone would "
                "never be trained; give fewer, or head.frozen=all"
            )
        self._optim, self._batch_size, self._total_steps = optim, batch_size, total_steps

    @final
    def on_after_batch_transfer(self, batch: Batch | RawBatch, dataloader_idx: int) -> Batch:
        """The views of a raw batch are made where it has come to."""
        return batch.render() if isinstance(batch, RawBatch) else batch

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        images, target = self.mixed(batch)
        probing = self.config.frozen == "all" or self.global_step < self.config.probe_steps
        self.backbone.train(not probing)  # or the statistics of BatchNorm would drift
        with torch.set_grad_enabled(not probing):
            features = self.features(images)
        loss = self.loss(features, target)
        self.monitored = {"loss": loss.detach()}
        return loss

    @final
    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups(self._optim.weight_decay)
        return scheduled(self._optim, groups, self._batch_size, self._total_steps)


def full(logits: torch.Tensor) -> torch.Tensor:
    """In fp32 or better, for a loss or a probability."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
