"""What tests of restorative methods share: waves whose hidden parts follow from what is seen, and a short training."""

import math
from typing import Any

import torch

from sslmed.data.loading import Batch
from sslmed.image_size import ImageSize
from sslmed.methods import METHODS
from sslmed.models.backbones import BackboneConfig, build

HELD_OUT = 1000  # the first id of images that no training sees


def small(name: str, backbone: str = "test_resnet", size: ImageSize = 32, channels: int = 1, **settings: Any) -> Any:
    torch.manual_seed(0)
    kind = METHODS[name]
    return kind(kind.Config(**settings), build(BackboneConfig(name=backbone, in_chans=channels), size, 0))


def batch(images: torch.Tensor, first: int = 0, epoch: int = 0) -> Batch:
    rows = torch.arange(first, first + len(images))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def waves(count: int, seed: int, side: int = 32) -> torch.Tensor:
    """Periods of 8 and 10 pixels down and across, in any phase."""
    phase = 2 * math.pi * torch.rand(2, count, 1, 1, generator=torch.Generator().manual_seed(seed))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (1.5 * torch.sin(y * math.pi / 4 + phase[0]) * torch.cos(x * math.pi / 5 + phase[1]))[:, None]


def trained(method: Any, steps: int = 40) -> Any:
    """After some steps on 64 waves, in evaluation mode."""
    images, optimizer = waves(64, seed=0), torch.optim.AdamW(method.parameters(), lr=3e-3)
    for step in range(steps):
        first = step * 8 % 64
        optimizer.zero_grad()
        method.loss(batch(images[first : first + 8], first, step))["loss"].backward()
        optimizer.step()
    return method.eval()
