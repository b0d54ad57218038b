"""Formulas of methods with a teacher or clusters, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """BYOL, arXiv 2006.07733, equation 2 and its symmetric part; targets are constants."""
    total = torch.zeros((), dtype=p1.dtype)
    for prediction, target in ((p1, t2.detach()), (p2, t1.detach())):
        for q, z in zip(prediction, target, strict=True):
            total = total + (q / q.norm() - z / z.norm()).square().sum() / len(p1)
    return total
