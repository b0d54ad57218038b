"""Where weights come from: the words, an artifact, a file; what is said of them, and what a card may hold."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from sslmed import artifact
from sslmed.artifact import MIXED_KEYS, Card, DataCard, ImportCard, StatedConfig
from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data import modality
from sslmed.durable import sha256
from sslmed.image_size import ImageSize
from sslmed.models import weights
from sslmed.models.backbones import BackboneConfig, build
from sslmed.training.starts import Start, start, worded

SIZE = 32
XRAY, PHOTO = modality.named("xray"), modality.named("photo")
SEEN = np.arange(16, dtype=np.uint8).reshape(2, 8)
PARENTS = np.arange(8, 32, dtype=np.uint8).reshape(3, 8)
DATA = DataCard(fingerprint="f" * 64, key_id="12345678", split_digest="d" * 64, images=7, patients=3)


def config(init: str | Path = "random", **knobs: Any) -> BackboneConfig:
    return BackboneConfig(**({"name": "test_resnet", "init": str(init)} | knobs))


def begin(asked: BackboneConfig, size: ImageSize = SIZE, policy: modality.Modality = XRAY) -> Start:
    return start(asked, size, policy, seed=5)


def trained(asked: BackboneConfig, size: ImageSize = SIZE) -> nn.Module:
    network = build(asked, size, seed=1).network
    with torch.no_grad():
        network.train()(torch.randn(4, asked.in_chans, SIZE, SIZE))
    return network


def write(folder: Path, asked: BackboneConfig, **changes: Any) -> nn.Module:
    network = trained(asked)
    settings: dict[str, Any] = {
        "backbone": asked,
        "num_features": 64,
        "size": SIZE,
        "modality": "xray",
        "normalisation": modality.in_words(XRAY),
        "method": {"name": "simclr"},
        "recipe": {},
        "data": DATA,
        "steps": 1,
    }
    artifact.write(folder, network, Card(**(settings | changes)), PARENTS)
    return network


def same(start: Start, network: nn.Module) -> bool:
    expected = network.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in start.backbone.network.state_dict().items())


# The words.


def test_random_weights_come_from_the_seed() -> None:
    begun = begin(config())
    assert same(begun, build(config(), SIZE, 5).network)
    assert not begun.backbone.pretrained
    assert (begun.kind, begun.weights, begun.parent, begun.lines) == ("random", "random", None, ())
    data, seen = begun.described(DATA, SEEN)
    assert data == DATA
    assert seen is SEEN


def test_only_imagenet_asks_timm_for_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr("sslmed.training.starts.published", asked)
    torch.save(trained(config()).state_dict(), tmp_path / "a.pth")
    write(tmp_path / "artifact", config())
    for init in ("random", tmp_path / "a.pth", tmp_path / "artifact"):
        begin(config(init))
    with pytest.raises(AssertionError, match="asked"):
        begin(config("imagenet"))


@pytest.mark.parametrize("in_chans", [1, 3])
def test_timms_weights(in_chans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(original))
    begun = begin(config("imagenet", in_chans=in_chans))
    expected = weights.channels(original["conv1.0.weight"], in_chans)
    found = begun.backbone.network.state_dict()
    assert all(torch.equal(found[name], original[name]) for name in found if name != "conv1.0.weight")
    torch.testing.assert_close(found["conv1.0.weight"], expected)
    assert begun.backbone.pretrained
    assert begun.lines[0].startswith("weights from timm's test_resnet.r160_in1k: ")
    assert ("3 -> 1 channels" in begun.lines[0]) == (in_chans == 1)
    assert (begun.kind, begun.parent) == ("imagenet", weights.digest(original))
    assert begun.described(DATA, SEEN)[0] == DATA, "ImageNet holds no patients"


def test_timms_weights_without_network() -> None:
    with pytest.raises(MissingInputError, match=r"backbone\.init=FILE"):
        begin(config("imagenet"))


@pytest.mark.parametrize("word", ["imagnet", "artifact", "file", "none"])
def test_an_unknown_word(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"{word}.*allowed: random, imagenet, or the path"):
        begin(config(word))
    (tmp_path / word).mkdir()
    with pytest.raises(DataError, match="neither a run nor an artifact"):
        begin(config(word))


@pytest.mark.parametrize("path", ["absent.pth", "runs/absent", "absent.safetensors", "/absent"])
def test_a_missing_path(path: str) -> None:
    with pytest.raises(MissingInputError, match=f"no weights at {path}"):
        begin(config(path))


# A file.


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weight_file(suffix: str, tmp_path: Path) -> None:
    network, path = trained(config()), tmp_path / f"a{suffix}"
    state = network.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    begun = begin(config(path))
    assert same(begun, network)
    assert begun.backbone.pretrained
    assert (begun.kind, begun.parent, begun.weights) == ("file", sha256(path), sha256(path))
    assert begun.lines == (f"weights from {path}: {len(state)} tensors matched",)
    data, seen = begun.described(DATA, SEEN)
    assert data == DATA.model_copy(update={"key_id": MIXED_KEYS}), "nobody knows whom it has seen"
    assert seen is SEEN


def test_a_file_of_foreign_names_is_taken_by_order_where_it_has_one(tmp_path: Path) -> None:
    network = trained(config())
    state = {
        f"part{n:03}.{name.rpartition('.')[2]}": value for n, (name, value) in enumerate(network.state_dict().items())
    }
    torch.save(state, tmp_path / "a.pth")
    begun = begin(config(tmp_path / "a.pth"))
    assert same(begun, network)
    assert "order" in begun.lines[1]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="keeps no order"):
        begin(config(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt"])
def test_a_checkpoint_of_a_family(suffix: str, tmp_path: Path) -> None:
    network, path = trained(config()), tmp_path / f"a{suffix}"
    state = {f"module.encoder_q.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, path)
    begun = begin(config(path))
    assert same(begun, network)
    assert "as moco names them" in begun.lines[0]
    assert begun.lines[1].startswith("warning: these weights are for non-commercial use: CC-BY-NC-4.0 (usual for")
    assert begun.licence == "CC-BY-NC-4.0 (usual for the files of moco; not stated)"


def test_an_unknown_prefix_names_the_way_to_take_it(tmp_path: Path) -> None:
    state = {f"net.{name}": value for name, value in trained(config()).state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(DataError, match=rf"begin with 'net\.'(.|\n)*sslmed import {tmp_path}/a\.pth --prefix net\."):
        begin(config(tmp_path / "a.pth"))


# An artifact.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Read it, never change it."""
    run = tmp_path_factory.mktemp("starts") / "run"
    return run, write(run / "artifact", config())


