"""What is compared with what: every loss of every method, with its formula and, where it is right, lightly's.

A new method adds its cases here; test_parity.py refuses a method without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import formulas
import torch

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One loss.

    Attributes:
        method: its name in METHODS.
        by: the inputs that the gradient is taken by.
        loss: import path of ours; like ``formula`` and ``lightly`` it takes inputs and settings by name.
        inputs: float64 tensors and labels, rows an image, an even number of rows.
        source: where the formula stands.
        lightly: the same by lightly, where that is right.
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


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lightly_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    from lightly.loss import NTXentLoss

    loss: torch.Tensor = NTXentLoss(temperature=temperature)(first, second)
    return loss


def lightly_byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """lightly's criterion is -cos of one direction; 2 - 2 cos of both is the paper's."""
    from lightly.loss import NegativeCosineSimilarity

    cosine = NegativeCosineSimilarity()
    loss: torch.Tensor = 4 + 2 * (cosine(p1, t2.detach()) + cosine(p2, t1.detach()))
    return loss


def masks() -> torch.Tensor:
    """(8, 16), twelve hidden in each."""
    order = random(8, 16, seed=9).argsort(dim=1)
    return torch.ones(8, 16, dtype=torch.bool).scatter_(1, order[:, :4], False)


def projections() -> Inputs:
    return {"first": random(8, 6, seed=1), "second": random(8, 6, seed=2)}


def projections_of_patients() -> Inputs:
    return projections() | {"groups": torch.tensor([0, 1, 2, 0, 3, 3, 0, 4])}


def predictions() -> Inputs:
    return {name: random(8, 6, seed=seed) for seed, name in enumerate(("p1", "p2", "t1", "t2"))}


def patches() -> Inputs:
    return {
        "prediction": random(8, 16, 12, seed=3),
        "patches": 1 + 3 * random(8, 16, 12, seed=4),
        "counted": masks(),
    }


def logits() -> Inputs:
    return {"logits": random(16, 4, seed=5), "turns": torch.arange(4).repeat(4)}


SIMCLR = "arXiv 2002.05709, eq. 1"
CASES = [
    *(
        Case(
            "simclr", f"NT-Xent, T = {temperature}", ("first", "second"), "sslmed.methods.simclr.nt_xent",
            projections, {"temperature": temperature}, formulas.nt_xent, SIMCLR, lightly_nt_xent,
        )
        for temperature in (0.05, 0.2, 1.0)
    ),
    Case(
        "simclr", "NT-Xent, patients are no negatives", ("first", "second"), "sslmed.methods.simclr.nt_xent",
        projections_of_patients, {"temperature": 0.2}, formulas.nt_xent_without_friends, SIMCLR,
    ),
    Case(
        "byol", "both directions", ("p1", "p2"), "sslmed.methods.byol.symmetric_loss", predictions, {},
        formulas.byol, "arXiv 2006.07733, eq. 2", lightly_byol,
    ),
    *(
        Case(
            "mae", f"{'normalised' if norm_pix else 'raw'} pixels", ("prediction",),
            "sslmed.methods.mae.reconstruction_error", patches, {"norm_pix": norm_pix}, formulas.mae,
            "arXiv 2111.06377, sec. 3",
        )
        for norm_pix in (True, False)
    ),
    Case(
        "rotation", "four turns", ("logits",), "sslmed.methods.rotation.turn_loss", logits, {},
        formulas.rotation, "arXiv 1803.07728, eq. 3",
    ),
]  # fmt: skip
