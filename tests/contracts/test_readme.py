"""What the README says to type works, in its order; only the size of the training is cut down."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from sslmed.cli import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {
    "pretrain": "backbone.name=test_resnet train.max_steps=2 train.batch_size=8 data.size=32 data.workers=0",
    "finetune": "train.max_steps=2 train.batch_size=8 data.workers=0",
    "evaluate": "--seeds 1 --replicates 100",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(phantom_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README assumes it: images and labels, and new images."""
    shutil.copytree(phantom_images, tmp_path / "IMAGES")
    shutil.copy(tmp_path / "IMAGES" / "labels.csv", tmp_path / "labels.csv")
    shutil.copytree(tmp_path / "IMAGES" / "images", tmp_path / "NEW_IMAGES")
    (tmp_path / "images").symlink_to(tmp_path / "IMAGES")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_run_in_their_order(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for line in "\n".join(blocks("sh")).splitlines() if line.startswith("sslmed ")]
    assert [shlex.split(line)[1] for line in commands] == [
        *("ingest", "ingest", "preview"),
        *("pretrain", "evaluate", "finetune", "predict"),
    ]
    for line in commands:
        arguments = shlex.split(line, comments=True)[1:]
        code = run([*arguments, *shlex.split(SMALL.get(arguments[0], ""))])
        expected = 65 if "--check" in arguments else 0  # two of the images are broken
        assert code == expected, f"{line}: {capsys.readouterr().err}"
    assert (workplace / "predictions" / "predictions.csv").is_file()


def test_the_python_runs(workplace: Path) -> None:
    code, _ = blocks("python")
    small = ", ".join(f'"{setting}"' for setting in SMALL["pretrain"].split())
    assert code.count('overrides=["train.epochs=50"]') == 1
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(code.replace('overrides=["train.epochs=50"]', f"overrides=[{small}]"), scope)  # noqa: S102
    assert sum(parameter.numel() for parameter in scope["backbone"].parameters()) > 0  # type: ignore[attr-defined]


def test_timm_loads_the_weights_as_it_says(workplace: Path) -> None:
    assert run(["ingest", "IMAGES", "--out", "store", "--modality", "xray", "--labels", "labels.csv"]) == 0
    small = [*SMALL["pretrain"].split()[1:], "backbone.name=resnet18"]
    assert run(["pretrain", "xray/simclr_resnet18", "--data", "store", "--out", "run", *small]) == 0
    (line,) = re.findall(r"`(timm\.create_model\(.*?\))`", README)
    import timm
    import torch

    import sslmed

    network = eval(line, {"timm": timm}).eval()  # noqa: S307
    images = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network(images), sslmed.load_backbone("run")(images))


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^make (\S+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto:")):
            assert (page.parent / target).exists(), target


def test_a_published_backbone_is_used_in_five_lines(workplace: Path) -> None:
    assert run(["ingest", "IMAGES", "--out", "store", "--modality", "xray", "--labels", "labels.csv"]) == 0
    small = SMALL["pretrain"].split()
    assert run(["pretrain", "xray/simclr_resnet18", "--data", "store", "--out", "run", *small]) == 0
    stated = ("licence=CC0-1.0", "data_licence=CC0-1.0", "intended_use=a test", "limits=anything else")
    assert run(["publish", "run", "--to", "xray-backbone", *stated]) == 0
    shutil.copy(sorted((workplace / "NEW_IMAGES").glob("*.png"))[0], "chest.png")
    _, code = blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 5
    scope: dict[str, Any] = {}
    exec(code, scope)  # noqa: S102
    assert scope["images"].shape == (1, 1, 32, 32)
    assert scope["features"].shape == (1, scope["backbone"].num_features)
