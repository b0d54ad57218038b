"""The decoder of a restorative pretext task beside its backbone: written, named, found again, damaged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sslmed import artifact
from sslmed.artifact import DECODER, MANIFEST, Card, DataCard
from sslmed.config import DataError
from sslmed.data.modality import MODALITIES, in_words
from sslmed.durable import sha256
from sslmed.heads.segmentation import Segmentation, SegmentationConfig
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.models.segmenters import PixelDecoder

NAME, SIZE = "test_resnet", 32


def card(**changes: Any) -> Card:
    settings: dict[str, Any] = {
        "backbone": BackboneConfig(name=NAME),
        "num_features": 96,
        "size": SIZE,
        "modality": "xray",
        "normalisation": in_words(MODALITIES["xray"]),
        "method": {"name": "denoising"},
        "recipe": {},
        "data": DataCard(fingerprint="f" * 64, key_id="12345678", split_digest="d" * 64, images=7, patients=3),
        "steps": 12,
    }
    return Card(**(settings | changes))


def network(seed: int = 1) -> Backbone:
    return build(BackboneConfig(name=NAME), SIZE, seed)


def restorer(levels: Any, seed: int = 3) -> PixelDecoder:
    torch.manual_seed(seed)
    return PixelDecoder(levels, 1).to(memory_format=torch.channels_last)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backbone = network()
    decoder = restorer(backbone.levels).reusable
    path = tmp_path / "artifact"
    artifact.write(path, backbone.network, card(decoder="unet"), np.zeros((1, 8), np.uint8), decoder=decoder)
    return path


def test_it_is_all_of_the_segmentation_head_but_the_last_layer() -> None:
    for name in (NAME, "test_vit", "test_convnext"):
        backbone = build(BackboneConfig(name=name), SIZE, 0)
        tensors = restorer(backbone.levels).reusable
        head = Segmentation(SegmentationConfig(), backbone, 3).head.state_dict()
        last = {"decoder.classifier.weight", "decoder.classifier.bias"}
        assert tensors.keys() == head.keys() - last
        assert all(tensors[key].shape == head[key].shape for key in tensors)
        assert any(key.startswith("neck.") for key in tensors) == (name == "test_vit")


def test_the_file_is_signed_and_holds_the_tensors(folder: Path) -> None:
    assert json.loads((folder / MANIFEST).read_text())[DECODER] == sha256(folder / DECODER)
    kept, expected = artifact.read_decoder(folder), restorer(network().levels).reusable
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[key], expected[key]) for key in kept)
    assert not any(key.startswith("decoder.classifier") for key in load_file(folder / DECODER))


def test_the_card_and_the_page_name_it(folder: Path, tmp_path: Path) -> None:
    assert artifact.read_card(folder).decoder == "unet"
    page = (folder / "README.md").read_text()
    assert "`decoder.safetensors` holds the neck and the U-Net decoder of the pretext task" in page
    assert "`sslmed finetune xray/segmentation --from artifact`" in page
    artifact.write(tmp_path / "without", network().network, card(), np.zeros((1, 8), np.uint8))
    assert not (tmp_path / "without" / DECODER).exists()
    assert artifact.read_card(tmp_path / "without").decoder is None
    assert "decoder" not in (tmp_path / "without" / "README.md").read_text()


def test_it_is_copied_with_the_other_files(folder: Path, tmp_path: Path) -> None:
    known = artifact.read_card(folder)
    with artifact.rewritten(folder, tmp_path / "copy", known.model_copy(update={"steps": 13}), {}):
        pass
    assert sha256(tmp_path / "copy" / DECODER) == sha256(folder / DECODER)
    assert not artifact.damage(tmp_path / "copy")


def test_a_changed_byte_is_damage(folder: Path) -> None:
    content = bytearray((folder / DECODER).read_bytes())
    content[-1] ^= 1
    (folder / DECODER).write_bytes(content)
    assert artifact.damage(folder) == [f"{DECODER} does not match its digest"]
    with pytest.raises(DataError, match=r"decoder\.safetensors does not match"):
        artifact.read_card(folder)


def test_a_file_that_is_gone_from_the_manifest_too_is_missed(folder: Path) -> None:
    (folder / DECODER).unlink()
    digests = json.loads((folder / MANIFEST).read_text())
    del digests[DECODER]
    (folder / MANIFEST).write_text(json.dumps(digests))
    assert artifact.read_card(folder).decoder == "unet"
    with pytest.raises(DataError, match=r"decoder\.safetensors is no file of tensors"):
        artifact.read_decoder(folder)
