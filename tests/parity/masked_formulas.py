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
