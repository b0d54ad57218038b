"""What a training starts from: random weights, timm's pretrained ones, an artifact's or those in a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslmed import artifact
from sslmed.artifact import Card, DataCard
from sslmed.config import MissingInputError, UsageError
from sslmed.data.modality import Modality, in_words
from sslmed.durable import sha256
from sslmed.image_size import ImageSize
from sslmed.models.backbones import Backbone, BackboneConfig, build, published
from sslmed.models.key_layouts import KEY_LAYOUTS, PLAIN
from sslmed.models.weights import SAFETENSORS, SUFFIXES, digest, fill, read

Kind = Literal["random", "imagenet", "artifact", "file"]
Seen = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Start:
    """A backbone, and where its weights come from.

    Attributes:
        kind: the word that stands for the weights in a card, which holds no path.
        parent: sha256 of weights that were trained before; None for random ones.
        folder: the artifact that they lie in.
        card: the artifact's.
        lines: what was loaded and what differs, for people.
        licence: of the weights, as somebody stated it; what is usual for them only where that forbids commercial use.
    """

    backbone: Backbone
    kind: Kind
    parent: str | None = None
    folder: Path | None = None
    card: Card | None = None
    lines: tuple[str, ...] = ()
    licence: str = ""

    @property
    def weights(self) -> str:
        """What a run records, so that a resume with other weights is seen."""
        return self.parent or self.kind

    def described(self, data: DataCard, seen: Seen) -> tuple[DataCard, Seen]:
        """What card and fingerprint say of a training that began here and itself read ``data`` and ``seen``."""
        if self.folder is not None:
            return artifact.inherit(data, seen, self.folder)
        if self.kind == "file":  # nobody knows whom it has seen
            return data.model_copy(update={"key_id": artifact.MIXED_KEYS}), seen
        return data, seen


def start(config: BackboneConfig, size: ImageSize, policy: Modality, seed: int) -> Start:
    """The backbone that ``config`` asks for, with the weights that its ``init`` names.

    Only ``imagenet`` may use the network.

    Args:
        size: of the input, pixels.
        policy: of the images that it is to learn from.
        seed: of random weights.

    Raises:
        UsageError: ``init`` is an unknown word, or the artifact's network has another name.
        MissingInputError: the path does not exist, or timm's weights cannot be had.
        DataError: the weights are damaged, or do not fill the network.
    """
    kind = _kind(config.init)
    backbone = build(config, size, seed)
    if kind == "random":
        return Start(backbone, kind)
    backbone.pretrained = True
    if kind == "imagenet":
        source, state = published(config, size)
        report = fill(backbone.network, state, source, size)
        return Start(backbone, kind, digest(state), lines=tuple(report.lines()))
    if kind == "artifact":
        return _from_artifact(config, policy, backbone)
    path = Path(config.init)
    report = fill(backbone.network, read(path), config.init, ordered=path.suffix != SAFETENSORS)
    licence = _usual(report.layout)
    return Start(backbone, kind, sha256(path), lines=(*report.lines(), *_warned(licence)), licence=licence)


def worded(config: BackboneConfig, kind: Kind) -> BackboneConfig:
    """``config`` without a path, as a card holds it."""
    return config.model_copy(update={"init": kind})


def _kind(init: str) -> Kind:
    if init in ("random", "imagenet"):
        return "random" if init == "random" else "imagenet"
    path = Path(init)
    if path.is_dir():
        return "artifact"
    if path.is_file():
        return "file"
    if path.name.endswith(SUFFIXES) or len(path.parts) > 1:
        raise MissingInputError(f"there are no weights at {init} (backbone.init)")
    raise UsageError(
        f"'backbone.init' is {init}, which is neither a word it knows nor a path that exists; allowed: random, "
        f"imagenet, or the path of a run, an artifact or a weight file ({', '.join(SUFFIXES)})"
    )


def _from_artifact(config: BackboneConfig, policy: Modality, backbone: Backbone) -> Start:
    card, folder = artifact.read_card(config.init), artifact.resolve(config.init)
    if card.backbone.name.partition(".")[0] != config.name.partition(".")[0]:
        raise UsageError(
            f"the recipe names backbone {config.name}, but {config.init} holds {card.backbone.name}; "
            f"set backbone.name={card.backbone.name}, or give another backbone.init"
        )
    path = folder / "model.safetensors"
    report = fill(backbone.network, read(path), config.init, card.size, family=PLAIN)
    lines = report.lines()
    if card.modality != policy.name:
        lines.append(f"note: the weights were trained on {card.modality} images; the store holds {policy.name}")
    normalisation = in_words(policy)
    if card.normalisation != normalisation:
        lines.append(f"note: intensities were normalised otherwise there: {card.normalisation}; here: {normalisation}")
    if card.imported and card.imported.missing:
        lines.append(f"note: {len(card.imported.missing)} of its tensors were random when it was imported")
    licence = licence_of(card)
    return Start(backbone, "artifact", sha256(path), folder, card, (*lines, *_warned(licence)), licence)


def licence_of(card: Card) -> str:
    """The licence that training from an artifact has to heed; empty when nobody has stated one.

    Its own as it was stated, or that of what it started from where that forbids commercial use and its own does not.
    Of foreign weights without a statement, the usual one of their family, where that forbids commercial use.
    """
    own = card.stated.licence or (_usual(card.imported.layout) if card.imported else "")
    return next(filter(artifact.non_commercial, (own, card.parent_licence)), own or card.parent_licence)


def _usual(layout: str) -> str:
    usual = KEY_LAYOUTS.get(layout, PLAIN).usual_licence
    return usual if artifact.non_commercial(usual) else ""


def _warned(licence: str) -> list[str]:
    if not artifact.non_commercial(licence):
        return []
    return [f"warning: these weights are for non-commercial use: {licence}; so may be what is trained from them"]
