import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sslmed import artifact, cli
from sslmed.artifact import MANIFEST, SelfTest
from sslmed.artifact.manifest import sign
from sslmed.commands.finetune import FinetuneResult
from sslmed.commands.pretrain import PretrainResult
from sslmed.commands.verify import Damaged, VerifyResult, verify
from sslmed.config import DataError, MissingInputError
from sslmed.data.store import Store
from sslmed.durable import write_json


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 0x10
    path.write_bytes(content)


def refused(path: Path, words: str) -> DataError:
    with pytest.raises(DataError, match=words) as caught:
        verify(path)
    assert caught.value.exit_code == 65
    assert len(str(caught.value).splitlines()) <= 6
    return caught.value


def damaged(path: Path, words: str) -> VerifyResult:
    """What is damaged, and nothing on disk changes by looking."""
    before = contents(path)
    error = refused(path, words)
    assert isinstance(error, Damaged)
    assert contents(path) == before
    assert error.result.verdict == "damaged"
    assert error.result.findings
    assert json.loads(json.dumps(error.result.as_dict()))["verdict"] == "damaged"
    return error.result


def contents(path: Path) -> dict[Path, Any]:
    return {
        each: each.readlink() if each.is_symlink() else each.read_bytes()
        for each in path.rglob("*")
        if each.is_symlink() or each.is_file()
    }


def checked(result: VerifyResult) -> VerifyResult:
    assert (result.verdict, result.findings) == ("whole", ())
    assert result.lines() == [f"{result.path}: {result.kind}, whole: {result.checked}"]
    assert json.loads(json.dumps(result.as_dict()))["kind"] == result.kind
    return result


def test_a_store(phantom_store: Store) -> None:
    result = checked(verify(phantom_store.path))
    assert result.kind == f"store of {len(phantom_store)} xray images"
    assert result.next == f"sslmed pretrain xray/simclr_resnet18 --data {phantom_store.path} --out RUN"


def test_a_run_and_its_artifact(pretrained: PretrainResult) -> None:
    run = checked(verify(pretrained.run))
    assert run.kind == "backbone test_resnet"
    assert run.checked.startswith("run.json, recipe and metrics, checkpoint, every digest, self-test within ")
    assert run.difference is not None
    assert run.difference <= artifact.SELF_TEST_TOLERANCE
    assert run.next == f"sslmed evaluate {pretrained.run} --data STORE"
    alone = checked(verify(pretrained.artifact))
    assert alone.checked.startswith("every digest, self-test within ")


def test_a_fine_tuned_model(tuned: FinetuneResult) -> None:
    result = checked(verify(tuned.run))
    assert result.kind == "classification test_resnet"
    assert result.next == f"sslmed predict {tuned.run} SOURCE --out DIR"


@pytest.mark.parametrize("name", ["shard-00000.h5", "index.h5", "store.json"])
def test_a_damaged_store(name: str, phantom_store: Store, tmp_path: Path) -> None:
    shutil.copytree(phantom_store.path, tmp_path / "store")
    flip(tmp_path / "store" / name)
    damaged(tmp_path / "store", "damaged|cannot be read")


def test_a_store_without_a_shard(phantom_store: Store, tmp_path: Path) -> None:
    shutil.copytree(phantom_store.path, tmp_path / "store")
    (tmp_path / "store" / "shard-00000.h5").unlink()
    damaged(tmp_path / "store", r"is damaged:\nshard-00000\.h5: missing")


def test_many_findings_fit_on_six_lines(phantom_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "verify", lambda _: [f"finding {number}" for number in range(40)])
    damaged(phantom_store.path, "finding 3\nand 36 more")


@pytest.mark.parametrize(
    "name", ["artifact/model.safetensors", "artifact/card.json", "artifact/MANIFEST.json", "checkpoints/last.ckpt"]
)
def test_a_damaged_run(name: str, pretrained: PretrainResult, tmp_path: Path) -> None:
    shutil.copytree(pretrained.run, tmp_path / "run")
    flip(tmp_path / "run" / name)
    damaged(tmp_path / "run", "is damaged")


def test_another_machines_arithmetic(pretrained: PretrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "self_test", lambda *_: SelfTest(False, 0.25))
    damaged(Path(pretrained.run), r"the self-test differs by 2\.5e-01, allowed 1e-04")


@pytest.fixture
def run(pretrained: PretrainResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pretrained.run, tmp_path / "run"))


