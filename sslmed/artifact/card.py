"""What an artifact says of itself, for programs and for people."""

from typing import Any, Final, Literal

import torch
from pydantic import Field

from sslmed import __version__, image_size
from sslmed.config import Config
from sslmed.models.backbones import BackboneConfig, timm_arguments

SCHEMA: Final = 1


class DataCard(Config):
    """What training read, without naming anyone."""

    fingerprint: str
    key_id: str
    split_digest: str
    images: int
    patients: int
    licence: str = "not stated"


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
        windows, slices: how an image becomes channels; see ``DataConfig``.
        normalisation: the modality's, in words.
        method: pretext task or supervised task, as in the recipe; ``none`` when the backbone was not pretrained.
        recipe: the resolved recipe of the run.
        parent: sha256 of the weights that training started from; none when they were random.
    """

    schema_version: Literal[1] = SCHEMA
    sslmed_version: str = __version__
    torch_version: str = torch.__version__
    backbone: BackboneConfig
    num_features: int
    size: image_size.ImageSize
    modality: str
    windows: tuple[str | tuple[float, float], ...] = ()
    slices: int = 1
    normalisation: str
    method: dict[str, Any]
    recipe: dict[str, Any]
    data: DataCard
    steps: int
    licence: str = "not stated"
    head: HeadCard | None = None
    parent: str | None = None

    @property
    def kind(self) -> str:
        """``backbone``, or the name of the head."""
        return self.head.name if self.head else "backbone"


def readme(card: Card) -> str:
    """The card for people."""
    name, channels = card.backbone.name, card.backbone.in_chans
    options = ", ".join(f"{key}={value!r}" for key, value in timm_arguments(card.backbone, card.size).items())
    task = f"`{card.head.name}` of `{card.head.target}`: {', '.join(card.head.classes)}" if card.head else "backbone"
    of = f"{channels}-channel" + (f" ({card.slices} neighbouring slices)" if card.slices > 1 else "")
    return f"""# {name}, {card.modality}, {card.method.get("name", "none")}

{task}. {of} {card.modality} images, {image_size.in_words(card.size)} pixels, {card.normalisation}.
Trained for {card.steps} steps on {card.data.images} images of {card.data.patients} patients
(data fingerprint `{card.data.fingerprint[:16]}`). Licence of the weights: {card.licence}.
Not a medical device: research use only.

```python
import sslmed
backbone = sslmed.load_backbone("artifact")  # checks every digest

import timm
backbone = timm.create_model("{name}", {options}, checkpoint_path="artifact/model.safetensors")
```
"""
