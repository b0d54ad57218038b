"""Segmentation: a class for every pixel, by a U-Net decoder on the backbone's maps."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from sslmed.config import DataError
from sslmed.heads.head import Head, HeadConfig, Kind, Maps, full
from sslmed.models.backbones import Backbone
from sslmed.models.segmenters import PixelDecoder

VOID = 255  # in a mask: a pixel that counts for nothing
SMOOTH = 1.0  # pixels; keeps the Dice of a class that a batch does not show from being 0/0


class SegmentationConfig(HeadConfig):
    """The knobs of segmentation.

    Attributes:
        input: what the network is given of an image: ``whole``, all of it, scaled to ``data.size``; ``tiles``, windows
            of ``data.size`` pixels at the image's own resolution, in training at random places, afterwards all over the
            image with half of a window's side in common. Images must then be at least as large as a window.
        dice: share of the Dice loss; the rest is cross-entropy.
        decoder: ``auto``: where the start is of a restorative pretext task, neck and decoder start from it too, all but
            the last layer; ``random``: from random weights always.
        balance: ``weights``: in the cross-entropy a class counts inversely to the square root of its train pixels.
    """

    name: Literal["segmentation"] = "segmentation"
    input: Literal["whole", "tiles"] = "whole"
    dice: Annotated[float, Field(ge=0, le=1)] = 0.5
    balance: Literal["none", "weights"] = "none"
    decoder: Literal["auto", "random"] = "auto"

    @property
    def weighted(self) -> bool:
        return self.balance == "weights"

    @property
    def tiles(self) -> bool:
        return self.input == "tiles"


class Segmentation(Head):
    """Dice and cross-entropy. Class 0 is the background."""

    Config = SegmentationConfig
    config: SegmentationConfig
    kinds = ("mask",)
    needs = "pyramid"

    def __init__(self, config: SegmentationConfig, backbone: Backbone, classes: int, kind: Kind = "mask") -> None:
        super().__init__(config, backbone, classes, kind)
        self.head: PixelDecoder = PixelDecoder(backbone.levels, classes)

    def logits(self, features: Maps) -> torch.Tensor:
        image, *maps = features
        return full(self.head(maps, image.shape[-2:]))

    def loss(self, features: Maps, target: torch.Tensor) -> torch.Tensor:
        """Of masks (N, H, W) with class numbers; 255 counts for nothing."""
        logits = self.logits(features)
        ignored = target == VOID
        entropy = F.cross_entropy(logits, target, weight=self.weights, ignore_index=VOID, reduction="none")
        counted = self.weights[target.masked_fill(ignored, 0)] if self.weights is not None else torch.ones_like(entropy)
        mean = entropy.sum() / (counted * ~ignored).sum().clamp_min(1e-6)
        return self.config.dice * dice_loss(logits, target) + (1 - self.config.dice) * mean

    def predict(self, features: Maps) -> torch.Tensor:
        """Softmax probabilities (N, classes, H, W)."""
        return (self.logits(features) / self.temperature).softmax(dim=1)

    def metrics(self) -> tuple[str, ...]:
        return "dice", "iou", "hd95", "asd"

    def start_from(self, decoder: Mapping[str, torch.Tensor] | None) -> tuple[str, ...]:
        """Of a restorative pretext task, but for the last layer; not where ``config.decoder`` is ``random``."""
        if decoder is None:
            return ()
        if self.config.decoder == "random":
            return ("neck and decoder start from random weights (head.decoder=random)",)
        own = self.head.reusable
        wrong = sorted(own.keys() ^ decoder.keys()) or [n for n in own if own[n].shape != decoder[n].shape]
        if wrong:
            raise DataError(
                f"the decoder of the start does not fit this head: {_differs(wrong[0], own, decoder)}"
                f"{f', and {len(wrong) - 1} more' if len(wrong) > 1 else ''}.\n"
                "Give head.decoder=random, which starts from the backbone alone"
            )
        self.head.load_state_dict(dict(decoder), strict=False)
        return (f"neck and decoder start from the pretraining's: {len(own)} tensors, all but the last layer",)

    def balance(self, counts: torch.Tensor) -> None:
        if self.config.balance == "weights":
            rarity = counts.to(torch.float32).clamp_min(1).rsqrt()
            self.weights = rarity / rarity.mean()


def _differs(name: str, own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str:
    here, there = (f"{tuple(each[name].shape)}" if name in each else "missing" for each in (own, other))
    return f"{name} is {there} there and {here} here"


def dice_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - the mean over foreground classes of (2 sum p t + 1) / (sum p + sum t + 1).

    Sums go over all counted pixels of the batch: of one image alone, a class of few pixels or none would decide
    (nnU-Net, arXiv 1904.08128, its 2D configuration; Milletari et al., arXiv 1606.04797, with p for p squared).

    Args:
        logits: (N, K, H, W), K at least 2.
        target: (N, H, W), class numbers, 255 ignored.
    """
    counted = (target != VOID)[:, None]
    truth = F.one_hot(target.masked_fill(target == VOID, 0), logits.shape[1]).movedim(-1, 1) * counted
    found = logits.softmax(dim=1) * counted
    both, total = ((found * truth).sum(dim=(0, 2, 3)), (found + truth).sum(dim=(0, 2, 3)))
    return 1 - ((2 * both + SMOOTH) / (total + SMOOTH))[1:].mean()
