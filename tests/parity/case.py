"""What a case of parity is: one loss, its formula, and the inputs that both are given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
        method: its name in METHODS.
        by: the inputs that the gradient is taken by, of one shape.
        loss: import path of what the method itself calls; like ``formula`` and ``lightly`` it takes inputs and settings
            by name. It may return its parts beside ``loss``.
        inputs: float64 tensors and labels, rows an image, an even number of rows.
        source: where the formula stands.
        lightly: the same by lightly, where that is right.
        shared: inputs that every process has whole, such as a queue; none of ``by``.
    """

    method: str
    name: str
    by: tuple[str, ...]
    loss: str
    inputs: Callable[[], Inputs]
    settings: dict[str, Any]
    formula: Callable[..., torch.Tensor]
    source: str
    lightly: Callable[..., torch.Tensor] | None = None
    shared: tuple[str, ...] = ()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
