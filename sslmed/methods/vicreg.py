"""VICReg: variance-invariance-covariance regularisation (Bardes et al., arXiv 2105.04906)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
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

EPSILON = 1e-4  # on the variance (section 4.1)
TARGET = 1.0  # standard deviation of each dimension, gamma in the paper

Weight = Annotated[float, Field(ge=0)]


class VICRegConfig(config.Config):
    """The knobs of VICReg.

    Attributes:
        invariance: weight of the distance between the two views, lambda in the paper (section 4.2).
        variance: weight of what standard deviations lack of 1, mu in the paper: the mean over both views, as in the
            reference (main_vicreg.py). Equation 6 writes their sum.
        covariance: weight of the covariances between dimensions, nu in the paper.
        hidden: width of the expander's two hidden layers.
        out: width of the embedding.
        asymmetric: blur and solarise the two views differently, as the paper does, where the modality allows it.
    """

    name: Literal["vicreg"] = "vicreg"
    invariance: Weight = 25.0
    variance: Weight = 25.0
    covariance: Weight = 1.0
    hidden: Annotated[int, Field(ge=1)] = 8192
    out: Annotated[int, Field(ge=2)] = 8192
    asymmetric: bool = True


class VICReg(Method):
    """Embeddings of two views are near; each dimension keeps its spread, and no two say the same."""

    Config = VICRegConfig
    compares_views = True
    sync_batchnorm = True  # facebookresearch/vicreg, main_vicreg.py
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "out": 32}
    config: VICRegConfig

    def __init__(self, config: VICRegConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.expander = perceptron([backbone.num_features, config.hidden, config.hidden, config.out], bias=True)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """BYOL's views, as in the paper, where solarisation is legal; else both are alike."""
        return view_pair(modality, self.config.asymmetric)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Which settings of views do nothing."""
        return pair_notes(modality, self.config.asymmetric)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Of the embeddings of both views; its three parts are logged unweighted."""
        encoder = nn.Sequential(self.backbone, self.expander)
        first, second = (encoder(view) for view in batch.views)
        knobs = self.config
        found = vicreg_loss(first, second, knobs.invariance, knobs.variance, knobs.covariance)
        return found | {"embeddings": first}


def vicreg_loss(
    first: torch.Tensor, second: torch.Tensor, invariance: float, variance: float, covariance: float
) -> dict[str, torch.Tensor]:
    """lambda s + mu (v + v') / 2 + nu (c + c') of embeddings (N, D) (arXiv 2105.04906, equation 6; reference).

    Returns:
        ``loss``, and its three parts unweighted.
    """
    near, spread, shared = parts(first, second)
    loss = invariance * near + variance * spread + covariance * shared
    return {"loss": loss, "invariance": near, "variance": spread, "covariance": shared}


def parts(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Invariance, variance and covariance of embeddings (N, D), in fp32 or better.

    The first is of this process, so that only the mean over processes is that of the whole batch; the others are of
    the batches of all processes.
    """
    precision = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        a, b = first.to(precision), second.to(precision)
        near = F.mse_loss(a, b)  # equation 5, and over dimensions, as in the reference
        a, b = distributed.gather(a), distributed.gather(b)
        return near, (lack_of_spread(a) + lack_of_spread(b)) / 2, covariance(a) + covariance(b)


def lack_of_spread(embeddings: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - sqrt(var + 1e-4)), mean over dimensions (equation 1); the variance is the unbiased one."""
    deviation = (embeddings.var(dim=0) + EPSILON).sqrt()
    return (TARGET - deviation).relu().mean()


def covariance(embeddings: torch.Tensor) -> torch.Tensor:
    """Squared covariances between different dimensions, summed, over their number D (equations 3 and 4)."""
    centred = embeddings - embeddings.mean(dim=0)
    matrix = centred.T @ centred / (len(embeddings) - 1)
    return (matrix - torch.diag_embed(matrix.diagonal())).square().sum() / embeddings.shape[1]
