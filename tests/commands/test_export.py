"""`sslmed export`: files for other readers, refused when they say something else, checked by `sslmed verify`."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import sslmed
from sslmed import cli
from sslmed.commands import export as commands
from sslmed.commands.export import export
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.pretrain import PretrainResult
from sslmed.commands.verify import verify
from sslmed.config import DataError, MissingDependencyError, MissingInputError, OutputExistsError
from sslmed.data.store import Store
from sslmed.exporting import parity


def test_timm_reads_the_very_same_weights(pretrained: PretrainResult, tmp_path: Path) -> None:
    result = export(pretrained.run, tmp_path / "timm", form="timm")
    assert result.parity == {"features": 0.0}
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    ours = sslmed.load_backbone(pretrained.run)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in ours.state_dict().items())
    assert network.pretrained_cfg["input_size"] == (1, 32, 32)
    assert (network.pretrained_cfg["mean"], network.pretrained_cfg["std"]) == ([0.5], [0.25])
    classifier = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=4)
    assert classifier.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    shared = network.state_dict()
    assert all(torch.equal(tensor, shared[name]) for name, tensor in classifier.state_dict().items() if name in shared)


def test_timm_and_back_is_bit_equal(
    pretrained: PretrainResult, phantom_store: Store, finetune_settings: tuple[str, ...], tmp_path: Path
) -> None:
    export(pretrained.run, tmp_path / "timm", form="timm")
    file = tmp_path / "timm" / "model.safetensors"
    frozen = (*finetune_settings, "backbone.name=test_resnet", "data.size=32", "head.frozen=all", "train.max_steps=1")
    run = finetune("xray/classification", phantom_store.path, tmp_path / "run", start=file, overrides=frozen)
    back, there = load_file(Path(run.artifact) / "model.safetensors"), load_file(file)
    assert back.keys() == there.keys()
    assert all(torch.equal(back[name], there[name]) for name in there)


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_classifier_is_one_file_that_verify_knows(
    form: commands.Format, tuned: FinetuneResult, tmp_path: Path
) -> None:
    out = tmp_path / form
    result = export(tuned.run, out, form=form)
    assert result.outputs == ("probabilities", "called")
    assert max(result.parity.values()) <= parity.TOLERANCE
    kept = json.loads((out / "export.json").read_text())
    assert kept["parity"] == result.parity
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert "every digest" in verify(out).checked
    file = Path(result.file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name} does not match its digest"):
        verify(out)


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_the_lines_in_the_page_work(
    form: commands.Format, tuned: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tuned.run, tmp_path / "out", form=form)
    page = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    image = np.random.default_rng(0).integers(0, 4000, (2, 1, 50, 40)).astype(np.float32)
    names = {"image": image if form == "onnx" else torch.from_numpy(image)}
    monkeypatch.chdir(tmp_path / "out")
    exec(code, names)  # noqa: S102  # our own page
    assert names["probabilities"].shape == (2, 2)
    assert "0 normal" in page or "0 clear" in page or re.search(r"0 \w+, 1 \w+", page)


def test_what_does_not_say_the_same_is_not_kept(
    tuned: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "TOLERANCE", -1.0)
    with pytest.raises(
        DataError, match=r"does not say what the model says: probabilities .*Nothing was kept"
    ) as caught:
        export(tuned.run, tmp_path / "out", form="torch-export")
    assert caught.value.exit_code == 65
    assert list(tmp_path.iterdir()) == []


def test_refusals(pretrained: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputExistsError):
        export(pretrained.run, tmp_path / "there", form="timm")
    with pytest.raises(MissingInputError):
        export(tmp_path / "absent", tmp_path / "out", form="timm")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sslmed\[onnx\]'"):
        export(pretrained.run, tmp_path / "out", form="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_line(pretrained: PretrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["export", pretrained.run, "--format", "timm", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"] == {"features": 0.0}
    assert cli.run(["export", pretrained.run, "--format", "tflite", "--out", str(tmp_path / "other")]) == 2
