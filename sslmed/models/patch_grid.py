"""Images cut into 3 x 3 patches with room between them, for tasks that ask where a patch was."""

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from sslmed.config import Config, UsageError
from sslmed.keyed_rng import rng
from sslmed.models.backbones import Backbone, in_timm

SIDE = 3
PLACES = SIDE * SIDE
FLAT = 0.05  # least deviation by which a patch is divided: noise of a flat one, such as JPEG's, is not blown up
LEAST = 7  # pixels of a patch; the first kernel of a ResNet
MOST = 0.5  # of a cell's side, that a patch may lose
Share = Annotated[float, Field(ge=0, le=MOST)]
LARGEST = 1024  # pixels of an image; where the search for one that a network takes ends


class PatchGridConfig(Config):
    """The knobs of the grid.

    Attributes:
        gap: least distance of two patches, as a share of a cell's side.
        jitter: how far a patch may move in its cell, alike.
    """

    gap: Share
    jitter: Share

    @model_validator(mode="after")
    def _patches_are_left(self) -> Self:
        if self.gap + self.jitter > MOST:
            raise ValueError(f"gap and jitter are {self.gap} and {self.jitter}; allowed: at most {MOST} together")
        return self


@dataclass(frozen=True)
class PatchGrid:
    """How patches lie in the nine cells of an image.

    Every patch is moved by itself, by up to ``jitter``, so that neighbours are from ``gap`` to ``gap + 2 jitter``
    apart: edges and lines that go on from one patch to the next give nothing away (arXiv 1505.05192, section 3.1).

    Attributes:
        gap: least distance of two patches, as a share of a cell's side.
        jitter: how far a patch may move, alike.
    """

    gap: float
    jitter: float

    def patch(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a patch, pixels, in images of ``size``; 0 or less where there is no room for one."""
        return self._side(size[0]), self._side(size[1])

    def cut(self, images: torch.Tensor, seed: int, epoch: int, ids: torch.Tensor, purpose: str) -> torch.Tensor:
        """The nine patches of images (N, C, H, W), row by row: (N, 9, C, p, q), each standardised by itself.

        Where a patch lies in its cell is drawn by ``seed``, ``epoch``, its image's number in ``ids`` and ``purpose``.
        """
        height, width = images.shape[2:]
        corners = self.corners(seed, epoch, ids, (height, width), purpose).to(images.device)
        p, q = self.patch((height, width))
        rows = corners[:, :, 0, None] + torch.arange(p, device=images.device)
        columns = corners[:, :, 1, None] + torch.arange(q, device=images.device)
        which = torch.arange(len(images), device=images.device)[:, None, None, None]
        patches = images[which, :, rows[..., None], columns[:, :, None]]  # N 9 p q C
        return standardised(patches.movedim(4, 2))

    def corners(self, seed: int, epoch: int, ids: torch.Tensor, size: tuple[int, int], purpose: str) -> torch.Tensor:
        """Row and column of each patch's upper left pixel, (N, 9, 2), on the CPU."""
        room = [self._room(side) for side in size]
        moved = [
            rng(seed, epoch, sample, purpose).integers(np.add(room, 1), size=(PLACES, 2)) for sample in ids.tolist()
        ]
        offsets = torch.from_numpy(np.stack(moved))
        cells = torch.tensor([side // SIDE for side in size])
        edges = torch.tensor([side % SIDE // 2 for side in size])  # of what the cells leave over
        half_gap = torch.tensor([self._gap(side) // 2 for side in size])
        places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), dim=2).flatten(0, 1)
        return offsets + places * cells + edges + half_gap

    def check(self, backbone: Backbone, shape: tuple[int, int, int], method: str) -> None:
        """Refuse images of ``shape`` (C, H, W) whose patches are too small for the network.

        Raises:
            UsageError: with the least size that would do.
        """
        channels, height, width = shape
        patch = self.patch((height, width))
        if takes(backbone, channels, patch):
            return
        name = in_timm(backbone.network)
        shown = f"{method} cuts images of {height} x {width} into patches of {patch[0]} x {patch[1]} pixels"
        if hasattr(backbone.network, "patch_embed"):
            raise UsageError(
                f"{shown}, but {name} is built for whole images of one size; take a network without, such as "
                "backbone.name=resnet18"
            )
        sizes = (side for side in range(min(height, width), LARGEST) if self._side(side) > self._side(side - 1))
        least = next((side for side in sizes if takes(backbone, channels, self.patch((side, side)))), None)
        remedy = f"set data.size={least} or more" if least else "take another network, such as backbone.name=resnet18"
        raise UsageError(f"{shown}, too small for {name}; {remedy}")

    def _gap(self, side: int) -> int:
        return round(self.gap * (side // SIDE))

    def _room(self, side: int) -> int:
        return round(self.jitter * (side // SIDE))

    def _side(self, side: int) -> int:
        return side // SIDE - self._gap(side) - self._room(side)


def standardised(patches: torch.Tensor) -> torch.Tensor:
    """Each channel of each patch (..., p, q) less its mean and over its deviation, which counts as ``FLAT`` at least.

    So that brightness, contrast and, in part, chromatic aberration do not tell which patches are of one image
    (arXiv 1603.09246, section 4.1).
    """
    mean = patches.mean(dim=(-2, -1), keepdim=True)
    deviation = patches.std(dim=(-2, -1), correction=0, keepdim=True)
    return (patches - mean) / deviation.clamp_min(FLAT)


def features(backbone: Backbone, patches: torch.Tensor) -> torch.Tensor:
    """Pooled features (N, P, D) of patches (N, P, C, p, q), all in one batch."""
    found: torch.Tensor = backbone(patches.flatten(0, 1)).unflatten(0, patches.shape[:2])
    return found


@torch.no_grad()
def takes(backbone: Backbone, channels: int, size: tuple[int, int]) -> bool:
    """Whether images of ``size`` are large enough and the network gives features of them; its state stays as it is."""
    if min(size) < LEAST:
        return False
    modes = {part: part.training for part in backbone.network.modules()}
    weight = next(backbone.network.parameters())
    image = torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device)
    backbone.network.eval()
    try:
        backbone.network(image)
    except (RuntimeError, ValueError, AssertionError):  # what torch and timm raise
        return False
    finally:
        for part, training in modes.items():
            part.training = training
    return True
