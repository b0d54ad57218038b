"""The starts that are compared: random weights, a pretrained model, and whatever else is set beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sslmed import artifact
from sslmed.artifact import Card
from sslmed.config import DataError, MissingInputError
from sslmed.data.modality import named
from sslmed.image_size import ImageSize
from sslmed.models.backbones import build
from sslmed.recipe import FinetuneRecipe
from sslmed.supervised.starting import IMAGENET, RANDOM
from sslmed.training.starts import start

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Arm:
    """One start.

    Attributes:
        name: in tables.
        source: as ``finetune --from`` takes it.
        card: its own; of random weights, of ``imagenet`` and of a weight file that of the model they stand beside,
            whose network they fill.
        artifact: whether ``source`` has a card of its own.
    """

    name: str
    source: str
    card: Card
    artifact: bool

    def network(self, size: ImageSize, seed: int) -> nn.Module:
        """The frozen network. Random weights are drawn from ``seed``, others are what they are."""
        if self.source == RANDOM:
            return build(self.card.backbone, size, seed).network
        if self.artifact:
            return artifact.load_backbone(self.source)
        config = self.card.backbone.model_copy(update={"init": self.source})
        return start(config, size, named(self.card.modality), 0).backbone.network.eval()

    def recipe(self, settings: FinetuneRecipe) -> FinetuneRecipe:
        """``settings`` with the network that a start without a card has."""
        if self.artifact:
            return settings
        backbone = self.card.backbone.model_copy(update={"init": RANDOM})
        if settings.backbone is not None and "drop_path" in settings.backbone.model_fields_set:
            backbone = backbone.model_copy(update={"drop_path": settings.backbone.drop_path})
        held = {"windows": self.card.windows, "slices": self.card.slices}
        if "size" not in settings.data.model_fields_set:
            held["size"] = self.card.size
        return settings.model_copy(update={"backbone": backbone, "data": settings.data.model_copy(update=held)})


def arms(model: Path | str, card: Card, beside: Sequence[str | Path]) -> tuple[Arm, ...]:
    """Random weights, the model, and the starts ``beside`` it, each named once.

    Raises:
        MissingInputError: one of them is not there.
        DataError: an artifact that was fine-tuned, or is of another modality.
    """
    found = [Arm(RANDOM, RANDOM, card, False), Arm(PRETRAINED, str(model), card, True)]
    for each in map(str, beside):
        own, whole = card, False
        if each != IMAGENET and not Path(each).exists():
            raise MissingInputError(f"there is no run, artifact or weight file at {each} (--beside)")
        if Path(each).is_dir():
            own, whole = artifact.read_card(each), True
            refuse_labels(own, each)
            if own.modality != card.modality:
                raise DataError(f"{each} is a model of {own.modality} images, {model} one of {card.modality} images")
        found.append(Arm(_name(each, [arm.name for arm in found]), each, own, whole))
    return tuple(found)


def refuse_labels(card: Card, what: str | Path) -> None:
    """Refuse a model that has learnt from labels.

    Raises:
        DataError: it has a head.
    """
    if card.head is not None:
        raise DataError(
            f"{what}: this backbone was fine-tuned with labels, so that no probe of it has few labels.\n"
            "Evaluate the pretrained artifact that it started from; the fine-tuning run holds its own test score."
        )


def _name(source: str, taken: Sequence[str]) -> str:
    name = base = IMAGENET if source == IMAGENET else Path(source).resolve().name
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    return name
