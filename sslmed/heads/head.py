"""What every supervised task is: a LightningModule that puts a head on a backbone, in the same shape as a Method."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, final

import pytorch_lightning as pl
import torch
from torch import nn

from sslmed.config import Config
from sslmed.data.loading import Batch
from sslmed.models.backbones import Backbone
from sslmed.optim import OptimConfig, Parameters, decay_groups, scheduled


class Head(pl.LightningModule, ABC):
    """A supervised task on a backbone.

    A subclass is one file: a ``Config`` with a ``name`` and ``train_backbone``, what it ``needs`` of the backbone,
    ``loss``, ``predict`` and ``metrics``. It sets ``self.head``, the module that is saved beside the backbone.

    Attributes:
        needs: ``pooled`` features (N, D).
    """

    Config: ClassVar[type[Config]]
    needs: ClassVar[Literal["pooled"]]
    head: nn.Module

    def __init__(self, config: Any, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.classes = classes
        self.monitored: dict[str, torch.Tensor] = {}

    @abstractmethod
    def loss(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The scalar loss of features and class indices (N,)."""

    @abstractmethod
    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, classes)."""

    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names in ``evaluation.metrics.METRICS``; the first decides early stopping."""

    def parameter_groups(self, weight_decay: float) -> Parameters:
        """Parameter groups for the optimizer: head and backbone, or the head alone."""
        return decay_groups([self.backbone, self.head] if self.config.train_backbone else [self.head], weight_decay)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, classes) of images (N, C, H, W)."""
        return self.predict(self._features(images))

    @final
    def prepare(self, optim: OptimConfig, batch_size: int, total_steps: int, steps_per_epoch: int) -> None:
        """Set what the optimizer and the schedule need; called once before training."""
        self._optim, self._batch_size, self._total_steps = optim, batch_size, total_steps

    @final
    def train(self, mode: bool = True) -> "Head":
        """Training mode; a frozen backbone stays in evaluation mode, or its BatchNorm statistics would drift."""
        super().train(mode)
        if not self.config.train_backbone:
            self.backbone.eval()
        return self

    @final
    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self._features(batch.views[0]), batch.target)
        self.monitored = {"loss": loss.detach()}
        return loss

    @final
    def configure_optimizers(self) -> Any:
        groups = self.parameter_groups(self._optim.weight_decay)
        return scheduled(self._optim, groups, self._batch_size, self._total_steps)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(self.config.train_backbone and torch.is_grad_enabled()):
            features: torch.Tensor = self.backbone(images)
        return features
