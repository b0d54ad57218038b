"""BYOL: bootstrap your own latent (Grill et al., arXiv 2006.07733)."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from sslmed import config
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.view_pairs import pair_notes, view_pair
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone
from sslmed.models.momentum import MomentumRule, cosine_momentum, follow, follower, momentum_at, momentum_notes
from sslmed.models.perceptrons import perceptron
from sslmed.models.twins import twin_accuracy
from sslmed.models.unit_length import unit


class BYOLConfig(config.Config):
    """The knobs of BYOL.

    Attributes:
        momentum: of the target network at the start; a cosine leads it to 1. Quoted for a batch of 256, like learning
            rates. The reference has 0.97, 0.99 and 0.996 for 40, 300 and 1000 epochs of 1.28 million images at batch
            4096; a set a thousand times smaller needs a shorter memory.
        momentum_rule: ``scaled``, momentum ** (B / 256) at global batch B (Busbridge et al., arXiv 2307.13813), so
            that the memory is one of samples; ``constant``.
        hidden: width of the hidden layer of projector and predictor.
        out: width of projection and prediction.
        asymmetric: blur and solarise the two views differently, as the paper does, where the modality allows it.
        pool_batchnorm: normalise both views together; the reference keeps them apart.
    """

    name: Literal["byol"] = "byol"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    momentum_rule: MomentumRule = "scaled"
    hidden: Annotated[int, Field(ge=1)] = 4096
    out: Annotated[int, Field(ge=2)] = 256
    asymmetric: bool = True
    pool_batchnorm: bool = False


class BYOL(Method):
    """The online network predicts what a slowly following target network makes of the other view."""

    Config = BYOLConfig
    compares_views = True
    sync_batchnorm = True  # statistics go across devices (deepmind-research/byol, configs/byol.py: cross_replica_axis)
    # the target moves, so that the loss may rise while something is learnt
    overfit = Overfit(steps=60, quantity="twin_accuracy", least=0.9)
    config: BYOLConfig

    def __init__(self, config: BYOLConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        # a bias before BatchNorm and none at the end (section 3.3; reference networks.py)
        self.projector = perceptron([backbone.num_features, config.hidden, config.out], bias=True)
        self.predictor = perceptron([config.out, config.hidden, config.out], bias=True)
        self.target_backbone = follower(self.backbone)
        self.target_projector = follower(self.projector)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """The paper's asymmetry (table 6) needs solarisation; where that is not legal both are alike."""
        return view_pair(modality, self.config.asymmetric)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What the momentum becomes at this batch size, and which settings of views do nothing."""
        found = momentum_notes(course.batch_size, self.config.momentum, self.config.momentum_rule)
        return [*found, *pair_notes(modality, self.config.asymmetric)]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The regression of each view's target projection from the other view's online prediction, both summed."""
        first, second = batch.views[0], batch.views[1]
        z1, z2 = self._each(nn.Sequential(self.backbone, self.projector), first, second)
        p1, p2 = self._each(self.predictor, z1, z2)
        with torch.no_grad():
            t1, t2 = self._each(nn.Sequential(self.target_backbone, self.target_projector), first, second)
        return {"loss": symmetric_loss(p1, p2, t1, t2), "embeddings": z1, "twin_accuracy": twin_accuracy(p1, t2)}

    def after_step(self, progress: Progress) -> None:
        """The target follows, after the step, with the momentum of the step's number counted from 0."""
        base = momentum_at(progress.batch_size, self.config.momentum, self.config.momentum_rule)
        momentum = cosine_momentum(base, progress.step - 1, progress.total)
        online, average = self.averaged
        follow(average, online, momentum)

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """Backbone and projector, and the target's."""
        online = nn.ModuleList([self.backbone, self.projector])
        return online, nn.ModuleList([self.target_backbone, self.target_projector])

    def _each(self, network: nn.Module, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.config.pool_batchnorm:
            return network(first), network(second)
        both = network(torch.cat([first, second]))
        return both[: len(first)], both[len(first) :]


def symmetric_loss(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """Both directions, summed: from 0 to 8. Predictions and targets of the two views, (N, D) each."""
    return regression_loss(p1, t2) + regression_loss(p2, t1)


def regression_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """|p/|p| - t/|t||^2 = 2 - 2 cos(p, t), mean over rows (arXiv 2006.07733, equation 2): from 0 to 4.

    Inputs are (N, D); no gradient reaches the target.
    """
    return (2 - 2 * (unit(prediction) * unit(target.detach())).sum(dim=1)).mean()
