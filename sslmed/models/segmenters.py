"""Decoders from a pyramid of maps to a class for every pixel."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from sslmed.models.backbones import Level
from sslmed.models.pyramids import enlarged, neck

WIDTH = 16  # channels at the stride of 1; they double with the stride
WIDEST = 256
LAST = "decoder.classifier."  # what is for a task's own classes, or an image's channels


class PixelDecoder(nn.Module):
    """A neck and a U-Net decoder, which are saved together: what segmentation and restoration have in common.

    Args:
        levels: the backbone's.
        classes: of the result, or its channels.
    """

    def __init__(self, levels: Sequence[Level], classes: int) -> None:
        super().__init__()
        self.neck = neck(levels)
        self.decoder = UNetDecoder(self.neck.levels, classes)

    def forward(self, maps: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        """(N, classes, height, width) of the backbone's maps of images of this size, without a limit to the values."""
        found: torch.Tensor = self.decoder(self.neck(maps), size)
        return found

    @property
    def reusable(self) -> dict[str, torch.Tensor]:
        """All tensors but those of the last layer."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(LAST)}


class UNetDecoder(nn.Module):
    """From the coarsest map to every pixel, with a finer map joined on the way (U-Net, arXiv 1505.04597, section 2).

    At every stride: enlarge, concatenate the backbone's map, and twice a 3x3 convolution with BatchNorm and ReLU; below
    the finest map the same without one. Unlike the paper's, convolutions are padded, maps are enlarged by bilinear
    interpolation, and they are normalised: by BatchNorm, so that in evaluation mode an answer does not depend on what
    else is in the window, as tiles of an image need it.

    Args:
        levels: of the maps, fine to coarse.
        classes: of the result.
    """

    def __init__(self, levels: Sequence[Level], classes: int) -> None:
        super().__init__()
        channels, stride = levels[-1]
        stages = []
        for skip in _ways_up(levels):
            stages.append(_Stage(channels, skip, stride / skip.stride))
            channels, stride = stages[-1].width, skip.stride
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Conv2d(channels, classes, 1)
        # Nearly equal probabilities at first, a loss of about log(classes). Smaller weights learnt far more slowly:
        # from 0.01, masks of two classes were still one class after 60 steps in which 0.1 had told them apart.
        nn.init.normal_(self.classifier.weight, std=0.1)
        nn.init.zeros_(cast(torch.Tensor, self.classifier.bias))

    def forward(self, maps: Sequence[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        """Logits (N, classes, height, width) of ``maps``, fine to coarse, of images of this size.

        The last layer computes in its own precision, under autocast too.
        """
        *finer, decoded = maps
        for stage in self.stages:
            decoded = stage(decoded, finer.pop() if finer else None, size)
        with torch.autocast(decoded.device.type, enabled=False):
            logits: torch.Tensor = self.classifier(decoded.to(self.classifier.weight.dtype))
        return logits


def _ways_up(levels: Sequence[Level]) -> list[Level]:
    """What is joined at each step: the finer levels, then nothing (0 channels) at halved strides down to 1."""
    steps = list(reversed(levels[:-1]))
    stride = levels[0].stride
    while stride > 1:
        stride = stride / 2 if stride >= 2 else 1.0
        steps.append(Level(0, stride))
    return steps


class _Stage(nn.Module):
    """One step up: enlarge, join, and convolve twice."""

    def __init__(self, channels: int, skip: Level, ratio: float) -> None:
        super().__init__()
        self.stride, self.ratio = skip.stride, ratio
        self.width = min(WIDTH * 2 ** round(math.log2(skip.stride)), WIDEST)
        layers: list[nn.Module] = []
        for entering in (channels + skip.channels, self.width):
            convolution = nn.Conv2d(entering, self.width, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(self.width), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)

    def forward(self, coarse: torch.Tensor, skip: torch.Tensor | None, size: Sequence[int]) -> torch.Tensor:
        goal = [math.ceil(side / self.stride) for side in size] if skip is None else skip.shape[-2:]
        joined = enlarged(coarse, self.ratio, goal)
        if skip is not None:
            joined = torch.cat([joined, skip.to(joined.dtype)], dim=1)
        decoded: torch.Tensor = self.convolutions(joined)
        return decoded
