"""Whatever opens an artifact refuses what someone has put into it, and leaves everything as it was."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import FILES, IMAGES, SEEN, card, network, sign

import sslmed
from sslmed import artifact
from sslmed.artifact import MANIFEST, HeadCard
from sslmed.commands.predict import predict
from sslmed.commands.publish import publish
from sslmed.commands.pull import pull
from sslmed.commands.verify import verify
from sslmed.config import DataError
from sslmed.data.writers import write_image
from sslmed.durable import sha256
from sslmed.heads.classification import Classification, ClassificationConfig
from sslmed.models.backbones import Backbone

STATED = ("licence=MIT", "data_licence=MIT", "intended_use=tests", "limits=phantoms")


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "read_card": lambda folder, _: artifact.read_card(folder),
    "load_backbone": lambda folder, _: sslmed.load_backbone(folder),
    "verify": lambda folder, _: verify(folder),
    "publish": lambda folder, out: publish(folder, out, stated=STATED),
    "pull": lambda folder, out: pull(folder, out, sha256=sha256(folder / MANIFEST)),
    "predict": lambda folder, out: predict(folder, out.parent / "images", out),
}


def refused(folder: Path, reader: str, words: str | None = None) -> None:
    """A typed refusal after which nothing has changed and nothing is left."""
    top = folder.parent
    (top / "images").mkdir(exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in top.rglob("*") if not path.is_symlink()}
    with pytest.raises(DataError, match=words) as caught:
        READERS[reader](folder, top / "out")
    assert caught.value.exit_code == 65
    assert len(str(caught.value).splitlines()) <= 6
    assert {path: path.stat().st_mtime_ns for path in top.rglob("*") if not path.is_symlink()} == before


class Evil:
    """What a pickle of it does when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "selftest.safetensors", "fingerprint.safetensors", "pytorch_model.bin", "model.pth"]
)
def test_an_evil_pickle_runs_nothing(name: str, signed: bool, reader: str, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save(Evil(marker), copy / name)
    if signed:
        sign(copy)
    if reader in ("read_card", "pull") and not signed and not name.endswith("safetensors"):
        READERS[reader](copy, tmp_path / "out") if reader == "pull" else refused(copy, reader)  # pull leaves it there
        assert not (tmp_path / "out" / name).exists()
    elif reader == "read_card" and signed and name.endswith("safetensors"):
        artifact.read_card(copy)  # it opens no weights
    elif reader == "load_backbone" and signed and name in ("selftest.safetensors", "fingerprint.safetensors"):
        sslmed.load_backbone(copy)
    else:
        refused(copy, reader)
    assert not marker.exists()
    torch.load(io.BytesIO((copy / name).read_bytes()), weights_only=False)  # it would have come
    assert marker.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "familiarity.safetensors"])
@pytest.mark.parametrize("reader", ["verify", "publish", "pull", "predict"])
def test_an_evil_pickle_in_a_fine_tuned_model(name: str, reader: str, tmp_path: Path) -> None:
    backbone = Backbone(network())
    head = Classification(ClassificationConfig(), backbone, 2)
    about = HeadCard(
        name="classification", target="finding", classes=("clear", "nodule"), config=head.config.model_dump()
    )
    folder, images = tmp_path / "model", IMAGES[:, :, :8, :8].clone()
    artifact.write(folder, backbone.network, card(head=about), SEEN, head.head)
    assert verify(folder).kind == "classification test_resnet"
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "a.png", (images[0, 0].numpy() * 20 + 99).astype(np.uint8))
    predict(folder, tmp_path / "images", tmp_path / "fine")
    torch.save(Evil(tmp_path / "marker"), folder / name)
    sign(folder)
    refused(folder, reader, "is no file of tensors|does not hold this network's tensors")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_symbolic_link_is_not_followed(name: str, reader: str, copy: Path, tmp_path: Path) -> None:
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    refused(copy, reader, "symbolic link")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "name", ["../card.json", "/etc/hostname", "a/../card.json", "..", "", "x\0", ".hidden", "a\\b"]
)
def test_a_manifest_that_names_what_lies_elsewhere(name: str, reader: str, copy: Path) -> None:
    digests = json.loads((copy / MANIFEST).read_text())
    (copy.parent / "card.json").write_bytes((copy / "card.json").read_bytes())
    (copy / MANIFEST).write_text(json.dumps(digests | {name: digests["card.json"]}))
    refused(copy, reader, "no plain file name")


@pytest.mark.parametrize("reader", [name for name in READERS if name != "pull"])
@pytest.mark.parametrize("name", ["notes.txt", "config.json", "plots"])
def test_what_the_manifest_does_not_name(name: str, reader: str, copy: Path) -> None:
    if name == "plots":
        (copy / name).mkdir()
    else:
        (copy / name).write_text("{}")
    refused(copy, reader, f"{name} is not in the manifest")


def test_hidden_files_are_left_alone(copy: Path) -> None:
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    (copy / ".git").mkdir()
    assert verify(copy).verdict == "whole"


def test_a_pipe_is_no_file(copy: Path) -> None:
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    refused(copy, "verify", "README.md is not a file")


@pytest.mark.parametrize("content", ["{", "[]", "3", "[" * 50_000, "\xff", " " * 5_000_000])
def test_a_card_of_something_else_that_is_signed(content: str, copy: Path) -> None:
    (copy / "card.json").write_text(content, encoding="latin-1")
    sign(copy)
    for reader in READERS:
        refused(copy, reader)


@pytest.mark.parametrize("name", ["no_such_network", "hf-hub:somebody/something", "local-dir:/tmp"])
def test_a_card_of_a_network_that_cannot_be_built(name: str, copy: Path) -> None:
    content = json.loads((copy / "card.json").read_text())
    content["backbone"]["name"] = name
    (copy / "card.json").write_text(json.dumps(content))
    sign(copy)
    with pytest.raises(DataError, match="cannot be built here: timm has no model"):
        artifact.load_backbone(copy)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", sorted(FILES))
def test_every_reader_finds_a_flipped_byte(name: str, reader: str, copy: Path) -> None:
    known = sha256(copy / MANIFEST)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 3] ^= 4
    (copy / name).write_bytes(content)
    if reader == "pull":
        with pytest.raises(DataError, match="sha256"):
            pull(copy, copy.parent / "out", sha256=known)
    else:
        refused(copy, reader)
