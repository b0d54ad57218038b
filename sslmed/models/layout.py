"""Which tensors of a timm network depend on the kind of its input, or are its classifier's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Which tensors of a network depend on the kind of input, by name.

    Attributes:
        inputs: weights (O, C, kh, kw) that read the channels of the image.
        patches: the one of them that cuts patches which do not overlap, if there is one.
        positions: the learnt position embeddings (1, prefix + height * width of ``grid``, D), if there are any.
        grid: rows and columns of patches.
        classifiers: modules of the published classifier, which a backbone does not have.
    """

    inputs: tuple[str, ...]
    patches: str | None
    positions: str | None
    grid: tuple[int, int]
    classifiers: tuple[str, ...]


def layout(network: nn.Module) -> Layout:
    """What timm says of one of its networks."""
    about: Any = getattr(network, "pretrained_cfg", {})
    convolutions = _names(about.get("first_conv"))
    if any(type(module).__name__ == "SpaceToDepth" for module in network.modules()):
        convolutions = ()  # they read pixels that were moved into channels
    patches: Any = getattr(network, "patch_embed", None)
    proj, grid = getattr(patches, "proj", None), getattr(patches, "grid_size", None) or (0, 0)
    apart = isinstance(proj, nn.Conv2d) and proj.kernel_size == proj.stride and "patch_embed.proj" in convolutions
    table = getattr(network, "pos_embed", None)
    learnt = isinstance(table, torch.Tensor) and table.ndim == 3 and table.shape[1] >= grid[0] * grid[1] > 0
    return Layout(
        tuple(f"{name}.weight" for name in convolutions),
        "patch_embed.proj.weight" if apart else None,
        "pos_embed" if learnt else None,
        (int(grid[0]), int(grid[1])),
        _names(about.get("classifier")),
    )


def _names(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())
