"""Feature pyramids: what lies between a backbone's maps and a head that wants several strides."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sslmed.models.backbones import Level

STRIDES = (4, 8, 16, 32)  # of the pyramid (ViTDet, section 3)
WIDTH = 256  # of its maps (ViTDet, section 3)


def neck(levels: Sequence[Level]) -> "Unchanged | SimpleFeaturePyramid":
    """The module that turns a backbone's maps into a pyramid; its ``levels`` say what comes out, fine to coarse.

    A hierarchical network's maps are a pyramid and pass as they are; of a plain ViT's one map a pyramid is made.

    Args:
        levels: the backbone's. A ViT's pyramid has 256 channels, or the width of the ViT where that is less.
    """
    if len(levels) > 1:
        return Unchanged(levels)
    (level,) = levels
    return SimpleFeaturePyramid(level.channels, level.stride, min(WIDTH, level.channels))


class OneMap(nn.Module):
    """One map of a pyramid, the one whose stride is nearest to what is asked for.

    Args:
        levels: the backbone's. Of a plain ViT's one map a branch of `SimpleFeaturePyramid` makes the map.
        stride: pixels.

    Attributes:
        number: of the backbone's map that it is made of.
        level: what comes out.
    """

    def __init__(self, levels: Sequence[Level], stride: float) -> None:
        super().__init__()
        self.number = min(range(len(levels)), key=lambda number: abs(math.log(levels[number].stride / stride)))
        self.level, self.branch = levels[self.number], nn.Sequential()
        if len(levels) == 1:
            doublings = round(math.log2(self.level.stride / stride))
            width = min(WIDTH, self.level.channels)
            self.branch = _branch(self.level.channels, doublings, width)
            self.level = Level(width, self.level.stride * 2.0**-doublings)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """The map (N, channels, h, w) of the backbone's ``maps``."""
        found: torch.Tensor = self.branch(maps[self.number])
        return found


class Unchanged(nn.Module):
    """Maps pass as they are."""

    def __init__(self, levels: Sequence[Level]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same maps."""
        return list(maps)


class SimpleFeaturePyramid(nn.Module):
    """Four maps from the last one of a plain ViT, each by itself (ViTDet: Li et al., arXiv 2203.16527, section 3).

    Transposed convolutions double the map's sides as often as needed and halve its channels, max-pooling halves its
    sides. Then come a 1x1 and a 3x3 convolution. LayerNorm over channels follows each convolution, GELU the first of
    two transposed ones, as in the reference. Every cell is normalised by itself, whatever else is in the window.

    Args:
        width: channels of the ViT's map.
        patch: side of its patches, pixels.
        channels: of the maps that come out.

    Attributes:
        levels: strides ``patch * 2 ** k`` nearest to 4, 8, 16 and 32: these for patches of 4, 8, 16 or 32 pixels;
            3.5, 7, 14 and 28 for 14.
    """

    def __init__(self, width: int, patch: float, channels: int = WIDTH) -> None:
        super().__init__()
        doublings = [round(math.log2(patch / stride)) for stride in STRIDES]
        self.levels = tuple(Level(channels, patch * 2.0**-count) for count in doublings)
        self.branches = nn.ModuleList([_branch(width, count, channels) for count in doublings])

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (N, channels, h, w) of the list of one map (N, width, rows, columns), fine to coarse.

        Halved sides are rounded up.
        """
        (last,) = maps
        return [branch(last) for branch in self.branches]


def enlarged(maps: torch.Tensor, ratio: float, size: Sequence[int]) -> torch.Tensor:
    """Maps ``ratio`` times as large, then cut, or continued by their last row and column, to ``size``.

    Stretching to ``size`` instead would move what is seen: where a stride does not divide a side, the coarser map
    reaches beyond the finer one, or ends before it.
    """
    larger = F.interpolate(maps, scale_factor=ratio, mode="bilinear", align_corners=False)
    larger = larger[..., : size[0], : size[1]]
    below, right = size[0] - larger.shape[-2], size[1] - larger.shape[-1]
    return F.pad(larger, (0, right, 0, below), mode="replicate") if below or right else larger


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (N, C, H, W), at every position by itself."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


def _branch(width: int, doublings: int, channels: int) -> nn.Sequential:
    """``doublings`` below zero are halvings."""
    layers: list[nn.Module] = []
    for number in range(doublings):
        if number:
            layers += [ChannelNorm(width), nn.GELU()]
        narrow = max(width // 2, 1)
        layers.append(nn.ConvTranspose2d(width, narrow, kernel_size=2, stride=2))
        width = narrow
    layers += [nn.MaxPool2d(2, ceil_mode=True) for _ in range(-doublings)]
    layers += [nn.Conv2d(width, channels, 1, bias=False), ChannelNorm(channels)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), ChannelNorm(channels)]
    return nn.Sequential(*layers)
