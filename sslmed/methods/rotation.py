"""Rotation prediction, RotNet (Gidaris et al., arXiv 1803.07728)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from sslmed import config
from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality, changed_knobs
from sslmed.data.views import ViewConfig
from sslmed.keyed_rng import rng
from sslmed.methods.method import Course, Method, Overfit
from sslmed.models.backbones import Backbone

TURNS = 4
STEEPEST = 15.0  # degrees; from 45 on a tilt would contradict the label


class RotationConfig(config.Config):
    """The knobs of rotation prediction.

    Attributes:
        all_four: every image comes in all four rotations, four times the batch, as in the paper; otherwise in one,
            drawn at random, as in VISSL (rotnet_8gpu_resnet.yaml).
        circle: blank what lies outside the inscribed circle: side markers and text in the corners, and the edges.
    """

    name: Literal["rotation"] = "rotation"
    all_four: bool = True
    circle: bool = False


class Rotation(Method):
    """By which multiple of 90 degrees was the image turned?"""

    Config = RotationConfig
    overfit = Overfit(steps=60, quantity="accuracy", least=0.9)
    config: RotationConfig

    def __init__(self, config: RotationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.classifier = nn.Linear(backbone.num_features, TURNS)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view without what changes the answer: quarter turns, vertical flips, steep tilts."""
        view = modality.view
        return (view.model_copy(update={"rot90": 0.0, "vflip": 0.0, "rotate": min(view.rotate, STEEPEST)}),)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Where the task cannot be solved, or can be solved without looking at the anatomy."""
        name = modality.name
        found = []
        if modality.upright is False:
            found.append(
                f"warning: {name} images have no up and down, so that their rotation cannot be told; use another method"
            )
        elif modality.upright is None:
            found.append(f"note: where {name} images have no up and down (tissue, smears) no rotation can be told")
        if modality.annotated and not self.config.circle:
            found.append(
                f"warning: {name} images may carry side markers or burned-in text, which give the rotation away; "
                "method.circle=true blanks the corners"
            )
        elif modality.annotated is None and not self.config.circle:
            found.append(f"note: where {name} images carry text or markers, method.circle=true blanks the corners")
        (own,) = self.views(modality)
        idle = [knob for knob in sorted(changed_knobs(modality)) if getattr(own, knob) != getattr(modality.view, knob)]
        if idle:
            found.append(
                f"rotation limits {', '.join(f'views.{knob}' for knob in idle)}: it would contradict the label"
            )
        return found

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The turns are predicted from pooled features."""
        images = batch.views[0]
        if images.shape[2] != images.shape[3]:
            raise UsageError(
                f"rotation needs square images, not {images.shape[2]} x {images.shape[3]}: a quarter turn would show "
                "in the shape; give data.size as one number"
            )
        if self.config.circle:
            images = inside_circle(images)
        images, turns = all_turns(images) if self.config.all_four else one_turn(images, batch)
        features = self.backbone(images)
        logits = self.classifier(features)
        accuracy = (logits.detach().argmax(dim=1) == turns).float().mean()
        return {"loss": turn_loss(logits, turns), "embeddings": features[: len(batch.ids)], "accuracy": accuracy}


def turn_loss(logits: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (N, 4) and turns (N,), mean over images and rotations (arXiv 1803.07728, equation 3)."""
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), turns)


def all_turns(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, S, S) -> (4N, C, S, S) and labels (4N,): all images unturned, then all by one quarter counter-clockwise...

    Exact: pixels move, nothing is interpolated.
    """
    turned = torch.cat([torch.rot90(images, k, (2, 3)) for k in range(TURNS)])
    return turned, torch.arange(TURNS, device=images.device).repeat_interleave(len(images))


def one_turn(images: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image turned once, by a draw keyed by the batch's seed and epoch and the image's id; labels (N,)."""
    drawn = [int(rng(batch.seed, batch.epoch, int(row), "rotation").integers(TURNS)) for row in batch.ids]
    turned = torch.stack([torch.rot90(image, k, (1, 2)) for image, k in zip(images, drawn, strict=True)])
    return turned, torch.tensor(drawn, device=images.device)


def inside_circle(images: torch.Tensor) -> torch.Tensor:
    """Zero, the middle of the normalised range, outside the circle that the square (N, C, S, S) inscribes."""
    side = images.shape[2]
    distance = torch.arange(side, device=images.device) - (side - 1) / 2
    inside = distance[:, None] ** 2 + distance[None] ** 2 <= (side / 2) ** 2
    return images * inside
