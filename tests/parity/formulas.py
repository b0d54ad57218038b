"""The papers' formulas, written from the papers alone: loops and float64, nothing of sslmed."""

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


def byol(p1: torch.Tensor, p2: torch.Tensor, t1: torch.Tensor, t2: torch.Tensor) -> torch.Tensor:
    """BYOL, arXiv 2006.07733, equation 2 and its symmetric part; targets are constants."""
    total = torch.zeros((), dtype=p1.dtype)
    for prediction, target in ((p1, t2.detach()), (p2, t1.detach())):
        for q, z in zip(prediction, target, strict=True):
            total = total + (q / q.norm() - z / z.norm()).square().sum() / len(p1)
    return total


def mae(prediction: torch.Tensor, patches: torch.Tensor, counted: torch.Tensor, norm_pix: bool) -> torch.Tensor:
    """MAE, arXiv 2111.06377, section 3: mean squared error on hidden patches, of values normalised by patch."""
    total, count = torch.zeros((), dtype=prediction.dtype), 0
    for image in range(len(patches)):
        for patch in range(patches.shape[1]):
            if not counted[image, patch]:
                continue
            x = patches[image, patch]
            if norm_pix:
                mean = x.sum() / len(x)
                variance = ((x - mean) ** 2).sum() / (len(x) - 1)
                x = (x - mean) / torch.sqrt(variance + 1e-6)
            total = total + ((prediction[image, patch] - x) ** 2).sum() / len(x)
            count += 1
    return total / count


def rotation(logits: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RotNet, arXiv 1803.07728, equations 2 and 3: -log of the softmax at the true turn, mean over images and turns."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, turn in zip(logits, turns.tolist(), strict=True):
        total = total - (row[turn].exp() / sum(row[k].exp() for k in range(4))).log()
    return total / len(logits)