@pytest.mark.parametrize("part", ["", "artifact"])
def test_an_artifact_or_its_run(good: tuple[Path, nn.Module], part: str) -> None:
    run, network = good
    begun = begin(config(run / part))
    assert same(begun, network)
    assert begun.backbone.pretrained
    path = run / "artifact" / "model.safetensors"
    assert (begun.kind, begun.parent, begun.folder) == ("artifact", sha256(path), run / "artifact")
    assert begun.card == artifact.read_card(run)
    assert begun.lines == (f"weights from {run / part}: {len(network.state_dict())} tensors matched",)


def test_everybody_that_the_artifact_had_seen_is_passed_on(good: tuple[Path, nn.Module], tmp_path: Path) -> None:
    data, seen = begin(config(good[0])).described(DATA, SEEN)
    assert data == DATA
    np.testing.assert_array_equal(seen, np.arange(32, dtype=np.uint8).reshape(4, 8))  # one of them in both
    write(tmp_path / "artifact", config(), data=DATA.model_copy(update={"key_id": "87654321"}))
    other, seen = begin(config(tmp_path / "artifact")).described(DATA, SEEN)
    assert other == DATA.model_copy(update={"key_id": MIXED_KEYS})
    assert len(seen) == 4


def test_a_damaged_artifact_is_refused(good: tuple[Path, nn.Module], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good[0] / "artifact", tmp_path / "artifact"))
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        begin(config(copy))


