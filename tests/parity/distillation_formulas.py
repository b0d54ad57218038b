"""Formulas of methods with a teacher or clusters, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """BYOL, arXiv 2006.07733, equation 2 and its symmetric part; targets are constants."""
    total = torch.zeros((), dtype=p1.dtype)
    for prediction, target in ((p1, t2.detach()), (p2, t1.detach())):
        for q, z in zip(prediction, target, strict=True):
            total = total + (q / q.norm() - z / z.norm()).square().sum() / len(p1)
    return total


def sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV, arXiv 2006.09882, equations 3 to 5: Q of prototypes by images, whose rows sum to 1/K, columns to 1/B."""
    images, prototypes = scores.shape
    q = [[(scores[b, k] / epsilon).exp() for b in range(images)] for k in range(prototypes)]
    whole = sum(sum(row) for row in q)
    q = [[entry / whole for entry in row] for row in q]
    for _ in range(iterations):
        q = [[entry / sum(row) / prototypes for entry in row] for row in q]
        columns = [sum(row[b] for row in q) for b in range(images)]
        q = [[row[b] / columns[b] / images for b in range(images)] for row in q]
    return torch.stack([torch.stack([images * row[b] for row in q]) for b in range(images)])


def swav(
    scores: torch.Tensor,
    temperature: float,
    epsilon: float,
    iterations: int,
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """SwAV, equations 1, 2 and 6: both whole views are assigned, and each other view predicts the assignment."""
    images, views, prototypes = scores.shape
    total = torch.zeros((), dtype=scores.dtype)
    for s in range(2):
        assigned = scores[:, s] if earlier is None else torch.cat([scores[:, s], earlier[:, s]])
        q = sinkhorn(assigned.detach(), epsilon, iterations)
        for t in [view for view in range(views) if view != s]:
            for n in range(images):
                below = sum((scores[n, t, k] / temperature).exp() for k in range(prototypes))
                for k in range(prototypes):
                    p = (scores[n, t, k] / temperature).exp() / below
                    total = total - q[n, k] * p.log() / images / (views - 1) / 2
    return total


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    exponentials = [(logit / temperature).exp() for logit in logits]
    return torch.stack(exponentials) / sum(exponentials)


def dino(
    student: torch.Tensor,
    teacher: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """DINO, arXiv 2104.14294, equations 1 to 3: H(P_t(x), P_s(x')) over pairs of different views x and x'."""
    total, pairs = torch.zeros((), dtype=student.dtype), 0
    for x in range(teacher.shape[1]):
        for other in range(student.shape[1]):
            if x == other:
                continue
            pairs += 1
            for n in range(len(student)):
                a = _probabilities(teacher[n, x].detach() - centre, teacher_temperature)
                b = _probabilities(student[n, other], student_temperature)
                total = total - sum(a[k] * b[k].log() for k in range(len(a))) / len(student)
    return total / pairs


def ibot(
    student: torch.Tensor,
    teacher: torch.Tensor,
    hidden: torch.Tensor,
    centre: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """iBOT, arXiv 2111.07832, equation 2, mean over an image's hidden patches, then over all images."""
    total, token = torch.zeros((), dtype=student.dtype), 0
    for image in hidden:
        count = int(image.sum())
        for _ in range(count):
            a = _probabilities(teacher[token].detach() - centre, teacher_temperature)
            b = _probabilities(student[token], student_temperature)
            total = total - sum(a[k] * b[k].log() for k in range(len(a))) / count / len(hidden)
            token += 1
    return total


def koleo(features: torch.Tensor) -> torch.Tensor:
    """KoLeo, arXiv 1806.03198, equation 2: -1/n sum log min_j |x_i - x_j|, of points on the sphere."""
    points = [row / row.square().sum().sqrt() for row in features]
    total = torch.zeros((), dtype=features.dtype)
    for i, x in enumerate(points):
        distances = [(x - y).square().sum().sqrt() for j, y in enumerate(points) if j != i]
        total = total - torch.stack(distances).min().log() / len(points)
    return total
