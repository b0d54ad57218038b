"""Context restoration: patches that changed places (Chen et al., Medical Image Analysis 58, 2019)."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sslmed import config
from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.methods.method import Course
from sslmed.methods.restorative import Restorative
from sslmed.models.corruptions import moved, swap_cells, swap_sources
from sslmed.models.masking import keyed_noise


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


class ContextRestoration(Restorative):
    """Patches have changed places in pairs; the image as it was is predicted.

    The paper swaps at random places, one pair after another, so that a patch may be moved twice. Here the patches of an
    image are cells of a grid at a random offset and no cell moves twice, so that all swaps are one permutation of
    pixels. Either way the histogram stays, and only places are wrong.
    """

    Config = ContextRestorationConfig
    config: ContextRestorationConfig

    def check(self, course: Course) -> None:
        """There must be as many patches as are to be swapped.

        Raises:
            UsageError: there are fewer.
        """
        height, width = course.shape[1:]
        patch = self._patch(height, width)
        rows, columns = swap_cells((height, width), patch)
        if rows * columns < 2 * self.config.swaps:
            raise UsageError(
                f"'method.swaps' is {self.config.swaps}, but images of {height} x {width} pixels have {rows} x "
                f"{columns} patches of {patch[0]} x {patch[1]} to swap; allowed: at most {rows * columns // 2}. "
                "Lower it, or lower method.patch"
            )

    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images of the batch with swapped patches, keyed by seed, epoch and each image's id."""
        images = batch.views[0]
        height, width = images.shape[-2:]
        patch = self._patch(height, width)
        rows, columns = swap_cells((height, width), patch)
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, 2 + rows * columns, "swaps").to(images.device)
        sources = swap_sources(noise[:, 2:], noise[:, :2], (height, width), patch, self.config.swaps)
        return moved(images, sources)

    def _patch(self, height: int, width: int) -> tuple[int, int]:
        return max(1, round(height * self.config.patch)), max(1, round(width * self.config.patch))
