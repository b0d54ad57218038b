"""Cases of masked prediction."""

import masked_formulas as formulas
import torch
from case import Case, Inputs, random


def masks() -> torch.Tensor:
    """(8, 16), twelve hidden in each."""
    order = random(8, 16, seed=9).argsort(dim=1)
    return torch.ones(8, 16, dtype=torch.bool).scatter_(1, order[:, :4], False)


def patches() -> Inputs:
    return {
        "prediction": random(8, 16, 12, seed=3),
        "patches": 1 + 3 * random(8, 16, 12, seed=4),
        "counted": masks(),
    }


CASES = [
    *(
        Case(
            "mae", f"{'normalised' if norm_pix else 'raw'} pixels", ("prediction",),
            "sslmed.methods.mae.reconstruction_error", patches, {"norm_pix": norm_pix}, formulas.mae,
            "arXiv 2111.06377, sec. 3",
        )
        for norm_pix in (True, False)
    ),
]  # fmt: skip
