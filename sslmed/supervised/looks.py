"""Test-time augmentation: the same image turned, mirrored or drawn smaller, and its answer turned back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sslmed.models.boxes import nms

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

    def boxes_back(self, found: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Boxes (N, D, 6) that this look found in an input of height and width ``size``, where they belong.

        Args:
            size: of the images before ``there``.
        """
        boxes, rest = found[..., :4], found[..., 4:]
        height, width = size if self.turns % 2 == 0 else size[::-1]
        middle = boxes.new_tensor([width, height, width, height]) / 2
        boxes = (boxes - middle) / self.scale + middle
        for _ in range(self.turns):  # a quarter turn clockwise
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.stack([height - bottom, left, height - top, right], dim=-1)
            height, width = width, height
        if self.mirrored:
            left, top, right, bottom = boxes.unbind(-1)
            boxes = torch.stack([width - right, top, width - left, bottom], dim=-1)
        return torch.cat([boxes, rest], dim=-1)


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


def found(
    predict: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    seen: Iterable[Look],
    suppress: float,
    most: int,
) -> torch.Tensor:
    """The boxes (N, D, 6) of all looks at the images together, after suppression; by falling score, class -1 last.

    Args:
        suppress: of two boxes of a class with a greater IoU the one of the lower score goes.
        most: D at most.
    """
    size = (images.shape[2], images.shape[3])
    parts = [look.boxes_back(predict(look.there(images)), size) for look in seen]
    if len(parts) == 1:
        return parts[0]
    together = torch.cat(parts, dim=1)
    boxes, scores, classes = together[..., :4], together[..., 4], together[..., 5]
    real = classes >= 0
    apart = torch.where(real[..., None], boxes, boxes.new_tensor([0.0, 0.0, 1.0, 1.0]))  # suppression wants areas
    stays = nms(apart, scores, classes.long(), suppress) & real
    kept = torch.where(stays[..., None], together, together.new_tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0]))
    order = kept[..., 4].argsort(dim=1, descending=True, stable=True)[:, :most]
    return kept.gather(1, order[..., None].expand_as(kept))


def _scaled(images: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return images
    theta = images.new_tensor([[1 / scale, 0, 0], [0, 1 / scale, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
