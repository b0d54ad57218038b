"""Cases of methods with a teacher or clusters."""

import distillation_formulas as formulas
import torch
from case import Case, Inputs, random


def lightly_byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """lightly's criterion is -cos of one direction; 2 - 2 cos of both is the paper's."""
    from lightly.loss import NegativeCosineSimilarity

    cosine = NegativeCosineSimilarity()
    loss: torch.Tensor = 4 + 2 * (cosine(p1, t2.detach()) + cosine(p2, t1.detach()))
    return loss


def predictions() -> Inputs:
    return {name: random(8, 6, seed=seed) for seed, name in enumerate(("p1", "p2", "t1", "t2"))}


CASES = [
    Case(
        "byol", "both directions", ("p1", "p2"), "sslmed.methods.byol.symmetric_loss", predictions, {},
        formulas.byol, "arXiv 2006.07733, eq. 2", lightly_byol,
    ),
]  # fmt: skip
