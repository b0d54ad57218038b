import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import sslmed
from sslmed import artifact, cli
from sslmed.artifact import MANIFEST, OVERALL
from sslmed.artifact.manifest import sign
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.pretrain import PretrainResult, pretrain
from sslmed.commands.publish import PublishResult, publish
from sslmed.commands.verify import verify
from sslmed.config import DataError, DiskError, OutputExistsError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.supervised import evaluated
from sslmed.supervised.evaluated import EvaluateResult

SAID = {
    "licence": "CC-BY-4.0",
    "data_licence": "CC0-1.0",
    "intended_use": "features of frontal chest X-rays, for research",
    "limits": "phantoms alone; never tried on children",
}
STATED = tuple(f"{key}={value}" for key, value in SAID.items())


@pytest.fixture(scope="session")
def measured(pretrained: PretrainResult, phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained run with an evaluation of its own. Read it, never change it."""
    run = Path(shutil.copytree(pretrained.run, tmp_path_factory.mktemp("measured") / "run"))
    evaluate(run, phantom_store.path, budgets="k=2,100%", seeds=2, replicates=100)
    return run


@pytest.fixture(scope="session")
def published(measured: Path) -> PublishResult:
    """Read it, never change it."""
    return publish(measured, measured.parent / "published", stated=STATED)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is published.


def test_a_published_folder_is_an_artifact_with_more(published: PublishResult, measured: Path) -> None:
    folder = Path(published.to)
    assert kept(folder) == kept(measured / "artifact") | {"config.json"}
    assert json.loads((folder / MANIFEST).read_text()) == {
        name: sha256(folder / name) for name in kept(folder) - {MANIFEST}
    }
    assert published.sha256 == sha256(folder / MANIFEST)
    assert published.files == len(kept(folder))
    assert published.warnings == ()
    assert published.next == f"sslmed pull {folder} --sha256 {published.sha256} --out ARTIFACT"
    for name in ("model.safetensors", "fingerprint.safetensors", "selftest.safetensors"):
        assert (folder / name).read_bytes() == (measured / "artifact" / name).read_bytes()
    assert artifact.read_card(folder).stated.model_dump() == SAID
    assert artifact.read_card(measured).stated.licence == ""  # the run is as it was
    assert verify(folder).verdict == "whole"
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_it_says_is_printed(published: PublishResult) -> None:
    assert published.lines() == [
        f"published {published.model}: {published.files} files in {published.to}",
        f"sha256 of MANIFEST.json: {published.sha256}",
    ]
    assert json.loads(json.dumps(published.as_dict()))["sha256"] == published.sha256


def test_timm_loads_the_folder_by_itself(published: PublishResult) -> None:
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    network = timm.create_model(f"local-dir:{published.to}", pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(network(images), sslmed.load_backbone(published.to)(images))


def test_scores_of_a_backbone_are_those_of_its_evaluation(published: PublishResult, measured: Path) -> None:
    told = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    card = artifact.read_card(published.to)
    assert card.measured is not None
    assert card.measured.headline == "auroc"
    assert told["protocol"]["weights"] == sha256(measured / "artifact" / "model.safetensors")
    expected = {
        (row["budget"], row["probe"], row["arm"], row["metric"]): tuple(
            row["value"][name] for name in ("mean", "low", "high")
        )
        for row in told["rows"]
        if None not in row["value"].values()
    }
    assert len(expected) > 20
    found = {(s.budget, s.by, s.start, s.metric): (s.value, s.low, s.high) for s in card.measured.scores}
    assert found == expected
    readme = (Path(published.to) / "README.md").read_text()
    for score in card.measured.scores:
        row = f"| {score.start} | {score.budget} | {score.by} | {score.metric} | {score.value:.3f} "
        row += f"[{score.low:.3f}, {score.high:.3f}] |"
        assert (row in readme) == (score.metric == "auroc")
    patients = told["test_patients"]
    assert f"- {told['test_images']} test images of {patients} patients; 0 of {patients} test patients" in readme


def test_an_evaluation_comes_back_equal(measured: Path) -> None:
    told = json.loads((measured / "evaluation" / "evaluation.json").read_text())
    result = evaluated.read(measured / "evaluation")
    assert json.loads(json.dumps(result.as_dict())) == told
    assert isinstance(result, EvaluateResult)
    assert result.preamble()
    assert result.conditions()


def test_scores_of_a_fine_tuned_model_are_its_own(tuned: FinetuneResult, tmp_path: Path) -> None:
    card = artifact.read_card(tuned.artifact)
    assert card.measured is not None
    overall = {s.metric: (s.value, s.low, s.high) for s in card.measured.scores if s.start == OVERALL}
    assert overall == {name: value for name, value in tuned.test.items() if all(map(math.isfinite, value))}
    assert {s.by for s in card.measured.scores} == {"classification"}
    assert {s.budget for s in card.measured.scores} == {"100%"}
    assert f"{tuned.seen} of {tuned.test_patients} test patients were seen in pretraining" in card.measured.about
    result = publish(tuned.run, tmp_path / "published", stated=STATED)
    readme = (tmp_path / "published" / "README.md").read_text()
    for metric, (value, low, high) in overall.items():
        assert f"| overall | 100% | classification | {metric} | {value:.3f} [{low:.3f}, {high:.3f}] |" in readme
    assert artifact.read_card(result.to).measured == card.measured
    assert verify(result.to).kind == "classification test_resnet"
    with pytest.raises(UsageError, match="test scores of its own; leave --evaluation out"):
        publish(tuned.run, tmp_path / "again", stated=STATED, evaluation=tmp_path)


def test_what_a_recipe_states_is_published(
    phantom_store: Store, pretrain_settings: tuple[str, ...], tmp_path: Path
) -> None:
    said = tuple(f"card.{key}={value}" for key, value in SAID.items() if key != "limits")
    run = pretrain("xray/simclr_resnet18", phantom_store.path, tmp_path / "run", overrides=(*pretrain_settings, *said))
    card = artifact.read_card(run.run)
    assert card.stated.model_dump() == SAID | {"limits": ""}
    assert '"card"' not in (Path(run.artifact) / "README.md").read_text()
    assert card.monitors == run.metrics
    assert set(card.monitors) == {"loss", "embedding_std", "rankme", "knn_val_auroc"}
    # what is stated decides no result, so a run may go on with other words
    again = ("xray/simclr_resnet18", phantom_store.path, run.run)
    assert pretrain(*again, overrides=(*pretrain_settings, "card.limits=none known"), resume=True) == run
    publish(run.run, tmp_path / "published", stated=["limits=of phantoms", "licence=MIT"])
    stated = artifact.read_card(tmp_path / "published").stated
    assert (stated.limits, stated.licence, stated.data_licence) == ("of phantoms", "MIT", "CC0-1.0")


def test_hidden_files_stay_behind(pretrained: PretrainResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pretrained.artifact, tmp_path / "artifact"))
    for name in (".gitattributes", ".stray.safetensors"):
        (copy / name).write_text("mine")
    publish(copy, tmp_path / "out", stated=STATED)
    assert kept(tmp_path / "out") == kept(Path(pretrained.artifact)) | {"config.json"}


# What is refused.


def test_gaps_are_named_with_the_command_that_would_do(pretrained: PretrainResult, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        publish(pretrained.run, tmp_path / "out")
    assert caught.value.exit_code == 65
    text = str(caught.value)
    assert len(text.splitlines()) <= 6
    assert "has gaps: licence, data_licence, intended_use, limits are not stated" in text
    assert text.splitlines()[-1] == (
        f"sslmed publish {pretrained.run} licence=CC-BY-4.0 data_licence=CC0-1.0 'intended_use=WHAT FOR, FOR WHOM' "
        f"'limits=WHAT NOT FOR' --to {tmp_path / 'out'}"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gap", SAID)
@pytest.mark.parametrize("blank", [None, "", "  "])
def test_each_gap_alone_is_refused(gap: str, blank: str | None, pretrained: PretrainResult, tmp_path: Path) -> None:
    words = [text for text in STATED if not text.startswith(f"{gap}=")]
    words += [] if blank is None else [f"{gap}={blank}"]
    with pytest.raises(DataError, match=f"has gaps: {gap} is not stated, and only you can say it"):
        publish(pretrained.run, tmp_path / "out", stated=words)
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_an_error_gives_does(
    pretrained: PretrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    with pytest.raises(DataError) as caught:
        publish(pretrained.run, tmp_path / "a folder", stated=["limits=it's of phantoms"])
    words = shlex.split(str(caught.value).splitlines()[-1])
    assert "limits=it's of phantoms" in words
    assert cli.run(words[1:]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: sslmed pull ")
    assert artifact.read_card(tmp_path / "a folder").stated.limits == "it's of phantoms"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("license=MIT", "'license' is not a known key; did you mean 'licence'.*allowed: licence, data_licence"),
        ("colour=blue", "'colour' is not a known key; allowed: licence"),
        ("MIT", "'MIT' is not KEY=VALUE"),
        ("=MIT", "'' is not a known key"),
        ("licence=GPL", "'licence' is given twice"),
    ],
)
def test_an_unknown_key(text: str, words: str, pretrained: PretrainResult, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        publish(pretrained.run, tmp_path / "out", stated=[*STATED, text])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("make", ["folder", "file", "link"])
def test_what_is_there_is_left(make: str, pretrained: PretrainResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if make == "folder":
        out.mkdir()
    elif make == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError) as caught:
        publish(pretrained.run, out, stated=STATED)
    assert caught.value.exit_code == 73
    assert list(tmp_path.iterdir()) == [out]


def test_an_evaluation_of_other_weights(measured: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(measured, tmp_path / "run"))
    other = evaluated.read(run / "evaluation").as_dict()
    for weights in ({"weights": "0" * 64}, {}):
        about = {name: value for name, value in other["protocol"].items() if name != "weights"} | weights
        (run / "evaluation" / "evaluation.json").write_text(json.dumps(other | {"protocol": about}))
        for evaluation in (None, run / "evaluation"):
            with pytest.raises(DataError, match="is of other weights") as caught:
                publish(run, tmp_path / "out", stated=STATED, evaluation=evaluation)
            assert len(str(caught.value).splitlines()) <= 6
    publish(run, tmp_path / "out", stated=STATED, evaluation=measured / "evaluation")  # the same weights


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [{}]}', "\xff"])
def test_an_evaluation_of_something_else(content: str, pretrained: PretrainResult, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match="is not readable"):
        publish(pretrained.run, tmp_path / "out", stated=STATED, evaluation=tmp_path)
    with pytest.raises(sslmed.config.MissingInputError, match="no evaluation in"):
        publish(pretrained.run, tmp_path / "out", stated=STATED, evaluation=tmp_path / "absent")


def test_weights_that_fail_their_self_test(pretrained: PretrainResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pretrained.artifact, tmp_path / "artifact"))
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim == 4)
    save_file(tensors | {name: tensors[name] * 1.1}, copy / "model.safetensors")
    sign(copy)
    with pytest.raises(DataError, match=f"^{copy}: the self-test differs"):
        publish(copy, tmp_path / "out", stated=STATED)
    assert list(tmp_path.iterdir()) == [copy]


@pytest.mark.parametrize("fails", ["card.json", "README.md", "config.json", MANIFEST])
def test_a_full_disk_leaves_nothing(
    fails: str, pretrained: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def failing(path: Path, *rest: Any, **named: Any) -> int:
        if path.name == fails:
            raise OSError(28, "No space left on device")
        return write_text(path, *rest, **named)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(DiskError, match="No space left"):
        publish(pretrained.run, tmp_path / "new" / "out", stated=STATED)
    assert list(tmp_path.iterdir()) == []


# Licences.


@pytest.mark.parametrize(
    ("parent", "stated", "warned"),
    [
        ("CC-BY-NC-4.0", "CC-BY-4.0", True),
        ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", False),
        ("non-commercial research only", "MIT", True),
        ("Apache-2.0", "MIT", False),
        ("", "MIT", False),
    ],
)
def test_a_non_commercial_parent_is_said_aloud(
    parent: str, stated: str, warned: bool, pretrained: PretrainResult, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(pretrained.artifact, tmp_path / "artifact"))
    card = artifact.read_card(copy).model_copy(update={"parent": "0" * 64, "parent_licence": parent})
    (copy / "card.json").write_text(card.model_dump_json())
    sign(copy)
    words = [f"licence={stated}" if text.startswith("licence=") else text for text in STATED]
    result = publish(copy, tmp_path / "out", stated=words)
    assert bool(result.warnings) == warned
    if warned:
        assert result.lines()[0].startswith("warning: these weights, or those that they started from")
        assert parent in result.lines()[0]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"- of the weights that training started from: {parent or 'not stated'}" in readme


def test_restating_the_licence_of_imported_weights(pretrained: PretrainResult, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pretrained.artifact, tmp_path / "artifact"))
    card = artifact.read_card(copy)
    said = card.stated.model_copy(update={"licence": "CC-BY-NC-4.0"})
    (copy / "card.json").write_text(card.model_copy(update={"stated": said}).model_dump_json())
    sign(copy)
    assert publish(copy, tmp_path / "out", stated=STATED).warnings != ()
    assert publish(copy, tmp_path / "same", stated=STATED[1:]).warnings == ()


# What a published model still says.


def test_no_socket_is_opened(pretrained: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    publish(pretrained.run, tmp_path / "out", stated=STATED)


def test_whom_it_has_seen_travels_with_it(
    published: PublishResult, phantom_store: Store, tmp_path: Path, finetune_settings: tuple[str, ...]
) -> None:
    seen = artifact.patients_seen(published.to, phantom_store, phantom_store.rows("train"))
    assert seen == len(np.unique(phantom_store.patients(phantom_store.rows("train"))))
    result = evaluate(published.to, phantom_store.path, budgets="k=2", seeds=1, replicates=100, out=tmp_path / "e")
    assert f"0 of {result.test_patients} test patients were seen in pretraining" in result.lines()[1]
    started = finetune("xray/classification", phantom_store.path, tmp_path / "run", start=published.to,
                       overrides=finetune_settings)  # fmt: skip
    assert started.seen == 0
    assert artifact.read_card(started.run).parent_licence == SAID["licence"]


def test_the_licence_of_a_start_is_handed_on(
    published: PublishResult, phantom_store: Store, tmp_path: Path, pretrain_settings: tuple[str, ...]
) -> None:
    words = [text for text in pretrain_settings if "epochs" not in text]
    words += ["train.max_steps=2", f"backbone.init={published.to}", "monitor.knn_every=0"]
    run = pretrain("xray/simclr_resnet18", phantom_store.path, tmp_path / "run", overrides=words)
    card = artifact.read_card(run.run)
    assert (card.parent_licence, card.parent) == (SAID["licence"], artifact.weights(published.to))
    assert card.stated.licence == ""
