"""Cases of predictive pretexts."""

import predictive_formulas as formulas
import torch
from case import Case, Inputs, random


def logits() -> Inputs:
    return {"logits": random(16, 4, seed=5), "turns": torch.arange(4).repeat(4)}


CASES = [
    Case(
        "rotation", "four turns", ("logits",), "sslmed.methods.rotation.turn_loss", logits, {},
        formulas.rotation, "arXiv 1803.07728, eq. 3",
    ),
]  # fmt: skip
