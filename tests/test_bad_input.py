"""Bad input through the command line: each kind has its exit code and a short message, and none a traceback."""

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sslmed import artifact, cli
from sslmed.data.modality import MODALITIES, in_words
from sslmed.data.store import Store
from sslmed.data.writers import write_image
from sslmed.heads.classification import Classification, ClassificationConfig
from sslmed.methods.simclr import SimCLR
from sslmed.models.backbones import BackboneConfig, build
from sslmed.training.checkpoint_files import newest

QUICK = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "method.hidden=32",
    "train.max_steps=4",
    "train.batch_size=8",
    "train.precision=32",
    "monitor.knn_every=0",
)

Run = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must end with ``code``; what it says."""

    def run(code: int, *arguments: object) -> str:
        capsys.readouterr()
        assert cli.run([str(argument) for argument in arguments]) == code
        shown = capsys.readouterr()
        lines = [line for line in shown.err.splitlines() if not line.startswith(("ingest ", "predict "))]  # progress
        assert shown.out == ""
        assert lines[-1].startswith("error: ") or any(line.startswith("error: ") for line in lines)
        start = next(number for number, line in enumerate(lines) if line.startswith("error: "))
        assert 1 <= len(lines[start:]) <= 6
        assert "Traceback" not in shown.err
        return "\n".join(lines[start:])

    return run


def picture(number: int, shape: tuple[int, ...] = (40, 36)) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        write_image(folder / f"{number}.png", picture(number))
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


@pytest.fixture(scope="module")
def model(phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned X-ray model, as far as its files go. Read it, never change it."""
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0)
    card = artifact.Card(
        backbone=BackboneConfig(name="test_resnet"),
        num_features=backbone.num_features,
        size=32,
        modality="xray",
        normalisation=in_words(MODALITIES["xray"]),
        method={"name": "none"},
        recipe={},
        data=artifact.describe(phantom_store, phantom_store.rows("train")),
        steps=1,
        head=artifact.HeadCard(
            name="classification", target="finding", classes=("clear", "nodule"), config={"name": "classification"}
        ),
    )
    folder = tmp_path_factory.mktemp("model") / "artifact"
    head = Classification(ClassificationConfig(), backbone, 2)
    artifact.write(folder, backbone.network, card, np.zeros((1, 8), np.uint8), head.head)
    return folder


# Recipes.


def test_an_unknown_recipe_key(fails: Run, phantom_store: Store, tmp_path: Path) -> None:
    said = fails(
        2, "pretrain", "xray/simclr_resnet18", "--data", phantom_store.path, "--out", tmp_path / "run", "train.epoch=3"
    )
    assert "command line: 'train.epoch' is not a known key; did you mean 'epochs'?" in said
    (tmp_path / "my.yaml").write_text("method: {name: simclr, temperatur: 0.2}\n")
    said = fails(2, "pretrain", tmp_path / "my.yaml", "--data", phantom_store.path, "--out", tmp_path / "run", "--json")
    assert "my.yaml: 'method.temperatur' is not a known key; did you mean 'temperature'?" in said
    assert not (tmp_path / "run").exists()


# Sources.


def test_a_missing_source(fails: Run, tmp_path: Path, model: Path) -> None:
    absent = tmp_path / "absent"
    assert str(absent) in fails(66, "ingest", absent, "--out", tmp_path / "store", "--modality", "xray")
    assert str(absent) in fails(66, "predict", model, absent, "--out", tmp_path / "out")
    assert str(absent) in fails(66, "pretrain", "xray/simclr_resnet18", "--data", absent, "--out", tmp_path / "run")
    assert str(absent) in fails(66, "verify", absent)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder(fails: Run, tmp_path: Path, model: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(65, "ingest", tmp_path / "empty", "--out", tmp_path / "store", "--modality", "xray")
    fails(65, "predict", model, tmp_path / "empty", "--out", tmp_path / "out")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "out").exists()


