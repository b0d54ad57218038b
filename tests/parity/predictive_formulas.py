"""Formulas of predictive pretexts, from the papers alone: loops and float64, nothing of sslmed."""

import torch


def rotation(logits: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """RotNet, arXiv 1803.07728, equations 2 and 3: -log of the softmax at the true turn, mean over images and turns."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, turn in zip(logits, turns.tolist(), strict=True):
        total = total - (row[turn].exp() / sum(row[k].exp() for k in range(4))).log()
    return total / len(logits)


def jigsaw(logits: torch.Tensor, orders: torch.Tensor) -> torch.Tensor:
    """Jigsaw, arXiv 1603.09246, section 3.2: -log p(S | patches) of the true order S, mean over images."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, order in zip(logits, orders.tolist(), strict=True):
        total = total + sum(other.exp() for other in row).log() - row[order]
    return total / len(logits)


def relative_position(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Relative position, arXiv 1505.05192, section 3: -log of the softmax over eight places, mean over pairs."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, place in zip(logits, places.tolist(), strict=True):
        total = total - (1 / sum((other - row[place]).exp() for other in row)).log()
    return total / len(logits)
