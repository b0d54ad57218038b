"""Cases of methods that compare images with one another."""

import contrastive_formulas as formulas
import torch
from case import Case, Inputs, random


def lightly_nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    from lightly.loss import NTXentLoss

    loss: torch.Tensor = NTXentLoss(temperature=temperature)(first, second)
    return loss


def projections() -> Inputs:
    return {"first": random(8, 6, seed=1), "second": random(8, 6, seed=2)}


def projections_of_patients() -> Inputs:
    return projections() | {"groups": torch.tensor([0, 1, 2, 0, 3, 3, 0, 4])}


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
]  # fmt: skip
