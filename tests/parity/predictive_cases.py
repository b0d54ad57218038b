"""Cases of predictive pretexts."""

import predictive_formulas as formulas
import torch
from case import Case, Inputs, random


def logits() -> Inputs:
    return {"logits": random(16, 4, seed=5), "turns": torch.arange(4).repeat(4)}


def orders() -> Inputs:
    return {"logits": 2 * random(8, 20, seed=6), "orders": torch.tensor([0, 19, 3, 3, 7, 11, 18, 1])}


def places() -> Inputs:
    return {"logits": 2 * random(16, 8, seed=7), "places": torch.arange(8).repeat(2)}


CASES = [
    Case(
        "rotation", "four turns", ("logits",), "sslmed.methods.rotation.turn_loss", logits, {},
        formulas.rotation, "arXiv 1803.07728, eq. 3",
    ),
    Case(
        "jigsaw", "twenty orders", ("logits",), "sslmed.methods.jigsaw.order_loss", orders, {},
        formulas.jigsaw, "arXiv 1603.09246, sec. 3.2",
    ),
    Case(
        "relative_position", "eight places", ("logits",), "sslmed.methods.relative_position.place_loss", places, {},
        formulas.relative_position, "arXiv 1505.05192, sec. 3",
    ),
]  # fmt: skip
