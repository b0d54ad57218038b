"""MoCo v3: momentum contrast without a queue, for vision transformers too (Chen et al., arXiv 2104.02057)."""

import math
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
from sslmed.methods.method import Course, Method, Overfit, Progress
from sslmed.models.backbones import Backbone, Eva, PatchEmbed, VisionTransformer
from sslmed.models.momentum import MomentumRule, cosine_momentum, follow, follower, momentum_at, momentum_notes
from sslmed.models.perceptrons import perceptron
from sslmed.models.twins import twin_accuracy
from sslmed.models.unit_length import unit


class MoCoV3Config(config.Config):
    """The knobs of MoCo v3.

    Attributes:
        temperature: of the softmax; by default 1.0, and 0.2 with a vision transformer, as in the reference (CONFIG.md).
        momentum: of the momentum encoder at the start; a cosine leads it to 1. Quoted for a batch of 256, like learning
            rates. The reference has 0.99 for 100 and 300 epochs and 0.996 for 1000, of 1.28 million images at batch
            4096 (``momentum_rule=constant``).
        momentum_rule: ``scaled``, momentum ** (B / 256) at global batch B (Busbridge et al., arXiv 2307.13813), so
            that the memory is one of samples; ``constant``.
        hidden: width of the hidden layers of projector and predictor.
        out: width of projection and prediction.
        asymmetric: blur and solarise the two views differently, as the reference does, where the modality allows it.
        freeze_patches: leave a vision transformer's patch embedding as it is drawn, which keeps training stable
            (section 4.2, "A Trick for Improving Stability"); of no effect on other networks.
    """

    name: Literal["moco_v3"] = "moco_v3"
    temperature: Annotated[float, Field(gt=0, le=10)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    momentum_rule: MomentumRule = "scaled"
    hidden: Annotated[int, Field(ge=1)] = 4096
    out: Annotated[int, Field(ge=2)] = 256
    asymmetric: bool = True
    freeze_patches: bool = True


class MoCoV3(Method):
    """A prediction from each view finds the other view's momentum projection among those of the global batch."""

    Config = MoCoV3Config
    compares_views = True
    sync_batchnorm = True  # facebookresearch/moco-v3, main_moco.py
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "out": 32}
    # keys move, so that the loss may rise while something is learnt
    overfit = Overfit(steps=60, quantity="twin_accuracy", least=0.9)
    config: MoCoV3Config

    def __init__(self, config: MoCoV3Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        transformer = isinstance(backbone.network, VisionTransformer | Eva)
        if transformer and config.freeze_patches:
            freeze_patches(backbone)
        self.temperature = config.temperature or (0.2 if transformer else 1.0)
        hidden = [config.hidden] * (2 if transformer else 1)
        self.projector = perceptron([backbone.num_features, *hidden, config.out], last_norm=True)
        self.predictor = perceptron([config.out, config.hidden, config.out], last_norm=transformer)
        self.momentum_backbone = follower(self.backbone)
        self.momentum_projector = follower(self.projector)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """BYOL's views, as in the reference, where solarisation is legal; else both are alike."""
        return view_pair(modality, self.config.asymmetric)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """What the momentum becomes at this batch size, and which settings of views do nothing."""
        found = momentum_notes(course.batch_size, self.config.momentum, self.config.momentum_rule)
        return [*found, *pair_notes(modality, self.config.asymmetric)]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Both directions, summed."""
        first, second = batch.views
        online = nn.Sequential(self.backbone, self.projector)
        z1, z2 = online(first), online(second)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            momentum = nn.Sequential(self.momentum_backbone, self.momentum_projector)
            k1, k2 = momentum(first), momentum(second)
        return {
            "loss": symmetric_loss(q1, q2, k1, k2, self.temperature, batch.groups),
            "embeddings": z1,
            "twin_accuracy": twin_accuracy(q1, k2),
        }

    def after_step(self, progress: Progress) -> None:
        """The momentum encoder follows.

        The reference moves it before the next step's keys, with the momentum of that step: the same. So it does not
        move after the last.
        """
        base = momentum_at(progress.batch_size, self.config.momentum, self.config.momentum_rule)
        online, average = self.averaged
        follow(average, online, cosine_momentum(base, progress.step, progress.total))

    @property
    def averaged(self) -> tuple[nn.Module, nn.Module]:
        """Backbone and projector, and the momentum encoder's."""
        online = nn.ModuleList([self.backbone, self.projector])
        return online, nn.ModuleList([self.momentum_backbone, self.momentum_projector])


def symmetric_loss(
    q1: torch.Tensor,
    q2: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    temperature: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each view's predictions against the other view's keys, summed (arXiv 2104.02057, algorithm 1). Inputs (N, D)."""
    return contrastive_loss(q1, k2, temperature, groups) + contrastive_loss(q2, k1, temperature, groups)


def contrastive_loss(
    queries: torch.Tensor, keys: torch.Tensor, temperature: float, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """2 T times InfoNCE of queries (N, D) with the keys (N, D) of all processes (arXiv 2104.02057, equation 1).

    Row i's positive is row i; no gradient reaches keys. Rows of equal ``groups`` (N,) do not repel each other.
    """
    with torch.autocast(queries.device.type, enabled=False):
        q, k = unit(queries), distributed.gather(unit(keys.detach()))
        logits = q @ k.T / temperature
        here = torch.arange(len(q), device=q.device)
        positive = here + distributed.rank() * len(q)
        if groups is not None:
            friends = groups[:, None] == distributed.gather(groups)
            friends[here, positive] = False
            logits = logits.masked_fill(friends, -torch.inf)
        return 2 * temperature * F.cross_entropy(logits, positive)


def freeze_patches(backbone: Backbone) -> None:
    """Stop training the patch embedding; unless its weights mean something, draw it as the linear layer that it is.

    Xavier-uniform with bias 0, as in the reference (facebookresearch/moco-v3, vits.py).
    """
    embedding = backbone.network.patch_embed
    if not isinstance(embedding, PatchEmbed):  # a convolutional stem, which trains stably
        return
    weight, bias = embedding.proj.weight, embedding.proj.bias
    if not backbone.pretrained:
        bound = math.sqrt(6 / (weight[0].numel() + len(weight)))
        nn.init.uniform_(weight, -bound, bound)
        if bias is not None:
            nn.init.zeros_(bias)
    embedding.requires_grad_(False)
