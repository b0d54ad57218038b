"""What is no artifact, or damaged, or does not fit is refused in words; what it knows is passed on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import FILES, NAME, SEEN, card, network, sign

from sslmed import artifact
from sslmed.artifact import MANIFEST
from sslmed.commands.verify import verify
from sslmed.config import DataError, MissingInputError
from sslmed.data.store import Store
from sslmed.models.backbones import BackboneConfig


def test_a_run_or_its_artifact_may_be_named(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "run" / "artifact")
    assert artifact.resolve(good) == good
    assert artifact.resolve(tmp_path / "run") == tmp_path / "run" / "artifact"
    assert artifact.read_card(str(tmp_path / "run")) == card()


def test_what_is_no_artifact_is_said(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no run or artifact at"):
        artifact.read_card(tmp_path / "absent")
    with pytest.raises(DataError, match="neither a run nor an artifact"):
        artifact.read_card(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"no artifact yet.*--resume"):
        artifact.read_card(tmp_path)
    with pytest.raises(DataError, match="neither"):
        artifact.read_card(tmp_path / "run.json")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", sorted(FILES))
def test_one_flipped_byte_in_any_file_is_found(name: str, share: float, copy: Path) -> None:
    content = bytearray((copy / name).read_bytes())
    content[int(share * len(content))] ^= 1
    (copy / name).write_bytes(content)
    for read in (artifact.read_card, artifact.load_backbone, verify):
        with pytest.raises(DataError, match="damaged") as caught:
            read(copy)
        assert caught.value.exit_code == 65
        assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("name", sorted(FILES - {MANIFEST}))
def test_a_missing_file_is_named(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        artifact.read_card(copy)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"../card.json": "0"}', "\xff", '{"card.json": 3}'], ids=repr
)
def test_a_manifest_of_something_else(content: str, copy: Path) -> None:
    (copy / MANIFEST).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="damaged"):
        artifact.read_card(copy)


def test_a_file_that_the_manifest_forgets_is_damage(copy: Path) -> None:
    digests = json.loads((copy / MANIFEST).read_text())
    del digests["selftest.safetensors"]
    (copy / MANIFEST).write_text(json.dumps(digests))
    with pytest.raises(DataError, match=r"selftest\.safetensors is not in the manifest"):
        artifact.read_card(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 2}, "card version 2; this sslmed reads version 1"),
        ({"colour": "blue"}, "not valid"),
        ({"size": "large"}, "not valid"),
    ],
)
def test_a_card_of_another_version_or_with_other_fields(change: dict[str, Any], words: str, copy: Path) -> None:
    content = json.loads((copy / "card.json").read_text()) | change
    (copy / "card.json").write_text(json.dumps(content))
    sign(copy)
    with pytest.raises(DataError, match=words):
        artifact.read_card(copy)


def test_a_store_that_fits() -> None:
    artifact.check_fits(card(), "xray", 1)
    colour = card(modality="photo", backbone=BackboneConfig(name=NAME, in_chans=3))
    artifact.check_fits(colour, "photo", 3)
    artifact.check_fits(colour, "photo", 1)  # grey is repeated


@pytest.mark.parametrize(
    ("modality", "channels", "words"),
    [
        ("photo", 3, "backbone was trained on 1-channel xray; the store holds 3-channel photo"),
        ("photo", 1, "backbone was trained on 1-channel xray; the store holds 1-channel photo"),
        ("xray", 3, "backbone was trained on 1-channel xray; the store holds 3-channel xray"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_in_words(modality: str, channels: int, words: str) -> None:
    with pytest.raises(DataError) as caught:
        artifact.check_fits(card(), modality, channels)
    assert str(caught.value) == words
    assert caught.value.exit_code == 65


def test_the_fingerprint_comes_back(good: Path) -> None:
    np.testing.assert_array_equal(artifact.read_fingerprint(good), SEEN)


def test_what_the_card_says_of_a_store(phantom_store: Store) -> None:
    rows = phantom_store.rows("train")
    data = artifact.describe(phantom_store, rows)
    assert (data.images, data.patients) == (len(rows), len(set(phantom_store.patients(rows).tolist())))
    assert (data.fingerprint, data.key_id) == (phantom_store.fingerprint, phantom_store.key_id)
    assert data.split_digest == phantom_store.split_digest


def test_who_starts_from_it_has_seen_everybody_that_it_had(good: Path, copy: Path) -> None:
    seen = np.arange(16, 32, dtype=np.uint8).reshape(2, 8)
    data, everybody = artifact.inherit(card().data, seen, good)
    assert data == card().data
    np.testing.assert_array_equal(everybody, np.arange(32, dtype=np.uint8).reshape(4, 8))
    other = card().data.model_copy(update={"key_id": "87654321"})
    assert artifact.inherit(other, seen, good)[0].key_id == artifact.MIXED_KEYS
    artifact.write(copy, network(), card(data=other.model_copy(update={"key_id": artifact.MIXED_KEYS})), SEEN)
    assert artifact.inherit(other, seen, copy)[0].key_id == artifact.MIXED_KEYS
