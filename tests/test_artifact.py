import ast
import errno
import io
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sslmed
from sslmed import artifact
from sslmed.artifact import MANIFEST, Card, DataCard, HeadCard, writing
from sslmed.commands.predict import predict
from sslmed.commands.publish import publish
from sslmed.commands.pull import pull
from sslmed.commands.verify import verify
from sslmed.config import DataError, DiskError, MissingInputError
from sslmed.data.modality import MODALITIES, in_words
from sslmed.data.store import Store
from sslmed.data.writers import write_image
from sslmed.durable import sha256
from sslmed.heads.classification import Classification, ClassificationConfig
from sslmed.image_size import ImageSize, sides
from sslmed.models.backbones import Backbone, BackboneConfig, build

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


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    return written(tmp_path_factory.mktemp("artifact") / "artifact")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "artifact"))


def sign(folder: Path) -> None:
    """Make the manifest match again, as someone who changes a file on purpose would."""
    digests = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(digests))


# Written.


def test_an_artifact_is_its_files_and_their_digests(good: Path) -> None:
    assert {path.name for path in good.iterdir()} == FILES
    digests = json.loads((good / MANIFEST).read_text())
    assert digests == {name: sha256(good / name) for name in FILES - {MANIFEST}}
    assert {path.stat().st_mode & 0o777 for path in good.iterdir()} == {0o644}
    assert [path for path in good.parent.iterdir() if path != good] == []


def test_the_card_comes_back_equal(good: Path) -> None:
    assert artifact.read_card(good) == card()
    assert artifact.read_card(good).kind == "backbone"
    content = json.loads((good / "card.json").read_text())
    assert content["schema_version"] == artifact.SCHEMA
    assert content["sslmed_version"] == sslmed.__version__
    assert content["torch_version"] == torch.__version__


