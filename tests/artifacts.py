"""A small artifact for tests, and its signature."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sslmed import artifact
from sslmed.artifact import MANIFEST, Card, DataCard, HeadCard
from sslmed.data.modality import MODALITIES, in_words
from sslmed.durable import sha256
from sslmed.models.backbones import BackboneConfig, build

NAME, SIZE = "test_resnet", 32


SEEN = np.arange(24, dtype=np.uint8).reshape(3, 8)


FILES = {
    "model.safetensors",
    "fingerprint.safetensors",
    "selftest.safetensors",
    "card.json",
    "README.md",
    MANIFEST,
}


IMAGES = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def card(**changes: Any) -> Card:
    data = DataCard(fingerprint="f" * 64, key_id="12345678", split_digest="d" * 64, images=7, patients=3)
    config = BackboneConfig(name=NAME, in_chans=1)
    settings: dict[str, Any] = {
        "backbone": config,
        "num_features": 64,
        "size": SIZE,
        "modality": "xray",
        "normalisation": in_words(MODALITIES["xray"]),
        "method": {"name": "simclr"},
        "recipe": {"train": {"seed": 0}},
        "data": data,
        "steps": 12,
    }
    return Card(**(settings | changes))


def network(seed: int = 1) -> nn.Module:
    """A network whose BatchNorm has seen something."""
    module = build(BackboneConfig(name=NAME, in_chans=1), SIZE, seed).network
    module.train()(IMAGES)
    return module


def written(folder: Path, head: nn.Module | None = None) -> Path:
    about = HeadCard(name="classification", target="finding", classes=("clear", "nodule"), config={})
    artifact.write(folder, network(), card(head=about if head else None), SEEN, head)
    return folder


def sign(folder: Path) -> None:
    """Make the manifest match again, as someone who changes a file on purpose would."""
    digests = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests))
