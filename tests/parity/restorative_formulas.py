"""Formulas of restoration, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def mean_squared_error(restored: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """|x - g(f(x~))|^2, mean over all values: Vincent et al. 2008; Chen et al. 2019; arXiv 1908.06912."""
    total, count = torch.zeros((), dtype=restored.dtype), 0
    for found, true in zip(restored.flatten(), images.flatten(), strict=True):
        total = total + (found - true) ** 2
        count += 1
    return total / count


def context_encoder(
    painted: torch.Tensor, images: torch.Tensor, holes: torch.Tensor, overlap: torch.Tensor, weight: float
) -> torch.Tensor:
    """arXiv 1604.07379, equation 1, and 10 times the weight where the prediction overlaps what is seen (section 4)."""
    total = torch.zeros((), dtype=painted.dtype)
    for n in range(len(images)):
        above, below = torch.zeros((), dtype=painted.dtype), 0.0
        for y in range(images.shape[2]):
            for x in range(images.shape[3]):
                share = 1.0 if holes[n, y, x] else weight if overlap[n, y, x] else 0.0
                if not share:
                    continue
                pixel = sum((painted[n, c, y, x] - images[n, c, y, x]) ** 2 for c in range(images.shape[1]))
                above, below = above + share * pixel / images.shape[1], below + share
        total = total + above / below
    return total / len(images)
