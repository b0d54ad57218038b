"""The demo goes the whole way and prints what it measured; here with a smaller network and fewer patients."""

from pathlib import Path

import pytest

from sslmed.cli import run
from sslmed.commands import demo as module
from sslmed.commands.demo import DemoResult, demo
from sslmed.evaluation import predictions


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        small = ("backbone.name=test_resnet", "data.size=32", "data.workers=0")
        patch.setattr(module, "PATIENTS", 40)
        patch.setattr(module, "BACKBONE", small)
        patch.setattr(module, "PRETRAIN", (*small, "train.max_steps=4", "train.batch_size=16"))
        patch.setattr(
            module, "FINETUNE", ("train.max_steps=4", "train.batch_size=8", "data.workers=0", "labels.budget=k=5")
        )
        return demo(out)


def test_everything_it_names_is_there(result: DemoResult) -> None:
    out = Path(result.out)
    for name in ("images", "store", "pretrained", "finetuned-pretrained", "finetuned-random", "predictions"):
        assert (out / name).is_dir()
    assert (out / "predictions" / "predictions.csv").is_file()
    assert run(["verify", str(out / "store")]) == 0
    assert run(["verify", str(out / "pretrained")]) == 0


def test_the_numbers_are_those_of_the_runs(result: DemoResult) -> None:
    out = Path(result.out)
    arms = {"pretrained": [out / "finetuned-pretrained"], "random": [out / "finetuned-random"]}
    again = {each.arm: each for each in predictions.compare(arms, "random") if each.metric == "auroc"}
    assert result.pretrained[0] == again["pretrained"].value.mean
    assert result.difference[0] == pytest.approx(result.pretrained[0] - result.random[0])
    assert result.difference[1] <= result.difference[0] <= result.difference[2]


@pytest.mark.parametrize(
    ("difference", "word"), [((0.1, 0.05, 0.2), "helped"), ((-0.1, -0.2, -0.05), "hurt"), ((0.1, -0.1, 0.2), "no diff")]
)
def test_the_verdict_follows_the_interval(difference: tuple[float, float, float], word: str) -> None:
    lines = DemoResult("out", ("a", "b"), 9, (0.8, 0.7, 0.9), (0.7, 0.6, 0.8), difference, 1.0, "next").lines()
    assert any(f"pretraining {word}" in line or word in line for line in lines)
    assert any("SYNTHETIC" in line for line in lines)


def test_the_broken_files_are_named(result: DemoResult) -> None:
    report = (Path(result.out) / "store.private" / "data_report.json").read_text(encoding="utf-8")
    assert len(result.broken) == 2
    assert all(name in report for name in result.broken)


def test_a_second_demo_says_how_to_go_on(result: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", result.out]) == 73
    said = capsys.readouterr().err
    assert "exists already" in said
    assert "--out" in said
