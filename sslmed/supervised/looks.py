"""Test-time augmentation: the same image turned, mirrored or drawn smaller, and its answer turned back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SMALLER = (0.95, 0.9)  # only smaller: of a larger one the borders would be out of sight


@dataclass(frozen=True)
class Look:
    """One way to look at an image: quarter ``turns`` after a mirroring left-right, or ``scale`` of its size."""

    mirrored: bool = False
    turns: int = 0
    scale: float = 1.0

    def there(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) as this look sees them; what lies beyond the border repeats it."""
        images = images.flip(3) if self.mirrored else images
        return _scaled(torch.rot90(images, self.turns, (2, 3)), self.scale)

    def back(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of pixels (N, K, H, W) where they belong; scores of images (N, K) as they are."""
        if scores.ndim == 2:
            return scores
        scores = torch.rot90(_scaled(scores, 1 / self.scale), -self.turns, (2, 3))
        return scores.flip(3) if self.mirrored else scores


def looks(mirrors: Iterable[str], square: bool) -> tuple[Look, ...]:
    """The image itself first, then every mirroring and turn that ``mirrors`` allows; without any, smaller ones.

    Args:
        mirrors: of ``hflip``, ``vflip`` and ``rot90``: what training did, and what the answer therefore bears.
        square: whether a quarter turn keeps the shape of the input.
    """
    found = {(False, 0)}
    steps: dict[str, Callable[[tuple[bool, int]], tuple[bool, int]]] = {
        "hflip": lambda at: (not at[0], -at[1] % 4),
        "vflip": lambda at: (not at[0], (2 - at[1]) % 4),
        "rot90": lambda at: (at[0], (at[1] + (1 if square else 2)) % 4),
    }
    moves = [steps[name] for name in mirrors]
    while new := {move(at) for move in moves for at in found} - found:
        found |= new
    several = tuple(Look(mirrored, turns) for mirrored, turns in sorted(found))
    return several if len(several) > 1 else (Look(), *(Look(scale=scale) for scale in SMALLER))


def answered(
    predict: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, seen: Iterable[Look]
) -> torch.Tensor:
    """The mean of ``predict`` over looks at the images (N, C, H, W)."""
    return torch.stack([look.back(predict(look.there(images))) for look in seen]).mean(dim=0)


def _scaled(images: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return images
    theta = images.new_tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
