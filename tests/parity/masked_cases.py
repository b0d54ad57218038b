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


def hidden_pixels() -> Inputs:
    """The prediction is where the absolute value has its kink for no pixel."""
    return {
        "prediction": random(8, 16, 12, seed=5),
        "patches": 2 * random(8, 16, 12, seed=6) - 1,
        "hidden": masks(),
    }


def tokens() -> Inputs:
    """Four blocks of six tokens; errors on both sides of smooth L1's bend at 1."""
    return {"prediction": 2 * random(8, 4, 6, 10, seed=7), "target": 5 + 3 * random(8, 4, 6, 10, seed=8)}


CASES = [
    *(
        Case(
            "mae", f"{'normalised' if norm_pix else 'raw'} pixels", ("prediction",),
            "sslmed.methods.mae.reconstruction_error", patches, {"norm_pix": norm_pix}, formulas.mae,
            "arXiv 2111.06377, sec. 3",
        )
        for norm_pix in (True, False)
    ),
    Case(
        "simmim", "hidden pixels", ("prediction",), "sslmed.methods.simmim.pixel_error", hidden_pixels, {},
        formulas.simmim, "arXiv 2111.09886, eq. 1",
    ),
    Case(
        "ijepa", "tokens of four blocks", ("prediction",), "sslmed.methods.ijepa.latent_error", tokens, {},
        formulas.ijepa, "arXiv 2301.08243, eq. 1, as in the reference",
    ),
]  # fmt: skip
