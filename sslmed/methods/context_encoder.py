"""Context encoder: feature learning by in-painting (Pathak et al., arXiv 1604.07379), without its adversary."""

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator

from sslmed import config
from sslmed.data.loading import Batch
from sslmed.data.modality import Modality
from sslmed.methods.method import Course
from sslmed.methods.restorative import Restorative
from sslmed.models.masking import keyed_noise
from sslmed.models.occlusions import MOST_BLOCKS, around, centre, random_pattern, some_blocks
from sslmed.models.restorer import gain_db, restored

NODES = 8  # of the pattern along a side: 0.06 a pixel at 128 pixels (reference, train_random.lua)
OVERLAP = 4 / 128  # of the side, around the centre (reference, train.lua: overlapPred)
Share = Annotated[float, Field(gt=0, le=0.5)]


class ContextEncoderConfig(config.Config):
    """The knobs of the context encoder.

    Attributes:
        holes: ``random``, blots of any shape, which the paper takes for features (section 3.3); ``blocks``, rectangles;
            ``centre``, the middle half of each side.
        area: least and greatest share of the image that is hidden (20 to 30 %: reference, train_random.lua). Blocks
            take the first and overshoot it by at most 1/16; of the centre it is a quarter whatever stands here.
        overlap: pixels around a hole, which are seen, that count in the loss too; by default 1/32 of the side around
            the centre, and none around other holes. The reference's 4 of 128 lie within the middle half, and hide that
            much less; around its random holes all that is seen counts, once.
        overlap_weight: how many times as much as hidden ones they count (reference: 10).
    """

    name: Literal["context_encoder"] = "context_encoder"
    holes: Literal["random", "blocks", "centre"] = "random"
    area: tuple[Share, Share] = (0.2, 0.3)
    overlap: Annotated[int, Field(ge=0, le=64)] | None = None
    overlap_weight: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.area[0] > self.area[1]:
            raise ValueError(f"area is {list(self.area)}; allowed: two numbers, the smaller first")
        return self


class ContextEncoder(Restorative):
    """Parts of an image are hidden; they are predicted from what is around them.

    A deviation, by name: the adversarial loss, which makes in-paintings sharper, is left out: lambda_adv is 0, not
    0.001, and there is no discriminator. The features that the authors publish are of the reconstruction loss alone
    too (reference, README, section 3).
    """

    Config = ContextEncoderConfig
    config: ContextEncoderConfig

    def notes(self, modality: Modality, course: Course) -> list[str]:
        """Names the settings that do nothing here, and what stays untrained."""
        found = super().notes(modality, course)
        if self.config.holes == "centre" and "area" in self.config.model_fields_set:
            found.append("method.area has no effect with method.holes=centre, which hides a quarter of the image")
        if self.config.holes == "blocks" and self.config.area[1] > self.config.area[0]:
            least = self.config.area[0]
            found.append(f"blocks hide method.area's first number, {least}, of each image, and less than 1/16 more")
        if not self.overlap(course.shape[1:]) and "overlap_weight" in self.config.model_fields_set:
            found.append("method.overlap_weight has no effect without method.overlap")
        return found

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The error in the holes and around them; ``gain_db`` is the gain in the holes over filling in the mean."""
        images, holes = batch.views[0], self.holes(batch)
        filled = fill_in_mean(images, holes)
        painted, embeddings = restored(self.backbone, self.restorer, filled)
        overlap = around(holes, self.overlap((images.shape[-2], images.shape[-1])))
        return {
            "loss": in_painting_error(painted, images, holes, overlap, self.config.overlap_weight),
            "embeddings": embeddings,
            "gain_db": gain_db(painted, filled, images, holes),
        }

    def overlap(self, size: tuple[int, int]) -> int:
        """How many pixels around the holes of images of ``size`` count."""
        if self.config.overlap is not None:
            return self.config.overlap
        return round(OVERLAP * min(size)) if self.config.holes == "centre" else 0

    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images with the mean of what is seen of each in its holes."""
        return fill_in_mean(batch.views[0], self.holes(batch))

    def holes(self, batch: Batch) -> torch.Tensor:
        """Where each image is hidden (N, H, W), keyed by seed, epoch and the image's id."""
        images = batch.views[0]
        size, count, device = (images.shape[-2], images.shape[-1]), len(images), images.device
        if self.config.holes == "centre":
            return centre(count, size, device)
        numbers = 4 * MOST_BLOCKS if self.config.holes == "blocks" else 3 + (NODES + 2) ** 2
        noise = keyed_noise(batch.seed, batch.epoch, batch.ids, numbers, "holes").to(device)
        low, high = self.config.area
        if self.config.holes == "blocks":
            return some_blocks(noise.view(count, MOST_BLOCKS, 4), low, size)
        share = low + (high - low) * noise[:, 0]
        return random_pattern(noise[:, 3:].view(count, 1, NODES + 2, NODES + 2), noise[:, 1:3], share, size)

    def shown(self, clean: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The image, its holes painted in."""
        images = batch.views[0]
        return torch.where(self.holes(batch)[:, None], clean.to(images), images)


def in_painting_error(
    painted: torch.Tensor, images: torch.Tensor, holes: torch.Tensor, overlap: torch.Tensor, weight: float
) -> torch.Tensor:
    """|M * (x - F((1 - M) * x))|^2 (arXiv 1604.07379, equation 1), a weighted mean over pixels, then over images.

    The mean, not the sum, so that images with larger holes do not count more.

    Args:
        painted: (N, C, H, W), the prediction.
        holes: (N, H, W), M; these count once.
        overlap: (N, H, W), what is seen around them; these count ``weight`` times.
    """
    precision = torch.promote_types(painted.dtype, torch.float32)
    error = (painted.to(precision) - images.to(precision)).square().mean(dim=1)
    counted = holes.to(precision) + weight * overlap.to(precision)
    return ((error * counted).sum(dim=(1, 2)) / counted.sum(dim=(1, 2)).clamp_min(1)).mean()


def fill_in_mean(images: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """Images whose holes have the mean of what is seen of them, channel by channel.

    The reference takes the mean of its data set; an image's own is the best constant that there is.
    """
    seen = ~holes[:, None]
    mean = (images * seen).sum(dim=(2, 3), keepdim=True) / seen.sum(dim=(2, 3), keepdim=True).clamp_min(1)
    return torch.where(seen, images, mean.to(images.dtype))
