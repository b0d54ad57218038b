"""Formulas of predictive pretexts, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def rotation(logits: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RotNet, arXiv 1803.07728, equations 2 and 3: -log of the softmax at the true turn, mean over images and turns."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, turn in zip(logits, turns.tolist(), strict=True):
        total = total - (row[turn].exp() / sum(row[k].exp() for k in range(4))).log()
    return total / len(logits)
