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


def unit(rows: torch.Tensor) -> list[torch.Tensor]:
    return [row / row.dot(row).sqrt() for row in rows]


def moco(
    queries: torch.Tensor,
    keys: torch.Tensor,
    queue: torch.Tensor,
    temperature: float,
    groups: torch.Tensor | None = None,
    queue_groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """MoCo, arXiv 1911.05722, equation 1 and algorithm 1: one positive and the K keys of the queue, mean over queries.

    Keys are constants. Where groups are given, keys of the query's own group are left out.
    """
    total = torch.zeros((), dtype=queries.dtype)
    for n, (q, k) in enumerate(zip(unit(queries), unit(keys.detach()), strict=True)):
        positive = (q.dot(k) / temperature).exp()
        below = positive
        for i in range(queue.shape[1]):
            if groups is None or queue_groups is None or groups[n] != queue_groups[i]:
                below = below + (q.dot(queue[:, i]) / temperature).exp()
        total = total - (positive / below).log() / len(queries)
    return total


def moco_v3(
    q1: torch.Tensor,
    q2: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    temperature: float,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """MoCo v3, arXiv 2104.02057, equation 1 and algorithm 1: ctr(q1, k2) + ctr(q2, k1), each 2 tau cross-entropy."""
    total, count = torch.zeros((), dtype=q1.dtype), len(q1)
    for queries, keys in ((q1, k2), (q2, k1)):
        q, k = unit(queries), unit(keys.detach())
        for i in range(count):
            others = [j for j in range(count) if j != i and (groups is None or groups[j] != groups[i])]
            below = sum((q[i].dot(k[j]) / temperature).exp() for j in [i, *others])
            total = total - 2 * temperature * ((q[i].dot(k[i]) / temperature).exp() / below).log() / count
    return total


def simsiam(p1: torch.Tensor, p2: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """SimSiam, arXiv 2011.10566, equations 1 to 4: D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2."""
    total = torch.zeros((), dtype=p1.dtype)
    for prediction, projection in ((p1, z2.detach()), (p2, z1.detach())):
        for p, z in zip(unit(prediction), unit(projection), strict=True):
            total = total - p.dot(z) / len(p1) / 2
    return total


def barlow_twins(first: torch.Tensor, second: torch.Tensor, redundancy: float) -> torch.Tensor:
    """Barlow Twins, arXiv 2103.03230, equations 1 and 2, the batch normalised as by BatchNorm (epsilon 1e-5)."""
    count, width = first.shape

    def normalised(z: torch.Tensor, i: int) -> torch.Tensor:
        centred = z[:, i] - z[:, i].sum() / count
        return centred / ((centred**2).sum() / count + 1e-5).sqrt()

    total = torch.zeros((), dtype=first.dtype)
    for i in range(width):
        for j in range(width):
            c = sum(a * b for a, b in zip(normalised(first, i), normalised(second, j), strict=True)) / count
            total = total + ((1 - c) ** 2 if i == j else redundancy * c**2)
    return total


def vicreg(
    first: torch.Tensor, second: torch.Tensor, invariance: float, variance: float, covariance: float
) -> torch.Tensor:
    """VICReg, arXiv 2105.04906, equations 1 to 6.

    As the reference has them: the distance is a mean over dimensions too, and variance terms are halved.
    """
    count, width = first.shape
    total = torch.zeros((), dtype=first.dtype)
    for a, b in zip(first, second, strict=True):
        total = total + invariance * ((a - b) ** 2).sum() / (count * width)
    for z in (first, second):
        centred = [z[:, j] - z[:, j].sum() / count for j in range(width)]
        for j in range(width):
            deviation = ((centred[j] ** 2).sum() / (count - 1) + 1e-4).sqrt()
            if deviation < 1:
                total = total + variance * (1 - deviation) / width / 2
            for k in range(width):
                if k != j:
                    total = total + covariance * (centred[j].dot(centred[k]) / (count - 1)) ** 2 / width
    return total
