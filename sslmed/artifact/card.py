"""What an artifact says of itself, for programs; `page` says it to people."""

import re
from typing import Any, Final, Literal

import torch
from pydantic import Field

from sslmed import __version__, image_size
from sslmed.config import Config
from sslmed.models.backbones import BackboneConfig

SCHEMA: Final = 1
NON_COMMERCIAL = re.compile(r"(^|[^a-z])(nc|non[- ]?commercial)([^a-z]|$)", re.IGNORECASE)


class StatedConfig(Config):
    """What only a person can say of weights; empty is not stated, and `sslmed publish` asks for all of it.

    Attributes:
        licence: of the weights, an SPDX identifier such as ``CC-BY-4.0`` where there is one.
        data_licence: of the images that training read.
        intended_use: what the weights are for, and for whom.
        limits: what they are not for, and what has not been tried.
    """

    licence: str = ""
    data_licence: str = ""
    intended_use: str = ""
    limits: str = ""


class DataCard(Config):
    """What training read, without naming anyone."""

    fingerprint: str
    key_id: str
    split_digest: str
    images: int
    patients: int


class Score(Config):
    """One number of a table, with its 95 % interval; nan where it is undefined is left out of the table.

    Attributes:
        start: whose it is: ``pretrained``, ``random``, ...; of a fine-tuned model ``overall``, or the class, finding or
            title that it is of.
        budget: of labels.
        by: the probe, or the task.
    """

    start: str
    budget: str
    by: str
    metric: str
    value: float
    low: float
    high: float


class Measured(Config):
    """Scores on test patients.

    Attributes:
        about: of what, on whom, and what speaks against them, a sentence each.
        headline: the metric that was named beforehand; of many, one would often look better by chance.
    """

    about: tuple[str, ...]
    headline: str = ""
    scores: tuple[Score, ...]


class ImportCard(Config):
    """Where foreign weights came from, and how they were fitted.

    Attributes:
        layout: the family whose names the file has.
        source: as the person who imported them said it.
        digest: sha256 of the file.
        adapted: a line a tensor.
        dropped: tensors of the file that a backbone has no place for.
        missing: tensors of the network that the file did not have, which are random.
    """

    layout: str
    source: str
    digest: str
    matched: int
    adapted: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


class HeadCard(Config):
    """The supervised head of a fine-tuned model.

    Attributes:
        target: what was learnt, in words: the label, the labels, or masks.
        kind: one class an image, several findings an image, a class a pixel, or boxes.
        config: its recipe section.
        temperature, offset: what logits are divided by and what is then added, and
        thresholds: from which probability on a class is called, or a box is drawn; all chosen on val patients. None:
            the likeliest class.
        calibration: how probabilities did on those val patients, before and after.
        values: of masks, the value of each class in the files.
        shrunk_to: of tiles: images whose shorter side is longer are shrunk to it first, as ``ingest --size`` did.
        weak: its boxes come from class labels alone.
        mirrors: turns and flips that training made, which test-time augmentation may make too.
    """

    name: str
    target: str
    kind: Literal["class", "findings", "mask", "boxes"] = "class"
    classes: tuple[str, ...]
    config: dict[str, Any]
    temperature: float = 1.0
    offset: float = 0.0
    thresholds: tuple[float, ...] | None = None
    calibration: dict[str, float] = Field(default_factory=dict)
    values: tuple[int, ...] = ()
    shrunk_to: int | None = None
    mirrors: tuple[str, ...] = ()
    weak: bool = False


class Card(Config):
    """What a later command must know to use the weights without any flag.

    Attributes:
        size: of the input, pixels: the side of a square, or height and width.
        channels: of a stored image, 1 or 3: one is repeated to those of the network, and normalised as one.
        windows, slices: how an image becomes channels; see ``DataConfig``.
        normalisation: the modality's, in words.
        method: pretext task or supervised task, as in the recipe; ``none`` when the backbone was not pretrained.
        recipe: the resolved recipe of the run.
        decoder: of what kind the neck and decoder of the pretext task are that lie beside the backbone; none where
            there are none.
        parent: sha256 of the weights that training started from; none when they were random.
        parent_licence: theirs, where it is known.
        stated: what a person has said.
        monitors: the last numbers that training logged.
        measured: scores on test patients: of a backbone those of ``evaluate``, of a fine-tuned model its own.
        imported: of foreign weights, where they came from.
    """

    schema_version: Literal[1] = SCHEMA
    sslmed_version: str = __version__
    torch_version: str = torch.__version__
    backbone: BackboneConfig
    num_features: int
    size: image_size.ImageSize
    modality: str
    channels: int = 1
    windows: tuple[str | tuple[float, float], ...] = ()
    slices: int = 1
    normalisation: str
    method: dict[str, Any]
    recipe: dict[str, Any]
    data: DataCard
    steps: int
    head: HeadCard | None = None
    decoder: Literal["unet"] | None = None
    parent: str | None = None
    parent_licence: str = ""
    stated: StatedConfig = StatedConfig()
    monitors: dict[str, float] = Field(default_factory=dict)
    measured: Measured | None = None
    imported: ImportCard | None = None

    @property
    def kind(self) -> str:
        """``backbone``, or the name of the head."""
        return self.head.name if self.head else "backbone"


def non_commercial(licence: str) -> bool:
    """Whether a licence forbids commercial use, as its name says: CC-BY-NC-4.0, "non-commercial research only"."""
    return NON_COMMERCIAL.search(licence) is not None
