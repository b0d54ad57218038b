"""An artifact is written whole or not at all, and says what it is."""

import errno
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import FILES, IMAGES, NAME, SEEN, card, network
from safetensors.torch import load_file

import sslmed
from sslmed import artifact
from sslmed.artifact import MANIFEST, writing
from sslmed.config import DiskError
from sslmed.durable import sha256


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
