"""A backbone as timm and Hugging Face read it: ``model.safetensors`` beside a ``config.json``."""

from typing import Any

import numpy as np

from sslmed import artifact, image_size
from sslmed.artifact import Card
from sslmed.data import intensity as of
from sslmed.models.backbones import build, timm_arguments
from sslmed.models.layout import layout

CONFIG = "config.json"


def config(card: Card) -> dict[str, Any]:
    """The ``config.json`` with which ``timm.create_model("local-dir:DIR")`` and ``"hf-hub:NAME"`` make the network.

    Its mean and std are of what timm calls an image in [0, 1]; of which range of intensities that is [0, 1] the README
    says, as timm has no words for it.
    """
    arguments = timm_arguments(card.backbone, card.size)
    where = layout(build(card.backbone, card.size, seed=0).network)
    mean, std = _scale(card)
    about: dict[str, Any] = {
        "tag": "sslmed",
        "custom_load": False,
        "input_size": [card.backbone.in_chans, *image_size.sides(card.size)],
        "fixed_input_size": "img_size" in arguments,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "border",
        "mean": mean,
        "std": std,
        "num_classes": 0,
        "classifier": where.classifiers[0] if len(where.classifiers) == 1 else (list(where.classifiers) or None),
        "license": card.stated.licence or None,
    }
    if card.backbone.in_chans == 3:  # timm adapts three channels to others, and no other number to three
        names = [name.removesuffix(".weight") for name in where.inputs]
        about["first_conv"] = names[0] if len(names) == 1 else (names or None)
    given = {name: value for name, value in arguments.items() if name != "num_classes"}
    return {
        "architecture": card.backbone.name.partition(".")[0],
        "num_classes": 0,
        "num_features": card.num_features,
        "model_args": {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
        "pretrained_cfg": {name: value for name, value in about.items() if value is not None},
    }


def _scale(card: Card) -> tuple[list[float], list[float]]:
    """Mean and std of each channel, after the intensities that the normalisation clips to are [0, 1]."""
    count, normalise = card.backbone.in_chans, artifact.policy(card).normalise
    if normalise is of.scored:
        return [0.0] * count, [1.0] * count  # of z-scores
    if normalise is not of.as_imagenet:
        return [0.5] * count, [0.25] * count
    mean, std = of.IMAGENET_MEAN, of.IMAGENET_STD
    if card.channels != len(mean):
        mean, std = np.full(count, mean.mean()), np.full(count, std.mean())
    return [round(float(each), 6) for each in mean], [round(float(each), 6) for each in std]
