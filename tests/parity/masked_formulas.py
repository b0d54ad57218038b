"""Formulas of masked prediction, from the papers alone: loops and float64, nothing of sslmed."""

import torch


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


def simmim(prediction: torch.Tensor, patches: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """SimMIM, arXiv 2111.09886, equation 1: the L1 norm over hidden pixels, over their number."""
    total, count = torch.zeros((), dtype=prediction.dtype), 0
    for image in range(len(patches)):
        for patch in range(patches.shape[1]):
            if hidden[image, patch]:
                for y, x in zip(prediction[image, patch], patches[image, patch], strict=True):
                    total = total + (y - x if y > x else x - y)
                    count += 1
    return total / count


def ijepa(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """I-JEPA, ijepa/src/train.py: smooth L1 of each feature, targets normalised over a token's features; the mean."""
    total, count = torch.zeros((), dtype=prediction.dtype), 0
    width = prediction.shape[-1]
    for z, h in zip(prediction.reshape(-1, width), target.detach().reshape(-1, width), strict=True):
        mean = h.sum() / width
        deviation = torch.sqrt(((h - mean) ** 2).sum() / width + 1e-5)
        for one, other in zip(z, (h - mean) / deviation, strict=True):
            error = one - other
            size = error if error > 0 else -error
            total = total + (error**2 / 2 if size < 1 else size - 0.5)
            count += 1
    return total / count
