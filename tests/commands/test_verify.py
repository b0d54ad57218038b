import json
import shutil
from pathlib import Path

import pytest

from sslmed import artifact
from sslmed.artifact import SelfTest
from sslmed.commands.finetune import FinetuneResult
from sslmed.commands.pretrain import PretrainResult
from sslmed.commands.verify import VerifyResult, verify
from sslmed.config import DataError, MissingInputError
from sslmed.data.store import Store


def flip(path: Path, share: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 0x10
    path.write_bytes(content)


def damaged(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        verify(path)
    assert caught.value.exit_code == 65
    assert len(str(caught.value).splitlines()) <= 6


def checked(result: VerifyResult) -> VerifyResult:
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
    assert run.checked.startswith("checkpoint, every digest, self-test within ")
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
    monkeypatch.setattr(artifact, "self_test", lambda _: SelfTest(False, 0.25))
    damaged(Path(pretrained.run), r"the self-test differs by 2\.5e-01, allowed 1e-04")


def test_a_run_that_has_not_finished(pretrained: PretrainResult, tmp_path: Path) -> None:
    shutil.copytree(pretrained.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "artifact")
    damaged(tmp_path / "run", r"no artifact yet; finish it with the same command and --resume")


def test_nothing_and_something_else(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nothing at") as caught:
        verify(tmp_path / "absent")
    assert caught.value.exit_code == 66
    damaged(tmp_path, "neither a run nor an artifact")
    (tmp_path / "notes.txt").write_text("none of ours")
    damaged(tmp_path / "notes.txt", "neither a run nor an artifact")
