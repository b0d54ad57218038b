"""Classification: one class an image, from a linear layer on pooled features."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from sslmed import config
from sslmed.heads.head import Head
from sslmed.models.backbones import Backbone


class ClassificationConfig(config.Config):
    """The knobs of classification.

    Attributes:
        train_backbone: fine-tune the whole network; otherwise the backbone stays frozen.
    """

    name: Literal["classification"] = "classification"
    train_backbone: bool = True


class Classification(Head):
    """Softmax cross-entropy. The layer starts at zero, which is equal probabilities for every class."""

    Config = ClassificationConfig
    config: ClassificationConfig
    needs = "pooled"

    def __init__(self, config: ClassificationConfig, backbone: Backbone, classes: int) -> None:
        super().__init__(config, backbone, classes)
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def loss(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, in fp32 or better under autocast."""
        return F.cross_entropy(self._logits(features), target)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Softmax probabilities."""
        return self._logits(features).softmax(dim=1)

    def metrics(self) -> tuple[str, ...]:
        """AUROC decides early stopping: it needs no threshold."""
        return "auroc", "average_precision", "balanced_accuracy", "f1"

    def _logits(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(features)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
