"""Momentum encoders: a copy of a module that follows it as an exponential moving average of its parameters."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def follower(module: M) -> M:
    """A copy that gets no gradient and that no dropout or stochastic depth disturbs.

    It stays in training mode and so normalises by its own batch statistics, as the target of BYOL's reference does
    (deepmind-research/byol, byol_experiment.py).
    """
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if hasattr(part, "drop_prob"):  # timm's stochastic depth
            part.drop_prob = 0.0  # type: ignore[assignment]
    return twin


@torch.no_grad()
def follow(average: nn.Module, online: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * online, over parameters; buffers keep their own statistics."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in online.parameters()], 1 - momentum)


def cosine_momentum(base: float, step: int, total: int) -> float:
    """1 - (1 - base) * (cos(pi * step / total) + 1) / 2: from ``base`` at step 0 to 1 at ``total``.

    BYOL, arXiv 2006.07733, section 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * step / total) + 1) / 2


def rescaled_momentum(momentum: float, batch_size: int, reference: int) -> float:
    """momentum ** (batch_size / reference): the same memory, counted in samples, at another batch size.

    The EMA scaling rule of Busbridge et al., arXiv 2307.13813, definition 1.2.
    """
    return float(momentum ** (batch_size / reference))
