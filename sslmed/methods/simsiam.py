"""SimSiam: exploring simple Siamese representation learning (Chen and He, arXiv 2011.10566)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sslmed import config
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Method, Overfit
from sslmed.models.backbones import Backbone
from sslmed.models.perceptrons import perceptron
from sslmed.models.twins import twin_accuracy
from sslmed.models.unit_length import unit
from sslmed.optim import Parameters


class SimSiamConfig(config.Config):
    """The knobs of SimSiam.

    Attributes:
        hidden: width of the projector's two hidden layers; 2048 is ResNet-50's feature width, as in the reference.
        out: width of projection and prediction.
        bottleneck: width of the predictor's hidden layer, a quarter of ``out`` in the paper.
    """

    name: Literal["simsiam"] = "simsiam"
    hidden: Annotated[int, Field(ge=1)] = 2048
    out: Annotated[int, Field(ge=2)] = 2048
    bottleneck: Annotated[int, Field(ge=1)] = 512


class SimSiam(Method):
    """The prediction from one view meets the other view's projection, which gets no gradient. Nothing repels."""

    Config = SimSiamConfig
    compares_views = True
    sync_batchnorm = True  # arXiv 2011.10566, section 3, "Baseline settings"
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "out": 64, "bottleneck": 16}
    overfit = Overfit(steps=60, quantity="twin_accuracy", least=0.8)  # of twins, 1/8 by chance; the loss ends near -1
    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = perceptron([backbone.num_features, config.hidden, config.hidden, config.out], last_norm=True)
        self.predictor = perceptron([config.out, config.bottleneck, config.out], last_bias=True)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """Both views come from the same distribution."""
        return modality.view, modality.view

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Both directions, each half; the embedding is the projection, whose spread the paper watches."""
        first, second = batch.views
        encoder = nn.Sequential(self.backbone, self.projector)
        z1, z2 = encoder(first), encoder(second)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return {"loss": symmetric_loss(p1, p2, z1, z2), "embeddings": z1, "twin_accuracy": twin_accuracy(p1, z2)}

    def parameter_groups(self, weight_decay: float) -> Parameters:
        """Weight decay on everything (appendix A); the predictor's rate stays at its peak (section 4.2)."""
        predictor = list(self.predictor.parameters())
        own = set(predictor)
        others = [parameter for parameter in self.parameters() if parameter.requires_grad and parameter not in own]
        return [
            {"params": others, "weight_decay": weight_decay},
            {"params": predictor, "weight_decay": weight_decay, "constant": True},
        ]


def symmetric_loss(p1: torch.Tensor, p2: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Half of both directions (arXiv 2011.10566, equations 2 and 4): from -1 to 1. Inputs are (N, D)."""
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2


def negative_cosine(prediction: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """- cos(p, z), mean over rows (equations 1 and 3); no gradient reaches the projection."""
    return -(unit(prediction) * unit(projection.detach())).sum(dim=1).mean()
