"""Momentum encoders: a copy of a module that follows it as an exponential moving average of its parameters."""

import copy
import math
from typing import Literal, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
MomentumRule = Literal["scaled", "constant"]
QUOTED_FOR = 256  # images a batch, as learning rates are (Goyal et al., arXiv 1706.02677)


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


def momentum_at(batch_size: int, momentum: float, rule: MomentumRule) -> float:
    """The momentum at a global batch: ``scaled`` is momentum ** (B / 256), the same memory in samples at any batch.

    The EMA scaling rule of Busbridge et al., arXiv 2307.13813, definition 1.2.
    """
    return momentum if rule == "constant" else float(momentum ** (batch_size / QUOTED_FOR))


def momentum_notes(batch_size: int, momentum: float, rule: MomentumRule) -> list[str]:
    """What to say before training where the rule changes the momentum."""
    here = momentum_at(batch_size, momentum, rule)
    if here == momentum:
        return []
    return [
        f"method.momentum {momentum:g} is quoted for batch {QUOTED_FOR}; at batch {batch_size} it is {here:.6g} "
        "(method.momentum_rule=constant keeps it)"
    ]