def test_an_input_that_is_not_square(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    artifact.write(folder, network(), card(size=(32, 48)), SEEN)
    assert artifact.read_card(folder).size == (32, 48)
    assert json.loads((folder / "card.json").read_text())["size"] == [32, 48]
    assert load_file(folder / "selftest.safetensors")["input"].shape == (2, 1, 32, 48)
    assert artifact.self_test(folder).passed
    assert "32 x 48 pixels" in (folder / "README.md").read_text()


def test_writing_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    module = network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    artifact.write(tmp_path / "artifact", module, card(), SEEN)
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_the_self_test_compiles_nothing(tmp_path: Path) -> None:
    """It would take a minute and a compiler; the network stays compiled."""

    def backend(*_: Any) -> Any:
        raise AssertionError("compiled")

    module = network()
    module.compile(backend=backend)
    with pytest.raises(Exception, match="compiled"):
        module(IMAGES)
    artifact.write(tmp_path / "artifact", module, card(), SEEN)
    assert artifact.self_test(tmp_path / "artifact").passed
    with pytest.raises(Exception, match="compiled"):
        module(IMAGES)


def test_channels_last_weights_are_the_same_weights(good: Path, tmp_path: Path) -> None:
    module = network().to(memory_format=torch.channels_last)
    artifact.write(tmp_path / "artifact", module, card(), SEEN)
    assert sha256(tmp_path / "artifact" / "model.safetensors") == sha256(good / "model.safetensors")


def test_the_readme_says_how_to_load_it(good: Path) -> None:
    readme = (good / "README.md").read_text()
    for words in (NAME, "xray", "simclr", "7 images of 3 patients", "12 steps", "research use only", "not stated"):
        assert words in readme


@pytest.mark.parametrize("fails", ["model", "fingerprint", "selftest", "card.json", "README.md", MANIFEST, "rename"])
def test_a_failed_write_leaves_the_earlier_artifact(
    fails: str, copy: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(original: Any) -> Any:
        def call(path: Path, *rest: Any, **named: Any) -> Any:
            if fails in path.name or (fails == "rename" and path.suffix == ".partial"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(path, *rest, **named)

        return call

    monkeypatch.setattr(writing, "_save_tensors", failing(writing._save_tensors))
    monkeypatch.setattr(Path, "write_text", failing(Path.write_text))
    if fails == "rename":
        monkeypatch.setattr(Path, "rename", failing(Path.rename))
    with pytest.raises(DiskError, match=r"No space left.*untouched") as caught:
        artifact.write(copy, network(seed=2), card(), SEEN)
    assert caught.value.exit_code == 74
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in good.iterdir()
    }
    assert list(copy.parent.iterdir()) == [copy]


def test_a_disk_that_really_refuses_is_a_disk_error(tmp_path: Path) -> None:
    """safetensors writes by itself, and speaks of it in an error of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    module = network()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*File too large"):
            artifact.write(tmp_path / "artifact", module, card(), SEEN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_second_write_replaces_the_first_and_sweeps_orphans(copy: Path) -> None:
    orphan = copy.with_name(".artifact.0123abcd.partial")
    orphan.mkdir()
    (orphan / "model.safetensors").write_bytes(b"half")
    (copy / "stray").write_text("from before")
    artifact.write(copy, network(seed=2), card(steps=99), SEEN)
    assert artifact.read_card(copy).steps == 99
    assert {path.name for path in copy.iterdir()} == FILES
    assert list(copy.parent.iterdir()) == [copy]


# Read.


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


# Whatever opens an artifact, and what it is given.
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


# The weights.


def test_plain_timm_loads_every_tensor(good: Path) -> None:
    """As the README of the artifact says; strict, because timm by itself passes over what does not match."""
    module = timm.create_model(NAME, in_chans=1, num_classes=0, checkpoint_path=str(good / "model.safetensors"))
    stored = load_file(good / "model.safetensors")
    assert set(stored) == set(module.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.state_dict().items())
    ours = sslmed.load_backbone(good)
    with torch.inference_mode():
        torch.testing.assert_close(module.eval()(IMAGES), ours(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (BackboneConfig(name=NAME), SIZE),
        (BackboneConfig(name="test_vit", patch=8), (32, 48)),
        (BackboneConfig(name="test_vit", patch=8, pool="avg", drop_path=0.1, in_chans=3), (32, 48)),
    ],
)
def test_the_line_in_the_readme_loads_the_same_weights(
    config: BackboneConfig, size: ImageSize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(config, size, 1).network
    artifact.write(tmp_path / "artifact", module, card(backbone=config, size=size), SEEN)
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "artifact" / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("backbone = timm.create_model("))
    (statement,) = ast.parse(line).body
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    given = {str(each.arg): ast.literal_eval(each.value) for each in statement.value.keywords}
    loaded = timm.create_model(*(ast.literal_eval(each) for each in statement.value.args), **given)
    state = module.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    images = torch.randn(2, config.in_chans, *sides(size))
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(images), sslmed.load_backbone(tmp_path / "artifact")(images))


def test_load_backbone_gives_the_network_that_was_written(good: Path) -> None:
    module = sslmed.load_backbone(str(good))
    original = network().eval()
    assert not module.training
    assert module.state_dict().keys() == original.state_dict().keys()
    with torch.inference_mode():
        features = module(IMAGES)
        assert torch.equal(features, original(IMAGES))
    assert features.shape == (3, module.num_features)


def resnet_of_another_depth(folder: Path) -> None:
    other = timm.create_model("test_resnet", in_chans=1, num_classes=0, layers=(2, 1, 1, 1))
    save_file(other.state_dict(), folder / "model.safetensors")


def three_channels(folder: Path) -> None:
    save_file(timm.create_model(NAME, in_chans=3, num_classes=0).state_dict(), folder / "model.safetensors")


def one_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("conv1.0.weight" if "conv1.0.weight" in tensors else next(iter(tensors)))
    save_file(tensors, folder / "model.safetensors")


def no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")


@pytest.mark.parametrize("swap", [resnet_of_another_depth, three_channels, one_tensor_less, no_tensors])
def test_swapped_weights_are_refused_even_when_signed(swap: Callable[[Path], None], copy: Path) -> None:
    swap(copy)
    sign(copy)
    with pytest.raises(DataError, match="does not hold this network's tensors"):
        artifact.load_backbone(copy)
    with pytest.raises(DataError):
        verify(copy)


def test_the_self_test_knows_other_weights_of_the_same_architecture(good: Path, copy: Path) -> None:
    outcome = artifact.self_test(good)
    assert outcome.passed
    assert outcome.difference <= artifact.SELF_TEST_TOLERANCE
    tensors = {name: tensor.contiguous() for name, tensor in network(seed=2).state_dict().items()}
    save_file(tensors, copy / "model.safetensors")
    sign(copy)
    outcome = artifact.self_test(copy)
    assert not outcome.passed
    assert outcome.difference > 0.01
    with pytest.raises(DataError, match="the self-test differs by"):
        verify(copy)


def test_the_self_test_fails_on_weights_that_are_not_numbers(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, copy / "model.safetensors")
    sign(copy)
    assert not artifact.self_test(copy).passed


def test_a_head_travels_with_its_backbone(tmp_path: Path) -> None:
    head = nn.Linear(64, 2)
    folder = written(tmp_path / "artifact", head)
    assert {path.name for path in folder.iterdir()} == FILES | {"head.safetensors"}
    assert artifact.read_card(folder).kind == "classification"
    assert "`classification` of `finding`: clear, nodule" in (folder / "README.md").read_text()
    empty = nn.Linear(64, 2)
    artifact.load_head(folder, empty)
    assert torch.equal(empty.weight, head.weight)
    with pytest.raises(DataError, match=r"head\.safetensors does not hold"):
        artifact.load_head(folder, nn.Linear(64, 3))
    (folder / "head.safetensors").unlink()
    sign(folder)
    with pytest.raises(DataError, match=r"head\.safetensors"):
        artifact.load_head(folder, empty)


# Where it fits.


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


# What it passes on.


def test_who_starts_from_it_has_seen_everybody_that_it_had(good: Path, copy: Path) -> None:
    seen = np.arange(16, 32, dtype=np.uint8).reshape(2, 8)
    data, everybody = artifact.inherit(card().data, seen, good)
    assert data == card().data
    np.testing.assert_array_equal(everybody, np.arange(32, dtype=np.uint8).reshape(4, 8))
    other = card().data.model_copy(update={"key_id": "87654321"})
    assert artifact.inherit(other, seen, good)[0].key_id == artifact.MIXED_KEYS
    artifact.write(copy, network(), card(data=other.model_copy(update={"key_id": artifact.MIXED_KEYS})), SEEN)
    assert artifact.inherit(other, seen, copy)[0].key_id == artifact.MIXED_KEYS
