"""Classification: one class an image, or several findings by themselves, from pooled features."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed.data.loading import Batch
from sslmed.heads.head import Head, HeadConfig, Kind, full
from sslmed.keyed_rng import rng
from sslmed.models.backbones import Backbone


class ClassificationConfig(HeadConfig):
    """The knobs of classification.

    Attributes:
        hidden: width of a hidden layer with GELU; 0 is a linear classifier.
        dropout: of what enters the last layer.
        balance: what is done about rare classes: nothing; ``weights``, the loss of an image counts inversely to how
            many train images have its class (of findings: all positives as much as all negatives); ``sampling``,
            each class is drawn equally often (of findings: by the rarest that an image has).
        mixup: alpha of mixup (Zhang et al., arXiv 1710.09412); 0 mixes nothing.
    """

    name: Literal["classification"] = "classification"
    hidden: Annotated[int, Field(ge=0, le=8192)] = 0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    balance: Literal["none", "weights", "sampling"] = "none"
    mixup: Annotated[float, Field(ge=0, le=10)] = 0.0

    @property
    def weighted(self) -> bool:
        return self.balance == "weights"

    @property
    def drawn_evenly(self) -> bool:
        return self.balance == "sampling"


class Classification(Head):
    """Softmax cross-entropy of classes, binary cross-entropy of findings; unknown findings count for nothing.

    The last layer starts at zero, which is equal probabilities for every class.
    """

    Config = ClassificationConfig
    config: ClassificationConfig
    kinds = ("class", "findings")
    needs = "pooled"

    def __init__(self, config: ClassificationConfig, backbone: Backbone, classes: int, kind: Kind = "class") -> None:
        super().__init__(config, backbone, classes, kind)
        width = config.hidden or backbone.num_features
        before = [nn.Linear(backbone.num_features, width), nn.GELU()] if config.hidden else []
        last = nn.Linear(width, classes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(*before, nn.Dropout(config.dropout), last)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return full(self.head(features))

    def loss(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy, in fp32 or better under autocast; ``target`` may be mixed: (N, classes) shares of each."""
        logits = self.logits(features)
        if self.kind == "class":
            return F.cross_entropy(logits, target, weight=self.weights)
        known = target >= 0
        each = F.binary_cross_entropy_with_logits(
            logits, target.clamp_min(0).to(logits.dtype), pos_weight=self.weights, reduction="none"
        )
        return (each * known).sum() / known.sum().clamp_min(1)

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities: of classes they sum to 1, of findings each stands for itself."""
        logits = self.logits(features) / self.temperature
        return logits.softmax(dim=1) if self.kind == "class" else logits.sigmoid()

    def metrics(self) -> tuple[str, ...]:
        """AUROC decides early stopping: it needs no threshold."""
        return (
            "auroc",
            "average_precision",
            "sensitivity_at_90_specificity",
            "specificity_at_90_sensitivity",
            "balanced_accuracy",
            "f1",
            "precision",
            "recall",
            "mcc",
            "ece",
            "brier",
        )

    def balance(self, counts: torch.Tensor) -> None:
        if self.config.balance != "weights":
            return
        counts = counts.to(torch.float32).clamp_min(1)
        self.weights = counts[:, 0] / counts[:, 1] if self.kind == "findings" else counts.mean() / counts

    def mixed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each image with its neighbour from the other end of the batch, in one share for the whole batch.

        The share is keyed by the first image, so that a resumed run mixes alike.
        """
        images, target = batch.views[0], batch.target
        if not self.config.mixup:
            return images, target
        share = float(rng(batch.seed, batch.epoch, int(batch.ids[0]), "mixup").beta(*(self.config.mixup,) * 2))
        if self.kind == "class":
            target = F.one_hot(target, self.classes)
        unknown = (target < 0) | (target.flip(0) < 0)
        blend = target * share + target.flip(0) * (1 - share)
        return images * share + images.flip(0) * (1 - share), blend.masked_fill(unknown, -1.0)
