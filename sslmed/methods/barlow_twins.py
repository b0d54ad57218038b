"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al., arXiv 2103.03230)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from sslmed import config, distributed
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.view_pairs import pair_notes, view_pair
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method
from sslmed.models.backbones import Backbone
from sslmed.models.perceptrons import perceptron
from sslmed.optim import Parameters

EPSILON = 1e-5  # BatchNorm's, within the root


class BarlowTwinsConfig(config.Config):
    """The knobs of Barlow Twins.

    Attributes:
        redundancy: weight of the off-diagonal terms, the paper's lambda (reference main.py: 0.0051).
        hidden: width of the projector's two hidden layers.
        out: width of the projection; the paper gains up to 16,384 (figure 4). Its square is what a step correlates.
        asymmetric: blur and solarise the two views differently, as the paper does, where the modality allows it.
        bias_share: learning rate of biases and norm layers over that of weights. The reference has 0.0048 / 0.2 =
            0.024 with LARS, which adapts weights alone.
    """

    name: Literal["barlow_twins"] = "barlow_twins"
    redundancy: Annotated[float, Field(gt=0)] = 0.0051
    hidden: Annotated[int, Field(ge=1)] = 8192
    out: Annotated[int, Field(ge=2)] = 8192
    asymmetric: bool = True
    bias_share: Annotated[float, Field(gt=0, le=10)] = 1.0


class BarlowTwins(Method):
    """Across the batch each dimension agrees between the two views, and is uncorrelated with every other."""

    Config = BarlowTwinsConfig
    compares_views = True
    sync_batchnorm = True  # facebookresearch/barlowtwins, main.py
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "out": 64}
    config: BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.projector = perceptron([backbone.num_features, config.hidden, config.hidden, config.out])

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """BYOL's views, as in the paper, where solarisation is legal; else both are alike."""
        return view_pair(modality, self.config.asymmetric)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Which settings of views do nothing."""
        return pair_notes(modality, self.config.asymmetric)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Of the projections of both views; its two parts are logged, the second unweighted."""
        encoder = nn.Sequential(self.backbone, self.projector)
        first, second = (encoder(view) for view in batch.views)
        return barlow_twins_loss(first, second, self.config.redundancy) | {"embeddings": first}

    def parameter_groups(self, weight_decay: float) -> Parameters:
        """As usual; biases and norm layers with their own share of the rate."""
        weights, rest = super().parameter_groups(weight_decay)
        return [weights, rest | {"share": self.config.bias_share}]


def barlow_twins_loss(first: torch.Tensor, second: torch.Tensor, redundancy: float) -> dict[str, torch.Tensor]:
    """sum_i (1 - C_ii)^2 + lambda sum_i sum_j!=i C_ij^2 of projections (N, D) (arXiv 2103.03230, equation 1).

    Returns:
        ``loss``, and its two sums.
    """
    invariant, redundant = parts(cross_correlation(first, second))
    return {"loss": invariant + redundancy * redundant, "invariance": invariant, "redundancy": redundant}


def cross_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """C (D, D) of projections (N, D) over the batches of all processes (equation 2), in fp32 or better.

    Both are centred and divided by their deviation, that of the biased variance, dimension by dimension, as a
    BatchNorm without scale and shift does. A dimension that is constant correlates with nothing.
    """
    precision = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        rows = len(first) * distributed.world_size()
        a, b = (_standardised(each.to(precision), rows) for each in (first, second))
        return distributed.total(a.T @ b) / rows


def parts(correlation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What C (D, D) lacks of 1 on its diagonal, and has beside it; squared, and summed."""
    diagonal = correlation.diagonal()
    beside = correlation - torch.diag_embed(diagonal)
    return (diagonal - 1).square().sum(), beside.square().sum()


def _standardised(projections: torch.Tensor, rows: int) -> torch.Tensor:
    centred = projections - distributed.total(projections.sum(dim=0)) / rows
    variance = distributed.total(centred.square().sum(dim=0)) / rows
    return centred * (variance + EPSILON).rsqrt()
