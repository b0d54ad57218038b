"""What restorative methods share: an image is corrupted, a decoder on the backbone's maps predicts it as it was."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch

from sslmed.data.geometry_view import geometry_view, idle_knobs
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Course, Method, Overfit
from sslmed.models.backbones import Backbone
from sslmed.models.restorer import channels_of, gain_db, restoration_error, restored, unreached, untrained
from sslmed.models.segmenters import PixelDecoder

ROWS = 8  # of pictures


class Restorative(Method):
    """A restorative method says how an image is corrupted; the rest is here.

    Attributes:
        restorer: the decoder, whose neck and body leave the run as a start for segmentation.
    """

    overfit = Overfit(steps=30, ratio=0.3)

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.restorer = PixelDecoder(backbone.levels, channels_of(backbone))
        self.without_gradient = unreached(backbone)

    @abstractmethod
    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images of the batch (N, C, H, W), corrupted, keyed by its seed, its epoch and each image's id."""

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view: the modality's geometry, and intensities as they are, since they are what is predicted."""
        return (geometry_view(modality),)

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Names the settings of views that do nothing here, and what stays untrained."""
        return [*idle_knobs(modality, self.config.name), *untrained(self.backbone, self.config.name)]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error of the restored images; ``gain_db`` is by how much their PSNR is above that of the corrupted."""
        images, corrupted = batch.views[0], self.corrupted(batch)
        clean, embeddings = restored(self.backbone, self.restorer, corrupted)
        return {
            "loss": restoration_error(clean, images),
            "embeddings": embeddings,
            "gain_db": gain_db(clean, corrupted, images),
        }

    def pictures(self, batch: Batch) -> torch.Tensor:
        """For each of the first images the original, corrupted, and restored."""
        few = replace(batch, views=[batch.views[0][:ROWS]], ids=batch.ids[:ROWS])
        corrupted = self.corrupted(few)
        clean, _ = restored(self.backbone, self.restorer, corrupted)
        return torch.stack([few.views[0], corrupted, self.shown(clean, few)], dim=1)

    def shown(self, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What pictures show of restored images: all of them, unless a method restores parts."""
        return clean

    @property
    def exported_decoder(self) -> dict[str, torch.Tensor]:
        return self.restorer.reusable