def test_a_run_that_has_not_finished(run: Path) -> None:
    shutil.rmtree(run / "artifact")
    damaged(run, "the run came to its end, but its artifact is missing")
    write_json(run / "run.json", json.loads((run / "run.json").read_text()) | {"status": "interrupted"})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # killed while it wrote
    result = checked(verify(run))
    assert result.kind == "unfinished run of pretrain"
    assert result.checked == "run.json, recipe and metrics, checkpoint, no artifact yet"
    assert result.next == f"sslmed pretrain {run}/recipe.yaml --data STORE --out {run} --resume"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("run.json", "{", r"run\.json is damaged"),
        ("run.json", "[]", r"run\.json is damaged"),
        ("recipe.yaml", "method: {name: simclr, colour: blue}", "'method.colour' is not a known key"),
        ("recipe.yaml", "\x00", "recipe.yaml"),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "lo', r"metrics\.jsonl, line 2"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 2}\n', r"metrics\.jsonl, line 2"),
        ("metrics.jsonl", '{"loss": 1}\n', r"metrics\.jsonl, line 1"),
        ("metrics.jsonl", '{"step": 1}\n\n{"step": 2}\n', r"metrics\.jsonl, line 2"),
    ],
)
def test_what_a_run_says_of_itself_is_parsed(name: str, content: str, words: str, run: Path) -> None:
    (run / name).write_text(content)
    result = damaged(run, words)
    assert result.kind == "run"
    assert len(result.findings) == 1


def test_everything_that_is_damaged_is_listed(run: Path) -> None:
    (run / "metrics.jsonl").write_text("nonsense\n")
    flip(run / "checkpoints" / "last.ckpt")
    flip(run / "artifact" / "card.json")
    result = damaged(run, "is damaged")
    assert [line.split(":")[0].split(",")[0].split(";")[0] for line in result.findings] == [
        "metrics.jsonl",
        f"the checkpoint {run}/checkpoints/last.ckpt is damaged",
        "card.json does not match its digest",
    ]


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "checkpoints/last.ckpt", "artifact/model.safetensors"])
def test_a_link_in_a_run(name: str, run: Path, tmp_path: Path) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    damaged(run, f"{Path(name).name} is a symbolic link")


def test_an_export_is_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (tmp_path / "export.json").write_text("{}")
    sign(tmp_path)
    assert verify(tmp_path).kind == "export"
    flip(tmp_path / "model.onnx")
    assert damaged(tmp_path, "model.onnx does not match its digest").kind == "export"


def test_swapped_weights_of_a_head_that_are_signed(tuned: FinetuneResult, tmp_path: Path) -> None:
    """The self-test of a fine-tuned model looks at what its head answers."""
    copy = Path(shutil.copytree(tuned.artifact, tmp_path / "artifact"))
    assert "answers" in load_file(copy / "selftest.safetensors")
    tensors = load_file(copy / "head.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in tensors.items()}, copy / "head.safetensors")
    sign(copy)
    damaged(copy, "the self-test differs by")


@pytest.mark.parametrize("change", ["no input", "another shape", "fewer features", "no tensors", "fewer answers"])
def test_a_self_test_that_is_none(change: str, tuned: FinetuneResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tuned.artifact, tmp_path / "artifact"))
    kept = load_file(copy / "selftest.safetensors")
    if change == "no input":
        del kept["input"]
    elif change == "another shape":
        kept["input"] = torch.zeros(1, 1, 8, 8)
    elif change == "fewer features":
        kept["features"] = kept["features"][:1].contiguous()
    elif change == "fewer answers":
        kept["answers"] = kept["answers"][:, :1].contiguous()
    save_file({} if change == "no tensors" else kept, copy / "selftest.safetensors")
    sign(copy)
    damaged(copy, "does not hold this card's self-test")


def test_a_fingerprint_that_is_none(pretrained: PretrainResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pretrained.artifact, tmp_path / "artifact"))
    for seen in (torch.zeros(3, 7, dtype=torch.uint8), torch.zeros(3, 8), torch.zeros(8, dtype=torch.uint8)):
        save_file({"seen": seen}, copy / "fingerprint.safetensors")
        sign(copy)
        with pytest.raises(DataError, match="does not hold digests"):
            artifact.read_fingerprint(copy)
    (copy / "fingerprint.safetensors").write_bytes(np.arange(99).tobytes())
    with pytest.raises(DataError, match="is no file of tensors"):
        artifact.read_fingerprint(copy)


def test_on_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["verify", str(run)]) == 0
    line, following = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{run}: backbone test_resnet, whole: ")
    assert following.startswith("next: sslmed evaluate")
    flip(run / "artifact" / MANIFEST)
    assert cli.run(["verify", str(run)]) == 65
    told = capsys.readouterr()
    assert (told.out, told.err.startswith(f"error: {run} is damaged:\n")) == ("", True)
    assert cli.run(["verify", str(run), "--json"]) == 65
    told = capsys.readouterr()
    assert json.loads(told.out)["verdict"] == "damaged"
    assert told.err == ""


def test_nothing_and_something_else(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nothing at") as caught:
        verify(tmp_path / "absent")
    assert caught.value.exit_code == 66
    refused(tmp_path, "neither a run nor an artifact")
    (tmp_path / "notes.txt").write_text("none of ours")
    refused(tmp_path / "notes.txt", "neither a run nor an artifact")
