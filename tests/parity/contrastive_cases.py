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


def lightly_moco(queries: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=temperature, memory_bank_size=(queue.shape[1], queue.shape[0]))
    loss.memory_bank.bank = queue.T
    found: torch.Tensor = loss(queries, keys.detach())
    return found


def lightly_simsiam(p1: torch.Tensor, p2: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    from lightly.loss import NegativeCosineSimilarity

    cosine = NegativeCosineSimilarity()
    loss: torch.Tensor = (cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2
    return loss


def lightly_barlow_twins(first: torch.Tensor, second: torch.Tensor, redundancy: float) -> torch.Tensor:
    from lightly.loss import BarlowTwinsLoss

    loss: torch.Tensor = BarlowTwinsLoss(lambda_param=redundancy)(first, second)
    return loss


def lightly_vicreg(
    first: torch.Tensor, second: torch.Tensor, invariance: float, variance: float, covariance: float
) -> torch.Tensor:
    from lightly.loss import VICRegLoss

    loss: torch.Tensor = VICRegLoss(invariance, variance, covariance)(first, second)
    return loss


PATIENTS = torch.tensor([0, 1, 2, 0, 3, 3, 0, 4])


def queue() -> Inputs:
    """Eight queries and keys, and a queue of 24."""
    earlier = torch.nn.functional.normalize(random(6, 24, seed=7), dim=0)
    return {"queries": random(8, 6, seed=5), "keys": random(8, 6, seed=6), "queue": earlier}


def queue_of_patients() -> Inputs:
    return queue() | {"groups": PATIENTS, "queue_groups": torch.arange(24) % 7 - 1}


def predictions() -> Inputs:
    return {name: random(8, 6, seed=20 + seed) for seed, name in enumerate(("p1", "p2", "z1", "z2"))}


def momentum() -> Inputs:
    return {name: random(8, 6, seed=30 + seed) for seed, name in enumerate(("q1", "q2", "k1", "k2"))}


def momentum_of_patients() -> Inputs:
    return momentum() | {"groups": PATIENTS}


def narrow() -> Inputs:
    """Projections some of whose dimensions have less than unit deviation, and one has more."""
    scale = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 2.0], dtype=torch.float64)
    return {name: 0.3 + scale * value for name, value in projections().items()}


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
    *(
        Case(
            "moco_v2", f"InfoNCE with a queue, T = {temperature}", ("queries",), "sslmed.methods.moco_v2.info_nce",
            queue, {"temperature": temperature}, formulas.moco, "arXiv 1911.05722, eq. 1", lightly_moco,
            shared=("queue",),
        )
        for temperature in (0.07, 0.2)
    ),
    Case(
        "moco_v2", "a queue with patients that do not repel themselves", ("queries",),
        "sslmed.methods.moco_v2.info_nce", queue_of_patients, {"temperature": 0.2}, formulas.moco,
        "arXiv 1911.05722, eq. 1", shared=("queue", "queue_groups"),
    ),
    *(
        Case(
            "moco_v3", f"both directions, T = {temperature}", ("q1", "q2"), "sslmed.methods.moco_v3.symmetric_loss",
            momentum, {"temperature": temperature}, formulas.moco_v3, "arXiv 2104.02057, eq. 1, alg. 1",
        )
        for temperature in (0.2, 1.0)
    ),
    Case(
        "moco_v3", "patients are no negatives", ("q1", "q2"), "sslmed.methods.moco_v3.symmetric_loss",
        momentum_of_patients, {"temperature": 0.2}, formulas.moco_v3, "arXiv 2104.02057, eq. 1, alg. 1",
    ),
    Case(
        "simsiam", "both directions", ("p1", "p2"), "sslmed.methods.simsiam.symmetric_loss",
        predictions, {}, formulas.simsiam, "arXiv 2011.10566, eq. 1-4", lightly_simsiam,
    ),
    *(
        Case(
            "barlow_twins", f"cross-correlation, lambda = {weight}", ("first", "second"),
            "sslmed.methods.barlow_twins.barlow_twins_loss", narrow, {"redundancy": weight}, formulas.barlow_twins,
            "arXiv 2103.03230, eq. 1, 2", lightly_barlow_twins,
        )
        for weight in (0.0051, 1.0)
    ),
    Case(
        "vicreg", "25, 25, 1", ("first", "second"), "sslmed.methods.vicreg.vicreg_loss", narrow,
        {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}, formulas.vicreg,
        "arXiv 2105.04906, eq. 1-6; variance halved as in the reference", lightly_vicreg,
    ),
]  # fmt: skip
