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


def lightly_swav(scores: torch.Tensor, temperature: float, epsilon: float, iterations: int) -> torch.Tensor:
    from lightly.loss import SwaVLoss

    views = list(scores.unbind(dim=1))
    loss: torch.Tensor = SwaVLoss(temperature, iterations, epsilon)(views[:2], views[2:])
    return loss.squeeze()


def lightly_swav_with_queue(
    scores: torch.Tensor, earlier: torch.Tensor, temperature: float, epsilon: float, iterations: int
) -> torch.Tensor:
    from lightly.loss import SwaVLoss

    views, queue = list(scores.unbind(dim=1)), list(earlier.unbind(dim=1))
    loss: torch.Tensor = SwaVLoss(temperature, iterations, epsilon)(views[:2], views[2:], queue)
    return loss.squeeze()


def lightly_dino(
    student: torch.Tensor,
    teacher: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    from lightly.loss import DINOLoss

    criterion = DINOLoss(len(centre), student_temp=student_temperature).double()
    criterion.center.copy_(centre)
    loss: torch.Tensor = criterion(
        list(teacher.unbind(dim=1)), list(student.unbind(dim=1)), teacher_temp=teacher_temperature
    )
    return loss


def lightly_ibot(
    student: torch.Tensor,
    teacher: torch.Tensor,
    hidden: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    from lightly.loss import IBOTPatchLoss

    criterion = IBOTPatchLoss(len(centre), teacher_temperature, student_temperature).double()
    criterion.center.center.copy_(centre)
    loss: torch.Tensor = criterion(teacher, student, hidden[:, None])
    return loss


def lightly_koleo(features: torch.Tensor) -> torch.Tensor:
    from lightly.loss import KoLeoLoss

    loss: torch.Tensor = KoLeoLoss()(features)
    return loss


def cosines(views: int = 5) -> torch.Tensor:
    """(8, views, 6): of points on the sphere and prototypes."""
    points = random(8, views, 4, seed=5)
    prototypes = random(6, 4, seed=6)
    return (points / points.norm(dim=2, keepdim=True)) @ (prototypes / prototypes.norm(dim=1, keepdim=True)).T


def scores() -> Inputs:
    return {"scores": cosines()}


def scores_and_queue() -> Inputs:
    return {"scores": cosines(), "earlier": cosines()[:, 2:4]}


def logits() -> Inputs:
    return {
        "student": random(8, 5, 6, seed=7),
        "teacher": 0.2 * random(8, 2, 6, seed=8),
        "centre": 0.1 * random(6, seed=9),
    }


def patch_logits() -> Inputs:
    """Eight images of six patches; as many are hidden in the first four as in the last."""
    counts = torch.tensor([3, 1, 0, 4, 2, 2, 4, 0])
    return {
        "student": random(16, 6, seed=10),
        "teacher": 0.2 * random(16, 6, seed=11),
        "hidden": torch.arange(6)[None] < counts[:, None],
        "centre": 0.1 * random(6, seed=12),
    }


TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.04}
SINKHORN = {"temperature": 0.1, "epsilon": 0.05, "iterations": 3}
SWAPPED = "sslmed.methods.swav.swapped_prediction"
CASES = [
    Case(
        "byol", "both directions", ("p1", "p2"), "sslmed.methods.byol.symmetric_loss", predictions, {},
        formulas.byol, "arXiv 2006.07733, eq. 2", lightly_byol,
    ),
    Case(
        "swav", "swapped prediction", ("scores",), SWAPPED, scores, SINKHORN, formulas.swav,
        "arXiv 2006.09882, eq. 1 to 6", lightly_swav,
    ),
    Case(
        "swav", "two views alone, other constants", ("scores",), SWAPPED, lambda: {"scores": cosines(2)},
        {"temperature": 0.5, "epsilon": 0.2, "iterations": 7}, formulas.swav,
        "arXiv 2006.09882, eq. 1 to 6", lightly_swav,
    ),
    Case(
        "swav", "with a queue", ("scores",), SWAPPED, scores_and_queue, SINKHORN, formulas.swav,
        "arXiv 2006.09882, sec. 4.3", lightly_swav_with_queue,
    ),
    Case(
        "dino", "pairs of views", ("student",), "sslmed.models.self_distillation.distillation_loss", logits,
        TEMPERATURES, formulas.dino, "arXiv 2104.14294, eq. 1 to 3", lightly_dino, ("centre",),
    ),
    Case(
        "ibot", "class tokens", ("student",), "sslmed.models.self_distillation.distillation_loss", logits,
        {"student_temperature": 0.1, "teacher_temperature": 0.07}, formulas.dino, "arXiv 2111.07832, eq. 1",
        lightly_dino, ("centre",),
    ),
    Case(
        "ibot", "hidden patches", ("student",), "sslmed.methods.ibot.patch_loss", patch_logits, TEMPERATURES,
        formulas.ibot, "arXiv 2111.07832, eq. 2", lightly_ibot, ("centre",),
    ),
    Case(
        "ibot", "KoLeo", ("features",), "sslmed.models.koleo.koleo", lambda: {"features": random(8, 4, seed=13)}, {},
        formulas.koleo, "arXiv 1806.03198, eq. 2", lightly_koleo,
    ),
]  # fmt: skip
