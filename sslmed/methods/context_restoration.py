"""Context restoration: patches that changed places (Chen et al., Medical Image Analysis 58, 2019)."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from sslmed import config
from sslmed.config import UsageError
from sslmed.data.geometry_view import geometry_view, idle_knobs
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.data.views import ViewConfig
from sslmed.methods.method import Method, Overfit
from sslmed.models.backbones import Backbone
from sslmed.models.corruptions import moved, swap_cells, swap_sources
from sslmed.models.masking import keyed_noise
from sslmed.models.restorer import (
    channels_of,
    gain_db,
    restoration_error,
    restored,
    unreached,
    untrained,
)
from sslmed.models.segmenters import PixelDecoder

ROWS = 8  # of pictures


class ContextRestorationConfig(config.Config):
    """The knobs of context restoration.

    Attributes:
        swaps: pairs of patches that change places, T of the paper's algorithm 1.
        patch: side of a patch over that of the image. How many and how large is our choice: 10 pairs of an eighth move
            a third of the image.
    """

    name: Literal["context_restoration"] = "context_restoration"
    swaps: Annotated[int, Field(ge=1)] = 10
    patch: Annotated[float, Field(gt=0, le=0.34)] = 0.125


class ContextRestoration(Method):
    """Patches have changed places in pairs; the image as it was is predicted.

    The paper swaps at random places, one pair after another, so that a patch may be moved twice. Here the patches of an
    image are cells of a grid at a random offset and no cell moves twice, so that all swaps are one permutation of
    pixels. Either way the histogram stays, and only places are wrong.
    """

    Config = ContextRestorationConfig
    overfit = Overfit(steps=30, ratio=0.3)
    config: ContextRestorationConfig

    def __init__(self, config: ContextRestorationConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.restorer = PixelDecoder(backbone.levels, channels_of(backbone))
        self.without_gradient = unreached(backbone)

    def views(self, modality: Modality) -> tuple[ViewConfig, ...]:
        """One view: the modality's geometry, and intensities as they are, since they are what is predicted."""
        return (geometry_view(modality),)

    def notes(self, modality: Modality, batch_size: int) -> list[str]:
        """Names the settings of views that do nothing here, and what stays untrained."""
        return [*idle_knobs(modality, self.config.name), *untrained(self.backbone, self.config.name)]

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error of the restored images; ``gain_db`` is above 0 where that is less than leaving them as they are."""
        images = batch.views[0]
        disordered = self.corrupted(batch)
        ordered, embeddings = restored(self.backbone, self.restorer, disordered)
        return {
            "loss": restoration_error(ordered, images),
            "embeddings": embeddings,
            "gain_db": gain_db(ordered, disordered, images),
        }

    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images of the batch with swapped patches, keyed by seed, epoch and each image's id.

        Raises:
            UsageError: there are not so many patches.
        """
        images = batch.views[0]
        height, width = images.shape[-2:]
        patch = max(1, round(height * self.config.patch)), max(1, round(width * self.config.patch))
        rows, columns = swap_cells((height, width), patch)
        if rows * columns < 2 * self.config.swaps:
            raise UsageError(
                f"'method.swaps' is {self.config.swaps}, but images of {height} x {width} pixels have {rows} x "
                f"{columns} patches of {patch[0]} x {patch[1]} to swap; allowed: at most {rows * columns // 2}. "
                "Lower it, or lower method.patch"
            )
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, 2 + rows * columns, "swaps").to(images.device)
        sources = swap_sources(noise[:, 2:], noise[:, :2], (height, width), patch, self.config.swaps)
        return moved(images, sources)

    def pictures(self, batch: Batch) -> torch.Tensor:
        """For each of the first images the original, with swapped patches, and restored."""
        few = replace(batch, views=[batch.views[0][:ROWS]], ids=batch.ids[:ROWS])
        disordered = self.corrupted(few)
        ordered, _ = restored(self.backbone, self.restorer, disordered)
        return torch.stack([few.views[0], disordered, ordered], dim=1)

    @property
    def exported_decoder(self) -> dict[str, torch.Tensor]:
        return self.restorer.reusable
