"""From a backbone's maps to boxes: a feature pyramid, and at each of its places a class and a box."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from sslmed.models.backbones import Level
from sslmed.models.pyramids import ChannelNorm, enlarged, neck

FINEST = 3.0  # pixels a cell, at least: a level of stride 4 is the finest, of 3.5 for patches of 14 pixels
RARE = 0.01  # the probability of every class at every place before training (RetinaNet, arXiv 1708.02002, section 3.3)
_REACH = (-4.0, 6.0)  # of the logarithm of a distance in strides: a fiftieth of a stride to 400 strides


class Places(NamedTuple):
    """What a detector says of N images at L places, and where these are.

    Attributes:
        classes: (N, L, K) logits.
        boxes: (N, L, 4) left, top, right, bottom in pixels of the input, each of some area.
        central: (N, L) logits.
        centres: (L, 2) across and down, pixels.
        strides: (L,) pixels a cell of the level that a place is of.
        finest: (N, width, h, w), the finest map.
    """

    classes: torch.Tensor
    boxes: torch.Tensor
    central: torch.Tensor
    centres: torch.Tensor
    strides: torch.Tensor
    finest: torch.Tensor


class Detector(nn.Module):
    """FCOS (Tian et al., arXiv 1904.01355, section 3) on levels from stride 4 to the coarsest that the backbone has.

    Unlike the paper's there is a level of stride 4, as medical findings are small, and none coarser than the
    backbone's; classes and boxes share one tower; its layers are normalised over channels at each place (LayerNorm),
    so that an answer does not depend on what else is in the window or the batch.

    Args:
        levels: the backbone's, fine to coarse.
        classes: K.
        width: channels of the pyramid and the tower.
        depth: 3x3 convolutions of the tower.
    """

    def __init__(self, levels: Sequence[Level], classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.neck = neck(levels)
        self.pyramid = FeaturePyramid(self.neck.levels, width)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [_conv3x3(width, width), ChannelNorm(width), nn.ReLU()]
        self.tower = nn.Sequential(*layers)
        self.classes, self.distances, self.central = (_conv3x3(width, count, 0.01) for count in (classes, 4, 1))
        nn.init.constant_(self.classes.bias, -math.log((1 - RARE) / RARE))  # type: ignore[arg-type]
        self.scales = nn.Parameter(torch.ones(len(self.pyramid.strides)))  # of distances, one a level

    def forward(self, maps: Sequence[torch.Tensor]) -> Places:
        """The places of all levels, fine to coarse and row by row, of the backbone's ``maps``."""
        found = self.pyramid(self.neck(maps))
        parts = [self._level(number, each) for number, each in enumerate(found)]
        classes, boxes, central, centres, strides = zip(*parts, strict=True)
        return Places(
            torch.cat(classes, 1), torch.cat(boxes, 1), torch.cat(central, 1), torch.cat(centres), torch.cat(strides),
            found[0],
        )  # fmt: skip

    def _level(self, number: int, found: torch.Tensor) -> tuple[torch.Tensor, ...]:
        stride, (rows, columns) = self.pyramid.strides[number], found.shape[-2:]
        tower = self.tower(found)
        classes, distances, central = (
            _full(layer(tower)).flatten(2).transpose(1, 2) for layer in (self.classes, self.distances, self.central)
        )
        # the middle of a cell: a map's cells lie side by side and cover the input
        down, across = (
            (torch.arange(count, device=found.device, dtype=distances.dtype) + 0.5) * stride
            for count in (rows, columns)
        )
        centres = torch.stack([across.repeat(rows), down.repeat_interleave(columns)], dim=1)
        reach = stride * (self.scales[number] * distances).clamp(*_REACH).exp()
        boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
        return classes, boxes, central[..., 0], centres, centres.new_full((len(centres),), stride)


class FeaturePyramid(nn.Module):
    """Maps of one width in which coarse ones have been added to finer ones (Lin et al., arXiv 1612.03144, section 3).

    Args:
        levels: of the maps that come in, fine to coarse; those finer than a stride of 3 are left aside.
        width: channels of what comes out.
        finest_alone: only the finest map comes out.

    Attributes:
        strides: of all levels.
    """

    def __init__(self, levels: Sequence[Level], width: int, finest_alone: bool = False) -> None:
        super().__init__()
        chosen = [level for level in levels if level.stride >= FINEST] or list(levels[-1:])
        self.skipped = len(levels) - len(chosen)
        self.strides = [float(level.stride) for level in chosen]
        self.sideways = nn.ModuleList([nn.Conv2d(level.channels, width, 1) for level in chosen])
        self.smooth = nn.ModuleList([_conv3x3(width, width) for _ in (chosen[:1] if finest_alone else chosen)])

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (N, width, h, w), fine to coarse."""
        return [layer(each) for layer, each in zip(self.smooth, self._joined(maps), strict=False)]

    def _joined(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        flat = [layer(each) for layer, each in zip(self.sideways, maps[self.skipped :], strict=True)]
        for finer, coarser in reversed([*pairwise(range(len(flat)))]):
            ratio = self.strides[coarser] / self.strides[finer]
            flat[finer] = flat[finer] + enlarged(flat[coarser], ratio, flat[finer].shape[-2:])
        return flat


def _conv3x3(entering: int, leaving: int, std: float | None = None) -> nn.Conv2d:
    convolution = nn.Conv2d(entering, leaving, 3, padding=1)
    if std is None:
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    else:
        nn.init.normal_(convolution.weight, std=std)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution


def _full(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
