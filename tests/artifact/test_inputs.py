"""Files as the network of an artifact wants them: what `predict` would give it."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sslmed
from sslmed import artifact
from sslmed.artifact import Card, DataCard
from sslmed.config import DataError, MissingInputError
from sslmed.data.input import network_input
from sslmed.data.modality import MODALITIES, in_words
from sslmed.data.writers import write_image, write_nifti
from sslmed.models.backbones import BackboneConfig, build


def written(folder: Path, modality: str, in_chans: int = 1, slices: int = 1) -> Path:
    config = BackboneConfig(name="test_resnet", in_chans=in_chans)
    backbone = build(config, 32, 0)
    data = DataCard(fingerprint="", key_id="", split_digest="", images=1, patients=1)
    card = Card(
        backbone=config,
        num_features=backbone.num_features,
        size=32,
        modality=modality,
        slices=slices,
        normalisation=in_words(MODALITIES[modality]),
        method={},
        recipe={},
        data=data,
        steps=0,
    )
    artifact.write(folder, backbone.network, card, np.zeros((0, 8), np.uint8))
    return folder


def test_an_image_is_prepared_as_in_training(tmp_path: Path) -> None:
    model = written(tmp_path / "artifact", "xray")
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 60), dtype=np.uint16)
    write_image(tmp_path / "a.png", pixels)
    (image,) = sslmed.load_images(tmp_path / "a.png", model)
    policy = MODALITIES["xray"]
    assert torch.equal(image, network_input(pixels, policy.intensity(pixels), policy, 32, 1))
    assert sslmed.load_backbone(model)(image[None]).shape == (1, 96)


def test_every_slice_of_a_volume_comes_with_its_neighbours(tmp_path: Path) -> None:
    model = written(tmp_path / "artifact", "mri", in_chans=3, slices=3)
    volume = np.random.default_rng(0).integers(0, 900, (5, 20, 24)).astype(np.int16)
    write_nifti(tmp_path / "a.nii.gz", volume, None, np.eye(4))
    images = sslmed.load_images(tmp_path / "a.nii.gz", model)
    assert images.shape[1:] == (3, 32, 32)
    assert torch.equal(images[0, 0], images[0, 1])  # beyond the end the outermost is repeated
    assert torch.equal(images[0, 2], images[1, 1])
    assert torch.equal(images[1, 2], images[2, 1])


def test_refusals(tmp_path: Path) -> None:
    model = written(tmp_path / "artifact", "xray")
    with pytest.raises(MissingInputError, match="no image at"):
        sslmed.load_images(tmp_path / "absent.png", model)
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        sslmed.load_images(tmp_path / "broken.png", model)
    write_image(tmp_path / "colour.png", np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"colour\.png"):
        sslmed.load_images(tmp_path / "colour.png", model)
