"""Formulas of methods that compare images, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def nt_xent(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """SimCLR, arXiv 2002.05709, equation 1 and algorithm 1."""
    count = len(first)
    z = [row for pair in zip(first, second, strict=True) for row in pair]  # x_2k-1 and x_2k are a pair
    s = [[zi.dot(zj) / (zi.dot(zi).sqrt() * zj.dot(zj).sqrt()) for zj in z] for zi in z]

    def one(i: int, j: int) -> torch.Tensor:
        below = sum((s[i][k] / temperature).exp() for k in range(2 * count) if k != i)
        return -((s[i][j] / temperature).exp() / below).log()

    return sum(one(2 * k, 2 * k + 1) + one(2 * k + 1, 2 * k) for k in range(count)) / (2 * count)


def nt_xent_without_friends(
    first: torch.Tensor, second: torch.Tensor, temperature: float, groups: torch.Tensor
) -> torch.Tensor:
    """The same, where images of one group are no negatives of each other."""
    z = torch.cat([first, second])
    z = z / z.square().sum(dim=1, keepdim=True).sqrt()
    count, total = len(first), torch.zeros((), dtype=first.dtype)
    for i in range(2 * count):
        positive = (i + count) % (2 * count)
        others = [k for k in range(2 * count) if groups[k % count] != groups[i % count]]
        below = sum(((z[i] @ z[k]) / temperature).exp() for k in [positive, *others])
        total = total - (((z[i] @ z[positive]) / temperature).exp() / below).log()
    return total / (2 * count)
