import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sslmed
from sslmed import cli, config, endings
from sslmed.cli import options
from sslmed.commands import recipes, verify
from sslmed.config import SslmedError, UsageError

LISTINGS_WITHOUT_TORCH = """
import sys
import sslmed
from sslmed.cli import run
codes = [run(line.split()) for line in ("--help", "pretrain --help", "recipes ls", "recipes show xray/simclr_resnet18")]
heavy = {"torch", "torchvision", "pytorch_lightning", "timm", "lightly", "albumentations", "cv2", "h5py", "sklearn"}
print(codes, sorted(heavy & sys.modules.keys()))
"""


def test_help_and_listings_import_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTINGS_WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0] []"
    assert done.stderr == ""


def test_public_names() -> None:
    assert set(sslmed.__all__) <= set(dir(sslmed))
    for name in sslmed.__all__:
        assert callable(getattr(sslmed, name))
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        _ = sslmed.pretrian  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "size"), [("96", 96), ("96x128", (96, 128)), ("32X48", (32, 48))])
def test_a_size_is_one_number_or_height_and_width(text: str, size: object) -> None:
    assert options.image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "96x", "axb", "96x96x3", "-5", "9.5", "[96, 128]"])
def test_a_size_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="allowed: 96 for a square, or height x width such as 96x128"):
        options.image_size(text)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"sslmed {sslmed.__version__}\n"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "pretrian",
        "pretrain",
        "pretrain xray/simclr_resnet18 --data store",
        "pretrain xray/simclr_resnet18 --data store --out run --unknown",
        "ingest source --out store",
        "evaluate run --data store --seeds many",
        "evaluate run --data store --size 32x",
        "recipes",
        "recipes show xray/simclr_resnet81",
        "recipes check xray/simclr_resnet18 train.epoch=3",
    ],
)
def test_wrong_usage_is_2_in_few_lines(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(line.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err
    helps = line in ("", "recipes")  # a group by itself shows its help
    assert helps or 1 <= len(shown.err.splitlines()) <= endings.MOST_LINES


def test_recipes_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "ls"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("xray/simclr_resnet18 ") for line in listed)
    assert last == "next: sslmed recipes show NAME"


def test_recipes_copy_then_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = ["recipes", "copy", "xray/simclr_resnet18", "my.yaml"]
    assert cli.run(copy) == 0
    first = Path("my.yaml").read_text()
    assert cli.run(copy) == config.OutputExistsError.exit_code == 73
    assert "my.yaml exists already" in capsys.readouterr().err
    assert cli.run(["recipes", "copy", "xray/simclr_resnet18", "absent/my.yaml"]) == config.DiskError.exit_code == 74
    assert Path("my.yaml").read_text() == first
    assert cli.run(["recipes", "check", "my.yaml", "train.epochs=3"]) == 0
    shown = capsys.readouterr().out
    assert "epochs: 3" in shown
    assert shown.splitlines()[-1] == "next: sslmed pretrain my.yaml train.epochs=3 --data STORE --out NEW_RUN"
    assert cli.run(["recipes", "check", "absent.yaml"]) == config.MissingInputError.exit_code == 66


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["recipes", "ls", "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert {recipe["name"] for recipe in json.loads(shown.out)["recipes"]} >= {"xray/simclr_resnet18"}


@dataclass(frozen=True)
class Odd:
    next: str = "sslmed next"

    def lines(self) -> list[str]:
        return ["one", "two"]

    def as_dict(self) -> dict[str, Any]:
        return {"path": Path("a"), "score": float("nan"), "rows": ({"low": float("-inf")}, 1)}


def test_results_with_nan_and_paths(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "ls", Odd)
    assert cli.run(["recipes", "ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "a", "score": None, "rows": [{"low": None}, 1]}
    assert cli.run(["recipes", "ls"]) == 0
    assert capsys.readouterr().out == "one\ntwo\nnext: sslmed next\n"


ERRORS = {
    config.UsageError("long\n" * 20): 2,
    config.TrainingAborted("collapsed"): 3,
    config.DataError("damaged"): 65,
    config.MissingInputError("absent"): 66,
    config.MissingDependencyError("install it"): 69,
    config.OutputExistsError("exists"): 73,
    config.DiskError("full"): 74,
    config.TemporaryError("locked"): 75,
    config.Interrupted("saved", 2): 130,
    config.Interrupted("saved", 15): 143,
    KeyboardInterrupt(): 130,
    OSError(errno.ENOSPC, "No space left on device"): 74,
    ModuleNotFoundError("No module named 'cv2'", name="cv2"): 69,
}


@pytest.mark.parametrize(("error", "code"), ERRORS.items(), ids=[repr(error)[:30] for error in ERRORS])
def test_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(verify, "verify", fail)
    assert cli.run(["verify", "run"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= endings.MOST_LINES
    if isinstance(error, SslmedError):
        assert lines[0] == f"error: {str(error).splitlines()[0]}"


def test_a_missing_library_comes_with_the_pip_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sslmed.commands.verify", None)  # as if it were not there: a bug of ours
    assert cli.run(["verify", "run"]) == 1

    def fail(path: Path) -> None:
        raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.undo()
    monkeypatch.setattr(verify, "verify", fail)
    capsys.readouterr()
    assert cli.run(["verify", "run"]) == 69
    assert "python -m pip install opencv-python-headless" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("oops"), OSError(errno.EBADF, "Bad file descriptor")], ids=repr)
def test_a_bug_is_1_with_traceback(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr(verify, "verify", fail)
    assert cli.run(["verify", "run"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "this is a bug in sslmed" in shown
