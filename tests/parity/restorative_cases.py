"""Cases of restoration."""

import restorative_formulas as formulas
from case import Case, Inputs, random

VINCENT = "Vincent et al., ICML 2008"
CHEN = "Chen et al., Medical Image Analysis 58, 2019"
GENESIS = "arXiv 1908.06912"


def pictures() -> Inputs:
    return {"restored": random(4, 2, 6, 5, seed=5), "images": 1 + 2 * random(4, 2, 6, 5, seed=6)}


def pictures_with_holes() -> Inputs:
    holes = random(4, 6, 5, seed=7) > 0.6
    overlap = (random(4, 6, 5, seed=8) > 0.3) & ~holes
    assert holes.any(dim=(1, 2)).all()
    given = pictures()
    return {"painted": given["restored"], "images": given["images"], "holes": holes, "overlap": overlap}


CASES = [
    *(
        Case(
            method, "mean squared error", ("restored",), "sslmed.models.restorer.restoration_error",
            pictures, {}, formulas.mean_squared_error, source,
        )
        for method, source in (("denoising", VINCENT), ("context_restoration", CHEN), ("models_genesis", GENESIS))
    ),
    *(
        Case(
            "context_encoder", f"holes, their surroundings {weight:g} times", ("painted",),
            "sslmed.methods.context_encoder.in_painting_error", pictures_with_holes, {"weight": weight},
            formulas.context_encoder, "arXiv 1604.07379, eq. 1",
        )
        for weight in (10.0, 0.0)
    ),
]  # fmt: skip