def test_a_truncated_png_among_good_ones_is_skipped_and_listed(
    images: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truncate(images / "3.png")
    assert cli.run(["ingest", str(images), "--out", str(tmp_path / "store"), "--modality", "xray", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["images"], len(Store(tmp_path / "store"))) == (7, 7)
    report = json.loads((tmp_path / "store.private" / "data_report.json").read_text())
    assert report["skipped"] == shown["skipped"] == [{"file": "3.png", "reason": "is a truncated PNG", "files": 1}]
    assert cli.run(["predict", str(model), str(images), "--out", str(tmp_path / "out")]) == 0
    assert "3.png: is a truncated PNG" in capsys.readouterr().out


def test_all_of_them_bad(fails: Run, images: Path, tmp_path: Path, model: Path) -> None:
    for path in images.iterdir():
        truncate(path)
    said = fails(65, "ingest", images, "--out", tmp_path / "store", "--modality", "xray")
    assert "none of the 8 images" in said
    assert "0.png: is a truncated PNG" in said
    assert "0.png: is a truncated PNG" in fails(65, "predict", model, images, "--out", tmp_path / "out")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "out").exists()


# Labels.


def test_a_table_that_names_absent_files(fails: Run, images: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    lines = ["file,patient,label:finding", "0.png,a,x", *(f"gone{number}.png,b,y" for number in range(20))]
    table.write_text("\n".join(lines))
    said = fails(65, "ingest", images, "--out", tmp_path / "store", "--modality", "xray", "--labels", table)
    assert "gone0.png" in said
    assert not (tmp_path / "store").exists()


def test_a_table_without_the_patient_column(fails: Run, images: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("file,label:finding\n0.png,x\n")
    said = fails(65, "ingest", images, "--out", tmp_path / "store", "--modality", "xray", "--labels", table)
    assert "patient" in said
    assert not (tmp_path / "store").exists()


# Outputs.


def test_an_existing_output(fails: Run, images: Path, phantom_store: Store, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    for arguments in (
        ["ingest", images, "--modality", "xray"],
        ["pretrain", "xray/simclr_resnet18", "--data", phantom_store.path, *QUICK],
        ["finetune", "xray/classification", "--data", phantom_store.path, "--from", model],
        ["predict", model, images],
        ["demo"],
    ):
        said = fails(73, *arguments, "--out", out)
        assert "exists" in said or "already" in said
    assert [path.name for path in out.iterdir()] == ["mine"]


# Artifacts.


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors", "card.json", artifact.MANIFEST])
def test_one_flipped_byte(
    name: str, fails: Run, images: Path, phantom_store: Store, model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(model, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 4
    (copy / name).write_bytes(content)
    data = phantom_store.path
    for arguments in (
        ["verify", copy],
        ["predict", copy, images, "--out", tmp_path / "out"],
        ["evaluate", copy, "--data", data, "--out", tmp_path / "out"],
        ["finetune", "xray/classification", "--data", data, "--from", copy, "--out", tmp_path / "out"],
    ):
        assert "damaged" in fails(65, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_store_that_the_model_was_not_made_for(fails: Run, model: Path, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / "photos" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "photos" / "ab"[number % 2] / f"{number}.png", picture(number, (40, 36, 3)))
    store = tmp_path / "store"
    assert cli.run(["ingest", str(tmp_path / "photos"), "--out", str(store), "--modality", "photo"]) == 0
    words = "backbone was trained on 1-channel xray; the store holds 3-channel photo"
    finetune = ["finetune", "xray/classification", "--data", store, "--from", model, "--out", tmp_path / "run"]
    assert words in fails(65, *finetune)
    assert not (tmp_path / "run").exists()


# The machine.


def test_a_missing_library_for_one_kind_of_file(fails: Run, images: Path, model: Path, tmp_path: Path) -> None:
    """A good file that nothing here can decode must not be passed over like a bad one."""
    encoded = cv2.imencode(".tif", picture(9), [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1]  # LZW
    (images / "lzw.tif").write_bytes(encoded.tobytes())
    if find_spec("imagecodecs"):
        pytest.skip("imagecodecs is installed here")
    for arguments in (
        ["ingest", images, "--out", tmp_path / "store", "--modality", "xray"],
        ["predict", model, images, "--out", tmp_path / "out"],
    ):
        said = fails(69, *arguments)
        assert "lzw.tif" in said
        assert "LZW" in said
        assert "python -m pip install imagecodecs" in said
    assert not (tmp_path / "store").exists()


def test_a_missing_library_for_everything(
    fails: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files would look damaged if a reader took the missing library for the file's fault."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    said = fails(69, "ingest", images, "--out", tmp_path / "store", "--modality", "xray")
    assert "python -m pip install opencv-python-headless" in said
    assert not (tmp_path / "store").exists()


def test_ctrl_c_while_pretraining_keeps_the_checkpoint(
    fails: Run, phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, calls = SimCLR.loss, []

    def interrupted(method: SimCLR, batch: object) -> dict[str, torch.Tensor]:
        calls.append(batch)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(method, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SimCLR, "loss", interrupted)
    out = tmp_path / "run"
    said = fails(130, "pretrain", "xray/simclr_resnet18", "--data", phantom_store.path, "--out", out, *QUICK)
    assert "stopped by SIGINT after step 2; the checkpoint is saved." in said
    assert "--resume" in said
    found = newest(out / "checkpoints" / "last.ckpt", print)
    assert found is not None
    assert found.step == 2
    assert json.loads((out / "run.json").read_text())["exit_code"] == 130
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"


def test_a_run_that_another_process_works_in(fails: Run, phantom_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = ["pretrain", "xray/simclr_resnet18", "--data", phantom_store.path, "--out", out, *QUICK]
    assert cli.run([str(part) for part in line]) == 0
    with (out / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process works in" in fails(75, *line, "--resume")
    said = fails(2, *line, "--resume", "optim.lr=0.5")
    assert "optim.lr: 0.001 -> 0.5" in said
