"""A whole model as one module: source intensities in, the answer in the source's own pixels out."""

import torch
from torch import nn

from sslmed.artifact import Card
from sslmed.data.modality import Modality
from sslmed.exporting.preparing import Prepare, placed, unboxed
from sslmed.supervised.applying import LEAST
from sslmed.supervised.model import Model


class Deployed(nn.Module):
    """What an exported file computes. ``forward`` takes images, and intensities where they cannot be measured.

    Attributes:
        outputs: their names, in order.
        planes: of an image: its colours, or its neighbouring slices.
    """

    outputs: tuple[str, ...]

    def __init__(self, policy: Modality, card: Card, network: nn.Module, whole: bool = True) -> None:
        super().__init__()
        self.policy, self.card = policy, card
        self.prepare = Prepare(policy, card.size, card.backbone.in_chans, whole)
        self.network = network.eval().cpu()
        self.planes = card.channels * card.slices

    @property
    def inputs(self) -> tuple[str, ...]:
        """``image`` (N, planes, H, W) float32, and perhaps ``intensity`` (N, 4): low, high, mean, std."""
        return ("image",) if self.prepare.measured else ("image", "intensity")

    def forward(self, image: torch.Tensor, intensity: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """The outputs, in the order of their names."""
        return self.finish(self.network(self.prepare(image, intensity)), image)

    def finish(self, answer: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The network's answer to ``image`` as users want it."""
        raise NotImplementedError


class Features(Deployed):
    """A backbone: ``features`` (N, D)."""

    outputs = ("features",)

    def finish(self, answer: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (answer,)


class _Supervised(Deployed):
    def __init__(self, model: Model) -> None:
        super().__init__(model.applied.policy, model.card, model.applied.head, not model.applied.tiles)
        self.about = model.about


class Classifier(_Supervised):
    """``probabilities`` (N, K), calibrated, and ``called``: the class (N,), or of findings which are there (N, K)."""

    outputs = ("probabilities", "called")

    def finish(self, answer: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cuts = self.about.thresholds
        if self.about.kind == "findings":
            return answer, answer >= answer.new_tensor(cuts or (0.5,) * len(self.about.classes))
        if cuts is not None and len(self.about.classes) == 2:
            return answer, (answer[:, 1] >= cuts[1]).to(torch.int64)
        return answer, answer.argmax(dim=1)


class Segmenter(_Supervised):
    """``probabilities`` (N, K, H, W) of source pixels and ``mask`` (N, H, W) uint8 with the masks' own values."""

    outputs = ("probabilities", "mask")

    def finish(self, answer: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = unboxed(answer, image) if self.prepare.whole else answer
        values = torch.tensor(self.about.values, dtype=torch.uint8, device=answer.device)
        return scores, values[scores.argmax(dim=1)]


class Finder(_Supervised):
    """``boxes`` (N, D, 6): left, top, right, bottom in pixels of the source, score, class; by falling score.

    ``called`` (N, D) says which reach the threshold of their class. What is no box has the class -1 and zeros.
    """

    outputs = ("boxes", "called")

    def finish(self, answer: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        corners, rest, kind = answer[..., :4], answer[..., 4:], answer[..., 5].to(torch.int64)
        down, across = placed(image, self.prepare.box)
        if self.prepare.whole:
            start, scale = (
                torch.stack([getattr(across, what), getattr(down, what)] * 2) for what in ("start", "inner")
            )
            length = torch.stack([across.length, down.length] * 2)
            corners = (corners - start.to(corners.dtype)) * (length / scale).to(corners.dtype)
        limits = torch.stack([across.length, down.length] * 2).to(corners.dtype)
        corners = corners.clamp_min(0).minimum(limits)
        cuts = answer.new_tensor(self.about.thresholds or (0.5,) * len(self.about.classes))
        there = (kind >= 0) & (corners[..., 2:] - corners[..., :2] >= LEAST).all(dim=-1)
        called = there & (rest[..., 0] >= cuts[kind.clamp_min(0)])
        found = torch.cat([corners, rest], dim=-1)
        return torch.where(there[..., None], found, found.new_tensor([0.0, 0.0, 0.0, 0.0, 0.0, -1.0])), called


KINDS: dict[str, type[_Supervised]] = {
    "class": Classifier,
    "findings": Classifier,
    "mask": Segmenter,
    "boxes": Finder,
}


def deployed(model: Model) -> Deployed:
    """The module of a fine-tuned model; of one that locates by labels alone its classes or findings."""
    return KINDS[model.about.kind](model)
