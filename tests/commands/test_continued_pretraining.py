"""Pretraining that starts from weights: what it learns on, what its card says, and whom it counts as seen."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslmed import artifact
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import FinetuneResult
from sslmed.commands.pretrain import PretrainResult, plan, pretrain
from sslmed.config import DataError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.methods.simclr import SimCLR
from sslmed.recipe import load_pretrain
from sslmed.run import read

RECIPE = "xray/simclr_resnet18"
WEIGHTS = "artifact/model.safetensors"
STANDING = "optim.lr=1e-30"  # a step by which no weight moves


@pytest.fixture(scope="session")
def quick(pretrain_settings: tuple[str, ...]) -> tuple[str, ...]:
    """One step."""
    kept = tuple(setting for setting in pretrain_settings if not setting.startswith("train.epochs"))
    return (*kept, "train.max_steps=1", "monitor.knn_every=0")


@pytest.fixture(scope="module")
def continued(
    quick: tuple[str, ...],
    pretrained: PretrainResult,
    phantom_store: Store,
    tmp_path_factory: pytest.TempPathFactory,
) -> PretrainResult:
    """One step from the pretrained weights, with another seed. Read it, never change it."""
    out = tmp_path_factory.mktemp("continued") / "run"
    overrides = (*quick, "train.seed=3", STANDING, f"backbone.init={pretrained.run}")
    return pretrain(RECIPE, phantom_store.path, out, overrides=overrides)


def test_it_starts_from_the_artifacts_weights(continued: PretrainResult, pretrained: PretrainResult) -> None:
    before, after = (artifact.load_backbone(run).state_dict() for run in (pretrained.run, continued.run))
    learnt = [name for name in before if name.endswith(("weight", "bias"))]
    assert all(torch.equal(before[name], after[name]) for name in learnt)
    statistics = [name for name in before if name.endswith("running_mean")]
    assert all(not torch.equal(before[name], after[name]) for name in statistics), "the step was made"
    log = (Path(continued.run) / "train.log").read_text()
    assert f"weights from {pretrained.run}: {len(before)} tensors matched" in log


def test_the_card_of_continued_pretraining(continued: PretrainResult, pretrained: PretrainResult) -> None:
    card, parent = artifact.read_card(continued.run), artifact.read_card(pretrained.run)
    assert card.parent == sha256(Path(pretrained.run) / WEIGHTS) == read(Path(continued.run))["start_weights"]
    assert card.backbone == parent.backbone.model_copy(update={"init": "artifact"})
    assert card.recipe["backbone"]["init"] == "artifact"
    assert card.data == parent.data
    for path in Path(continued.artifact).iterdir():
        assert pretrained.run.encode() not in path.read_bytes(), f"{path.name} holds a path"
    assert load_pretrain(Path(continued.run) / "recipe.yaml").backbone.init == pretrained.run


def test_continued_pretraining_is_probed_as_any_other(
    continued: PretrainResult, phantom_store: Store, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"budgets": "100%", "seeds": 1, "replicates": 100}
    found = evaluate(continued.run, phantom_store.path, out=tmp_path / "out", **options)
    assert found.seen == 0
    assert f"0 of {found.test_patients} test patients were seen in pretraining" in "\n".join(found.lines())


def test_patients_of_the_start_count_as_seen(
    quick: tuple[str, ...], phantom_store: Store, pretrained: PretrainResult, tmp_path: Path
) -> None:
    """The start has read the test patients of this store; the pretraining itself has not."""
    network, card = artifact.load_backbone(pretrained.run), artifact.read_card(pretrained.run)
    everybody = artifact.fingerprint(phantom_store, phantom_store.rows())
    artifact.write(tmp_path / "leaky", network, card, everybody)
    overrides = (*quick, f"backbone.init={tmp_path / 'leaky'}")
    pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    test = phantom_store.rows("test")
    patients = len(np.unique(phantom_store.patients(test)))
    assert artifact.patients_seen(tmp_path / "run", phantom_store, test) == patients
    found = evaluate(tmp_path / "run", phantom_store.path, budgets="100%", seeds=1, replicates=100)
    assert found.seen == found.test_patients
    with pytest.raises(DataError, match="test patients were seen"):
        evaluate(tmp_path / "run", phantom_store.path, strict=True, out=tmp_path / "strict")


def test_of_a_weight_file_nobody_knows_whom_it_has_seen(
    quick: tuple[str, ...], phantom_store: Store, pretrained: PretrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes((Path(pretrained.run) / WEIGHTS).read_bytes())
    overrides = (*quick, f"backbone.init={file}")
    pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    card = artifact.read_card(tmp_path / "run")
    assert (card.data.key_id, card.parent) == (artifact.MIXED_KEYS, sha256(file))
    assert card.backbone.init == card.recipe["backbone"]["init"] == "file"
    assert artifact.patients_seen(tmp_path / "run", phantom_store, phantom_store.rows("test")) is None
    with pytest.raises(DataError, match="cannot tell whether"):
        evaluate(tmp_path / "run", phantom_store.path, strict=True, out=tmp_path / "strict")


def test_colour_weights_on_grey_images(
    quick: tuple[str, ...], photo_store: Store, phantom_store: Store, tmp_path: Path
) -> None:
    overrides = (*quick, "train.batch_size=8")
    pretrain(RECIPE, photo_store.path, tmp_path / "colour", overrides=(*overrides, "backbone.in_chans=3"))
    before = artifact.load_backbone(tmp_path / "colour")
    overrides = (*overrides, STANDING, f"backbone.init={tmp_path / 'colour'}")
    lines = plan(RECIPE, phantom_store.path, overrides=overrides).start
    assert "1 adapted (conv1.0.weight 3 -> 1 channels)" in lines[0]
    assert lines[1] == "note: the weights were trained on photo images; the store holds xray"
    pretrain(RECIPE, phantom_store.path, tmp_path / "grey", overrides=overrides)
    after = artifact.load_backbone(tmp_path / "grey").state_dict()
    torch.testing.assert_close(after["conv1.0.weight"], before.state_dict()["conv1.0.weight"].sum(1, keepdim=True))
    card = artifact.read_card(tmp_path / "grey")
    assert card.data.key_id == artifact.MIXED_KEYS, "the stores have two keys"
    log = (tmp_path / "grey" / "train.log").read_text()
    assert all(line in log for line in lines)


def test_a_plan_says_what_becomes_of_the_weights(
    quick: tuple[str, ...], phantom_store: Store, pretrained: PretrainResult
) -> None:
    planned = plan(RECIPE, phantom_store.path, overrides=(*quick, f"backbone.init={pretrained.run}"))
    assert planned.start[0].startswith(f"weights from {pretrained.run}: ")
    assert planned.start[0] in planned.lines()
    assert plan(RECIPE, phantom_store.path, overrides=quick).start == ()


class Stopped(Exception):
    """Ends a run in the middle."""


def test_a_resume_goes_on_only_with_the_same_weights(
    quick: tuple[str, ...],
    phantom_store: Store,
    pretrained: PretrainResult,
    continued: PretrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def settings(init: str | Path) -> tuple[str, ...]:
        return (*quick, "train.max_steps=4", "train.save_every_steps=2", f"backbone.init={init}")

    whole = pretrain(RECIPE, phantom_store.path, tmp_path / "whole", overrides=settings(pretrained.run))
    loss, steps = SimCLR.loss, iter(range(1, 100))

    def stopping(method: SimCLR, batch: Any) -> dict[str, torch.Tensor]:
        if next(steps) == 4:
            raise Stopped
        return loss(method, batch)

    monkeypatch.setattr(SimCLR, "loss", stopping)
    with pytest.raises(Stopped):
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=settings(pretrained.run))
    monkeypatch.undo()
    for other, words in ((continued.run, "start_weights"), ("random", r"backbone\.init")):
        with pytest.raises(UsageError, match=f"--resume cannot change the run:\n{words}"):
            pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=settings(other), resume=True)
    moved = tmp_path / "moved"
    shutil.copytree(pretrained.artifact, moved)
    pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=settings(moved), resume=True)
    assert sha256(tmp_path / "run" / WEIGHTS) == sha256(Path(whole.run) / WEIGHTS)
    assert (tmp_path / "run" / "train.log").read_text().count("weights from") == 1


def test_a_start_that_has_learnt_from_labels_is_refused(
    quick: tuple[str, ...], phantom_store: Store, tuned: FinetuneResult, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="was fine-tuned with labels"):
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=(*quick, f"backbone.init={tuned.run}"))
    assert not (tmp_path / "run").exists()
