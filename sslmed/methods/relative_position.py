"""Relative position: context prediction (Doersch et al., arXiv 1505.05192)."""

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

NEIGHBOURS = PLACES - 1
CENTRE = PLACES // 2


class RelativePositionConfig(PatchGridConfig):
    """The knobs of relative position.

    Attributes:
        all_eight: every image gives a question for each of its eight neighbours, as in mmselfsup; otherwise for one,
            drawn at random.
        gap: see `PatchGridConfig`; the paper's 34 of 144 pixels (section 3.1: patches of 96, 48 apart, moved by
            up to 7 either way). mmselfsup has none.
        jitter: alike; the paper's 14 of 144. mmselfsup has 21 of 85.
        hidden: width of the layer that sees both patches; mmselfsup's (relative_loc_neck.py).
        dropout: of that layer, alike.
    """

    name: Literal["relative_position"] = "relative_position"
    all_eight: bool = True
    gap: Share = 34 / 144
    jitter: Share = 14 / 144
    hidden: Annotated[int, Field(ge=1)] = 4096
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5


class RelativePosition(Method):
    """Where, of eight places, does a patch lie beside the patch in the middle?"""

    Config = RelativePositionConfig
    example_settings: ClassVar[dict[str, Any]] = {"hidden": 64, "dropout": 0.0}
    overfit = Overfit(steps=60, quantity="accuracy", least=0.9)
    config: RelativePositionConfig

    def __init__(self, config: RelativePositionConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.grid = PatchGrid(config.gap, config.jitter)
        first = nn.Linear(2 * backbone.num_features, config.hidden)
        self.projector = nn.Sequential(
            first,
            nn.BatchNorm1d(config.hidden, momentum=0.003),
            nn.ReLU(inplace=True),
            nn.Dropout(config.dropout),
        )
        self.classifier = nn.Linear(config.hidden, NEIGHBOURS)
        for layer, deviation in ((first, 0.01), (self.classifier, 0.005)):  # mmselfsup's
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One upright view that is never mirrored; colour mostly dropped."""
        return (upright_view(modality, mirrored=False),)

    def check(self, course: Course) -> None:
        """Patches must be large enough for the network.

        Raises:
            UsageError: they are not; it says which size of images would do.
        """
        self.grid.check(self.backbone, course.shape, "relative_position")

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Where the place cannot be told, or is given away."""
        return placement_notes("relative_position", modality, self.views(modality)[0])

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Every patch goes through the network once, by itself; pairs meet after it."""
        images = batch.views[0]
        patches = self.grid.cut(images, batch.seed, batch.epoch, batch.ids, "relative position jitter")
        places = (all_places(len(images)) if self.config.all_eight else one_place(batch)).to(images.device)
        shown = patches[torch.arange(len(images), device=images.device)[:, None], with_centre(places)]
        seen = features(self.backbone, shown)
        logits = self.logits(seen[:, :1].expand(-1, places.shape[1], -1), seen[:, 1:])
        answers = places.flatten()
        accuracy = (logits.detach().argmax(dim=1) == answers).float().mean()
        return {"loss": place_loss(logits, answers), "embeddings": seen.mean(dim=1), "accuracy": accuracy}

    def logits(self, centres: torch.Tensor, neighbours: torch.Tensor) -> torch.Tensor:
        """Scores (N · Q, 8) of the places, from the features (N, Q, D) of the two patches of each question."""
        scores: torch.Tensor = self.classifier(self.projector(torch.cat([centres, neighbours], dim=2).flatten(0, 1)))
        return scores


def place_loss(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (M, 8) and places (M,), mean over pairs (arXiv 1505.05192, section 3)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), places)


def all_places(count: int) -> torch.Tensor:
    """Each of the eight places once an image, (N, 8): row by row, without the middle."""
    return torch.arange(NEIGHBOURS).expand(count, -1)


def one_place(batch: Batch) -> torch.Tensor:
    """A place an image, (N, 1), drawn by the batch's seed and epoch and the image's id."""
    drawn = [
        int(rng(batch.seed, batch.epoch, row, "relative position").integers(NEIGHBOURS)) for row in batch.ids.tolist()
    ]
    return torch.tensor(drawn)[:, None]


def with_centre(places: torch.Tensor) -> torch.Tensor:
    """The cells of the grid that are shown, (N, 1 + Q): the middle one, then those of the places (N, Q)."""
    cells = places + (places >= CENTRE)
    return torch.cat([torch.full_like(cells[:, :1], CENTRE), cells], dim=1)