def test_another_network_than_the_cards(good: tuple[Path, nn.Module]) -> None:
    with pytest.raises(UsageError, match=r"names backbone test_vit, but .* holds test_resnet; set backbone\.name="):
        begin(config(good[0], name="test_vit"))


def test_a_tag_is_no_other_network(tmp_path: Path) -> None:
    network = write(tmp_path / "artifact", config(name="test_resnet.r160_in1k"))
    assert same(begin(config(tmp_path / "artifact")), network)


def test_another_modality_and_normalisation_are_said(good: tuple[Path, nn.Module], tmp_path: Path) -> None:
    begun = begin(config(good[0]), policy=PHOTO)
    assert begun.lines[1] == "note: the weights were trained on xray images; the store holds photo"
    assert modality.in_words(XRAY) in begun.lines[2]
    assert modality.in_words(PHOTO) in begun.lines[2]
    write(tmp_path / "artifact", config(), normalisation="by hand")
    assert [line.partition(":")[0] for line in begin(config(tmp_path / "artifact")).lines[1:]] == ["note"]


def test_the_cards_size_tells_the_grid_of_its_positions(tmp_path: Path) -> None:
    asked = config(name="test_vit", patch=8)
    network = build(asked, (16, 64), 1).network
    card = Card(
        backbone=asked,
        num_features=64,
        size=(16, 64),
        modality="xray",
        normalisation=modality.in_words(XRAY),
        method={"name": "simclr"},
        recipe={},
        data=DATA,
        steps=1,
    )
    artifact.write(tmp_path / "artifact", network, card, PARENTS)
    begun = begin(config(tmp_path / "artifact", name="test_vit", patch=8))
    assert "1 adapted (pos_embed 2 x 8 -> 4 x 4 patches)" in begun.lines[0]


# Licences.

NC = "CC-BY-NC-4.0"
MOCO = ImportCard(layout="moco", source="", digest="d" * 64, matched=1)
USUAL = f"{NC} (usual for the files of moco; not stated)"


@pytest.mark.parametrize(
    ("stated", "parents", "imported", "licence"),
    [
        ("", "", None, ""),
        ("CC-BY-4.0", "", None, "CC-BY-4.0"),
        (NC, "", None, NC),
        ("", NC, None, NC),
        ("Apache-2.0", NC, None, NC),
        (NC, "Apache-2.0", None, NC),
        ("", "Apache-2.0", None, "Apache-2.0"),
        ("", "", MOCO, USUAL),
        ("Apache-2.0", "", MOCO, "Apache-2.0"),
        ("", "", MOCO.model_copy(update={"layout": "dino"}), ""),
        ("", "", MOCO.model_copy(update={"layout": "by order"}), ""),
    ],
)
def test_the_licence_that_training_has_to_heed(
    stated: str, parents: str, imported: ImportCard | None, licence: str, tmp_path: Path
) -> None:
    told = {"stated": StatedConfig(licence=stated), "parent_licence": parents, "imported": imported}
    write(tmp_path / "artifact", config(), **told)
    begun = begin(config(tmp_path / "artifact"))
    assert begun.licence == licence
    warned = [line for line in begun.lines if line.startswith("warning:")]
    assert len(warned) == (NC in licence)
    assert all(licence in line for line in warned)


def test_tensors_that_were_random_at_import_are_said(tmp_path: Path) -> None:
    write(tmp_path / "artifact", config(), imported=MOCO.model_copy(update={"missing": ("a", "b"), "layout": "timm"}))
    assert begin(config(tmp_path / "artifact")).lines[1] == "note: 2 of its tensors were random when it was imported"


# What a card may hold.


def test_a_word_stands_for_the_path(tmp_path: Path) -> None:
    asked = config(tmp_path / "a.pth", drop_path=0.1)
    assert worded(asked, "file") == config("file", drop_path=0.1)
    assert str(tmp_path) not in worded(asked, "file").model_dump_json()
