"""A fine-tuned model, from its artifact to something that answers."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from sslmed import artifact
from sslmed.artifact import Card, HeadCard
from sslmed.config import DataError
from sslmed.evaluation.detections import Found
from sslmed.evaluation.familiarity import Familiarity
from sslmed.heads import HEADS
from sslmed.image_size import sides
from sslmed.models.backbones import Backbone
from sslmed.supervised.applying import Applied
from sslmed.supervised.looks import looks
from sslmed.supervised.weak_boxes import names_of


@dataclass(frozen=True)
class Model:
    """A card, the head on its backbone, and what it knows of the images it was trained on."""

    card: Card
    about: HeadCard
    applied: Applied
    familiarity: Familiarity | None

    def called(self, scores: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> tuple[str, ...]:
        """The class of probabilities (K,), or every finding that is called, by the thresholds of the card."""
        cuts = self.about.thresholds
        if self.about.kind == "findings":
            least = np.full(len(scores), 0.5) if cuts is None else np.array(cuts)
            return tuple(name for name, there in zip(self.about.classes, scores >= least, strict=True) if there)
        if cuts is not None and len(scores) == 2:
            return (self.about.classes[int(scores[1] >= cuts[1])],)
        return (self.about.classes[int(scores.argmax())],)

    @property
    def boxed(self) -> dict[int, str]:
        """The classes that there can be boxes of: their numbers, and what boxes of them are called."""
        head: Any = self.applied.head
        if not head.locates:
            return dict(enumerate(self.about.classes))
        names = names_of(self.about.classes, self.about.target)
        return {number: names[number] for number in head.located}

    def kept(self, found: Found) -> Found:
        """The boxes that reach the threshold of their class."""
        cuts = self.about.thresholds or (0.5,) * len(self.about.classes)
        return found.where(found.scores >= np.array(cuts)[found.classes])

    def foremost(self, scores: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> int:
        """The number of the class that is called; of findings the likeliest called one's, or of all if none is."""
        called = self.called(scores)
        among = [number for number, name in enumerate(self.about.classes) if name in called or not called]
        return max(among, key=lambda number: float(scores[number]))

    def with_looks(self) -> "Model":
        """The same with test-time augmentation: the turns and mirrorings of training, else smaller images."""
        height, width = sides(self.card.size)
        return replace(self, applied=replace(self.applied, looks=looks(self.about.mirrors, height == width)))


def load(path: str | Path) -> Model:
    """The model of a fine-tuning run or artifact, on the GPU if there is one.

    Raises:
        MissingInputError: nothing is there.
        DataError: a damaged artifact, a backbone without a head, or a head that this sslmed does not know.
    """
    card = artifact.read_card(path)
    about = card.head
    if about is None:
        raise DataError(f"{path} is a backbone without a head; run `sslmed finetune` on it first")
    try:
        kind = HEADS[about.name]
        config = kind.Config.model_validate(about.config)
    except (KeyError, ValidationError) as error:
        raise DataError(f"{path} has a head '{about.name}' that this sslmed does not know; use a newer one") from error
    head = kind(config, Backbone(artifact.load_backbone(path)), len(about.classes), about.kind)
    head.named(about.classes)
    artifact.load_head(path, head.head)
    head.temperature, head.offset = about.temperature, about.offset
    head.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    known = artifact.read_familiarity(path)
    applied = Applied(
        head,
        artifact.policy(card),
        card.size,
        card.backbone.in_chans,
        config.tiles,
        about.shrunk_to,
        described=known is not None,
        locating=head.locates,
    )
    return Model(card, about, applied, None if known is None else Familiarity.from_tensors(known))
