"""Small detectors that say something, scenes to show them, and what one process of several learns of these."""

from typing import Any

import torch

WORLD = 2
NONE = [0.0, 0.0, 0.0, 0.0, -1.0]  # a row of a target that is no box


def detector(network: str = "test_resnet", side: int = 64, seed: int = 0, classes: int = 2, **settings: Any) -> Any:
    """A localization head with random weights that are large enough for scores and boxes to differ."""
    from sslmed.heads.localization import Localization, LocalizationConfig
    from sslmed.models.backbones import BackboneConfig, build

    torch.manual_seed(seed)
    config = LocalizationConfig(**({"width": 16, "depth": 1} | settings))
    head = Localization(config, build(BackboneConfig(name=network), side, 0), classes)
    with torch.no_grad():
        for parameter in head.head.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        for layer in (head.head.detector.classes, head.head.detector.central, head.head.detector.distances):
            layer.weight.normal_(0, 0.1)
    return head


def scene(counts: list[int], side: int = 64, seed: int = 0, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, side, side), each with as many brighter rectangles as ``counts`` says, and these as a target."""
    stream = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 1, side, side, generator=stream)
    target = torch.tensor([[NONE] * max(1, *counts)] * len(counts))
    for image, rows, count in zip(images, target, counts, strict=True):
        for row in rows[:count]:
            width, height = torch.randint(6, side // 2, (2,), generator=stream).tolist()
            left, top = (int(torch.randint(0, side - each, (), generator=stream)) for each in (width, height))
            kind = int(torch.randint(0, classes, (), generator=stream))
            image[0, top : top + height, left : left + width] += 1.0 + kind
            row[:] = torch.tensor([left, top, left + width, top + height, kind])
    return images, target


def gradients(
    images: torch.Tensor, target: torch.Tensor, reducer: bool, rows: tuple[int, ...] = (), average: bool = True
) -> dict[str, torch.Tensor]:
    """The gradient in float64 of a detector on a ViT, which has no BatchNorm; averaged over ranks as DDP does.

    Args:
        rows: how many of the images each rank has; all of them where nothing is said.
    """
    from sslmed import distributed

    if rows:
        images, target = (each.split(rows)[distributed.rank()] for each in (images, target))
    head = detector("test_vit", images.shape[-1], reducer=reducer).double()
    head.loss(head.features(images.double()), target).backward()
    found = {name: parameter.grad for name, parameter in head.named_parameters()}
    if rows and average:
        for gradient in found.values():
            torch.distributed.all_reduce(gradient)
            gradient /= WORLD
    return found
