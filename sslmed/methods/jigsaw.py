"""Jigsaw puzzles (Noroozi & Favaro, arXiv 1603.09246)."""

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.upright_views import placement_notes, upright_view
from sslmed.data.views import ViewConfig
from sslmed.keyed_rng import rng
from sslmed.methods.method import Course, Method, Overfit
from sslmed.models.backbones import Backbone
from sslmed.models.patch_grid import PLACES, PatchGrid, PatchGridConfig, Share, features
from sslmed.models.permutations import maximal_hamming


class JigsawConfig(PatchGridConfig):
    """The knobs of jigsaw puzzles.

    Attributes:
        permutations: how many orders there are to tell apart. VISSL has 100, 2,000 and 10,000 and finds 100 the best
            for ResNet-50 (MODEL_ZOO.md); the paper has up to 1,000 (section 4.2).
        hidden: width of each patch's projection; VISSL's 1,000 (jigsaw_8gpu_resnet.yaml).
        gap: see `PatchGridConfig`.
        jitter: alike; VISSL's 21 of 85 pixels.
    """

    name: Literal["jigsaw"] = "jigsaw"
    permutations: Annotated[int, Field(ge=2, le=10000)] = 100
    hidden: Annotated[int, Field(ge=1)] = 1000
    gap: Share = 0.0
    jitter: Share = 21 / 85


class Jigsaw(Method):
    """Nine patches of an image are shown in one of some orders: in which?"""

    Config = JigsawConfig
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 32}
    overfit = Overfit(steps=60, quantity="accuracy", least=0.9)
    config: JigsawConfig
    permutations: torch.Tensor

    def __init__(self, config: JigsawConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.grid = PatchGrid(config.gap, config.jitter)
        table = torch.from_numpy(maximal_hamming(config.permutations, PLACES).astype("int64"))
        self.register_buffer("permutations", table)  # which place each patch that is shown comes from, (K, 9)
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, config.hidden), nn.BatchNorm1d(config.hidden), nn.ReLU(inplace=True)
        )
        self.classifier = nn.Linear(PLACES * config.hidden, config.permutations)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One upright view, mirrored where the modality is, as VISSL does; colour mostly dropped."""
        return (upright_view(modality, mirrored=True),)

    def check(self, course: Course) -> None:
        """Patches must be large enough for the network.

        Raises:
            UsageError: they are not; it says which size of images would do.
        """
        self.grid.check(self.backbone, course.shape, "jigsaw")

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Where there is nothing to puzzle, or the solution shows."""
        return placement_notes("jigsaw", modality, self.views(modality)[0])

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The order is predicted from the patches' features, each made without sight of the others."""
        images = batch.views[0]
        patches = self.grid.cut(images, batch.seed, batch.epoch, batch.ids, "jigsaw jitter")
        orders = drawn_orders(batch, len(self.permutations)).to(images.device)
        seen = features(self.backbone, arranged(patches, self.permutations[orders]))
        logits = self.logits(seen)
        accuracy = (logits.detach().argmax(dim=1) == orders).float().mean()
        return {"loss": order_loss(logits, orders), "embeddings": seen.mean(dim=1), "accuracy": accuracy}

    def logits(self, seen: torch.Tensor) -> torch.Tensor:
        """Scores (N, K) of the orders, from the features (N, 9, D) of patches as they are shown."""
        projected = self.projector(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        scores: torch.Tensor = self.classifier(projected.flatten(1))
        return scores


def order_loss(logits: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (N, K) and orders (N,), mean over images (arXiv 1603.09246, section 3.2)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), orders)


def arranged(patches: torch.Tensor, permutations: torch.Tensor) -> torch.Tensor:
    """Each image's patches (N, 9, ...) in its own order (N, 9): first the one at the place that comes first."""
    return patches[torch.arange(len(patches), device=patches.device)[:, None], permutations]


def drawn_orders(batch: Batch, count: int) -> torch.Tensor:
    """One of ``count`` orders an image, (N,), drawn by the batch's seed and epoch and the image's id."""
    drawn = [int(rng(batch.seed, batch.epoch, row, "jigsaw").integers(count)) for row in batch.ids.tolist()]
    return torch.tensor(drawn)
