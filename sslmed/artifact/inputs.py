"""Image files as the network of an artifact wants them."""

from collections.abc import Iterator
from pathlib import Path

import torch

from sslmed import artifact
from sslmed.artifact.card import Card
from sslmed.config import DataError, MissingInputError
from sslmed.data import readers
from sslmed.data.input import network_input, refuse_colour, with_neighbours
from sslmed.data.modality import Modality
from sslmed.data.scan import Scan
from sslmed.data.sources.reading import Pool, Read, Refused, units
from sslmed.data.views import Pixels


def load_images(source: Path | str, model: Path | str) -> torch.Tensor:
    """Images (N, C, H, W) of a file or folder, read and prepared as those that the artifact was trained on.

    Every slice of a volume, and every frame of a clip, is an image; what belongs together lies together, in order.

    Args:
        source: an image, a volume, or a folder of them in any format that ``sslmed ingest`` reads.
        model: an artifact, or a finished run.

    Raises:
        MissingInputError: nothing is there.
        DataError: a damaged artifact, or a file that cannot be read or is not of its modality: the first of them.
    """
    source, card = Path(source), artifact.read_card(model)
    policy = artifact.policy(card)
    files = readers.find(source) if source.exists() else []
    if not files:
        raise MissingInputError(f"there is no image at {source}; read are {', '.join(sorted(readers.SUFFIXES))}")
    wanted, bad = units(files, policy, Pool(None, 0))
    if bad:
        raise DataError(f"{bad[0][0]}: {bad[0][1]}")
    read = Read(policy.name, lambda scan, pixels: [*_prepared(scan, pixels, card, policy)])
    found: list[torch.Tensor] = []
    for unit in wanted:
        for images in read(unit):
            if isinstance(images, Refused):
                raise DataError(f"{unit.paths[images.at]}: {images.reason}")
            found += images
    return torch.stack(found)


def _prepared(scan: Scan, pixels: Pixels, card: Card, policy: Modality) -> Iterator[torch.Tensor]:
    channels = card.backbone.in_chans
    refuse_colour(scan, pixels, channels)
    intensity = policy.intensity(pixels)
    for image in with_neighbours(scan, pixels, card.slices):
        yield network_input(image, intensity, policy, card.size, channels)
