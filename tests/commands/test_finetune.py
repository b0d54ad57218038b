import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sslmed import artifact
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.pretrain import PretrainResult
from sslmed.config import DataError, MissingInputError, OutputExistsError, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.evaluation import metrics, predictions
from sslmed.recipe import load_finetune
from sslmed.run import read, read_metrics
from sslmed.supervised.scoring import LabelScorer
from sslmed.training.early_stopping import EarlyStopping

RECIPE = "xray/classification"
Settings = tuple[str, ...]


def labelled(store: Store, *splits: str) -> list[int]:
    target = store.target("finding")
    return [row for row in store.rows(*splits).tolist() if target[row] >= 0]


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "artifact" / "model.safetensors")


# A whole run, from a pretrained backbone.


def test_the_run_folder(tuned: FinetuneResult) -> None:
    run = Path(tuned.run)
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "artifact",
        predictions.NAME,
        "test_scores.md",
        ".lock",
    }
    assert {"model.safetensors", "head.safetensors", "card.json", "MANIFEST.json"} <= {
        path.name for path in (run / "artifact").iterdir()
    }


def test_the_result(tuned: FinetuneResult, pretrained: PretrainResult, phantom_store: Store) -> None:
    train, test = labelled(phantom_store, "train"), labelled(phantom_store, "test")
    assert (tuned.target, tuned.classes, tuned.start) == ("finding", ("clear", "nodule"), pretrained.run)
    assert (tuned.train_images, tuned.test_images) == (len(train), len(test))
    assert tuned.train_patients == len(np.unique(phantom_store.patients(np.array(train))))
    assert tuned.test_patients == len(np.unique(phantom_store.patients(np.array(test))))
    assert set(tuned.test) == set(metrics.METRICS)
    for name, (value, low, high) in tuned.test.items():
        assert (-1 if name == "mcc" else 0) <= low <= high <= 1
        assert low <= value <= high
    assert tuned.val_patients == len(np.unique(phantom_store.patients(np.array(labelled(phantom_store, "val")))))
    assert tuned.seen == 0
    assert tuned.next == f"sslmed predict {tuned.run} SOURCE --out DIR"
    lines = "\n".join(tuned.lines())
    assert "with 95 % intervals" in lines
    assert f"auroc {tuned.test['auroc'][0]:.3f} [" in lines
    json.dumps(tuned.as_dict(), allow_nan=False)


def test_the_score_is_that_of_the_predictions_beside_it(tuned: FinetuneResult, phantom_store: Store) -> None:
    kept = predictions.read(Path(tuned.run))
    assert kept.row.tolist() == labelled(phantom_store, "test")
    assert kept.target.tolist() == phantom_store.target("finding")[kept.row].tolist()
    assert kept.patient.tolist() == phantom_store.patients(kept.row).tolist()
    np.testing.assert_allclose(kept.scores.sum(axis=1), 1, rtol=1e-6)
    assert tuned.test["auroc"][0] == pytest.approx(metrics.auroc(kept.target, kept.scores))
    assert tuned.thresholds is not None
    assert kept.called[:, 1].tolist() == (kept.scores[:, 1] >= tuned.thresholds[1]).tolist()
    estimates = predictions.compare({"model": [Path(tuned.run)]}, "model")
    for each in estimates:
        assert tuned.test[each.metric] == pytest.approx((each.value.mean, each.value.low, each.value.high))


def test_run_json_and_recipe(tuned: FinetuneResult, pretrained: PretrainResult, finetune_settings: Settings) -> None:
    state = read(Path(tuned.run))
    assert (state["command"], state["status"], state["exit_code"]) == ("finetune", "done", 0)
    assert state["start_weights"] == sha256(Path(pretrained.artifact) / "model.safetensors")
    asked = load_finetune(RECIPE, (*finetune_settings, "data.size=32"))  # the card's size
    assert load_finetune(Path(tuned.run) / "recipe.yaml") == asked
    assert artifact.read_card(tuned.run).recipe == asked.model_dump(mode="json")


def test_the_card_names_the_parent_and_everybody_seen(
    tuned: FinetuneResult, pretrained: PretrainResult, phantom_store: Store
) -> None:
    card = artifact.read_card(tuned.artifact)
    assert card.parent == sha256(Path(pretrained.artifact) / "model.safetensors")
    assert card.kind == "classification"
    assert card.head is not None
    assert (card.head.target, card.head.classes) == ("finding", ("clear", "nodule"))
    assert card.backbone == artifact.read_card(pretrained.artifact).backbone
    assert (card.size, card.modality) == (32, "xray")
    assert card.steps == tuned.best_step
    assert (card.data.images, card.data.patients) == (tuned.train_images, tuned.train_patients)
    assert card.data.key_id == phantom_store.key_id
    rows = sorted([*phantom_store.rows("train", "unlabelled").tolist(), *labelled(phantom_store, "val")])
    everybody = artifact.fingerprint(phantom_store, np.array(rows))  # val decided when to stop
    np.testing.assert_array_equal(artifact.read_fingerprint(tuned.artifact), everybody)
    assert len(np.unique(phantom_store.patients(np.array(rows)))) > tuned.train_patients + tuned.val_patients


def test_val_is_scored_at_every_check_and_the_best_is_kept(tuned: FinetuneResult) -> None:
    scores = {line["step"]: line["val_auroc"] for line in read_metrics(Path(tuned.run)) if "val_auroc" in line}
    assert list(scores) == [2, 4, 6]
    assert tuned.best_step == min(step for step, score in scores.items() if score == max(scores.values()))


def test_the_whole_network_was_trained(tuned: FinetuneResult, pretrained: PretrainResult) -> None:
    before, after = weights(pretrained.run), weights(tuned.run)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if before[name].ndim == 4)


# Who is read, and how often.


def test_test_patients_are_read_once_and_train_patients_only_for_training(
    phantom_store: Store, pretrained: PretrainResult, finetune_settings: Settings, tmp_path: Path, reads: Any
) -> None:
    finetune(RECIPE, phantom_store.path, tmp_path / "run", start=pretrained.run, overrides=finetune_settings)
    times = Counter(reads.rows)
    assert {row: times[row] for row in phantom_store.rows("test").tolist() if times[row]} == dict.fromkeys(
        labelled(phantom_store, "test"), 1
    )
    assert {row: times[row] for row in phantom_store.rows("val").tolist() if times[row]} == dict.fromkeys(
        labelled(phantom_store, "val"),
        3 + 2,  # checks, then calibration and what val images look like
    )
    trained = {row for row in phantom_store.rows("train", "unlabelled").tolist() if times[row]}
    assert trained <= set(labelled(phantom_store, "train"))
    assert len(trained) >= 16
    last_training_read = max(n for n, row in enumerate(reads.rows) if row in labelled(phantom_store, "train"))
    first_test_read = min(n for n, row in enumerate(reads.rows) if row in labelled(phantom_store, "test"))
    assert first_test_read > last_training_read


def test_test_labels_decide_nothing(
    phantom_store: Store,
    pretrained: PretrainResult,
    tuned: FinetuneResult,
    finetune_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the truth about test patients turned round, the same model comes out, and its score turns round."""
    target, test = Store.target, phantom_store.rows("test")

    def turned(store: Store, name: str) -> Any:
        values = target(store, name)
        values[test] = np.where(values[test] >= 0, 1 - values[test], -1)
        return values

    monkeypatch.setattr(Store, "target", turned)
    other = finetune(RECIPE, phantom_store.path, tmp_path / "run", start=pretrained.run, overrides=finetune_settings)
    for name in ("model.safetensors", "head.safetensors"):
        assert sha256(Path(other.artifact) / name) == sha256(Path(tuned.artifact) / name)
    assert other.test["auroc"][0] == pytest.approx(1 - tuned.test["auroc"][0])


def test_a_budget_takes_few_patients_and_says_how_many(
    phantom_store: Store, random_settings: Settings, tmp_path: Path, reads: Any
) -> None:
    overrides = (*random_settings, "labels.budget=k=2", "train.max_steps=2")
    result = finetune(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    assert result.train_patients == 4
    assert 4 <= result.train_images <= 16
    first_check = min(reads.rows.index(row) for row in labelled(phantom_store, "val"))  # later all are looked at once
    taken = set(reads.rows[:first_check])
    assert len(taken) == result.train_images
    assert len(np.unique(phantom_store.patients(np.array(sorted(taken))))) == 4
    assert artifact.read_card(result.artifact).data.patients == 4


# Other starts.


def test_from_random_weights(phantom_store: Store, random_settings: Settings, tmp_path: Path) -> None:
    first, second, other = (
        finetune(RECIPE, phantom_store.path, tmp_path / name, overrides=(*random_settings, "train.max_steps=2", seed))
        for name, seed in (("a", "train.seed=0"), ("b", "train.seed=0"), ("c", "train.seed=1"))
    )
    card = artifact.read_card(first.run)
    assert (first.start, card.parent, card.size) == ("random", None, 32)
    rows = np.array(labelled(phantom_store, "train", "val"))
    np.testing.assert_array_equal(artifact.read_fingerprint(first.run), artifact.fingerprint(phantom_store, rows))
    assert first.seen == 0
    for name in ("model.safetensors", "head.safetensors"):
        digests = [sha256(Path(result.artifact) / name) for result in (first, second, other)]
        assert digests[0] == digests[1] != digests[2]
    assert first.test == second.test


def test_a_frozen_backbone_leaves_as_it_came(
    phantom_store: Store, pretrained: PretrainResult, finetune_settings: Settings, tmp_path: Path
) -> None:
    overrides = (*finetune_settings, "head.frozen=all")
    result = finetune(RECIPE, phantom_store.path, tmp_path / "run", start=pretrained.artifact, overrides=overrides)
    assert sha256(Path(result.artifact) / "model.safetensors") == sha256(
        Path(pretrained.artifact) / "model.safetensors"
    )
    head = load_file(Path(result.artifact) / "head.safetensors")
    assert head["1.weight"].abs().sum() > 0


def test_another_sites_key_makes_seen_unanswerable(
    phantom_images: Path,
    pretrained: PretrainResult,
    finetune_settings: Settings,
    tmp_path: Path,
) -> None:
    """Never "0 seen": two keys cannot be compared."""
    labels = phantom_images / "labels.csv"
    ingest(phantom_images, tmp_path / "store", modality="xray", labels=labels, key=tmp_path / "other.key")
    overrides = (*finetune_settings, "train.max_steps=2")
    result = finetune(RECIPE, tmp_path / "store", tmp_path / "run", start=pretrained.run, overrides=overrides)
    card = artifact.read_card(result.run)
    assert card.data.key_id == artifact.MIXED_KEYS
    store = Store(tmp_path / "store")
    assert artifact.patients_seen(result.run, store, store.rows()) is None
    assert result.seen is None
    assert "cannot tell" in "\n".join(result.lines())


def test_fewer_images_than_a_step_takes(phantom_store: Store, random_settings: Settings, tmp_path: Path) -> None:
    overrides = (*random_settings, "train.batch_size=600", "train.accumulate=4", "train.max_steps=2")
    result = finetune(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    assert result.train_images < 600
    assert read_metrics(Path(result.run))[-1]["step"] == 2


# Resumed.


@pytest.mark.parametrize(
    ("patience", "scores", "best", "checks"),
    [
        (0, {2: 0.6, 4: 0.9, 6: 0.5}, 4, [2, 4, 6]),  # to the last step, which is in the checkpoint
        (1, {2: 0.9, 4: 0.5}, 2, [2, 4]),  # stopped at a step that is in the checkpoint
        (1, {2: 0.9, 4: 0.95, 6: 0.5}, 4, [2, 4, 6]),
    ],
)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(
    patience: int,
    scores: dict[int, float],
    best: int,
    checks: list[int],
    phantom_store: Store,
    random_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after training, before the artifact: the weights of the best check count, not those of the last step."""
    check = EarlyStopping.on_train_batch_end

    def scripted(stop: EarlyStopping, trainer: Any, *rest: Any) -> None:
        stop.score = lambda: scores[trainer.global_step]
        check(stop, trainer, *rest)

    monkeypatch.setattr(EarlyStopping, "on_train_batch_end", scripted)
    overrides = (*random_settings, f"stop.patience={patience}")
    whole = finetune(RECIPE, phantom_store.path, tmp_path / "whole", overrides=overrides)
    assert whole.best_step == best

    def killed(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(LabelScorer, "test", killed)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(RECIPE, phantom_store.path, tmp_path / "part", overrides=overrides)
    for _ in range(2):  # and a finished run may be resumed again
        resumed = finetune(RECIPE, phantom_store.path, tmp_path / "part", overrides=overrides, resume=True)
        assert resumed.best_step == best
        assert resumed.test == whole.test
        for name in ("model.safetensors", "head.safetensors"):
            assert sha256(Path(resumed.artifact) / name) == sha256(Path(whole.artifact) / name)
    assert [line["step"] for line in read_metrics(tmp_path / "part") if "val_auroc" in line] == checks


def test_a_resume_from_other_weights_is_refused(
    tuned: FinetuneResult, phantom_store: Store, finetune_settings: Settings, tmp_path: Path
) -> None:
    shutil.copytree(tuned.run, tmp_path / "run")
    with pytest.raises(UsageError, match="start") as caught:
        finetune(
            RECIPE,
            phantom_store.path,
            tmp_path / "run",
            start=tuned.run,
            overrides=finetune_settings,
            resume=True,
        )
    assert len(str(caught.value).splitlines()) <= 6


# What it refuses, before it touches the disk.


def refused(error: type[Exception], words: str, out: Path, data: Path, **how: Any) -> None:
    with pytest.raises(error, match=words) as caught:
        finetune(RECIPE, data, out, **how)
    assert len(str(caught.value).splitlines()) <= 6
    assert not out.exists()


def test_another_backbone_in_the_recipe(
    phantom_store: Store, pretrained: PretrainResult, finetune_settings: Settings, tmp_path: Path
) -> None:
    named = (*finetune_settings, "backbone.name=resnet18")
    words = "names backbone resnet18, but .* holds test_resnet"
    refused(UsageError, words, tmp_path / "run", phantom_store.path, start=pretrained.run, overrides=named)


def test_the_same_backbone_in_the_recipe_is_no_error(
    phantom_store: Store, pretrained: PretrainResult, finetune_settings: Settings, tmp_path: Path
) -> None:
    overrides = (*finetune_settings, "backbone.name=test_resnet", "train.max_steps=1")
    finetune(RECIPE, phantom_store.path, tmp_path / "run", start=pretrained.run, overrides=overrides)


def test_random_needs_a_backbone(phantom_store: Store, finetune_settings: Settings, tmp_path: Path) -> None:
    words = "--from random needs a backbone"
    refused(UsageError, words, tmp_path / "run", phantom_store.path, overrides=finetune_settings)


@pytest.mark.parametrize("init", ["imagenet", "runs/absent"])
def test_the_start_is_named_by_from_alone(
    init: str, phantom_store: Store, random_settings: Settings, tmp_path: Path
) -> None:
    overrides = (*random_settings, f"backbone.init={init}")
    words = f"backbone.init is {init}, but fine-tuning starts from what --from names"
    refused(UsageError, words, tmp_path / "run", phantom_store.path, overrides=overrides)


def test_another_modality(
    photo_store: Store, pretrained: PretrainResult, finetune_settings: Settings, tmp_path: Path
) -> None:
    words = "backbone was trained on 1-channel xray; the store holds 3-channel photo"
    refused(DataError, words, tmp_path / "run", photo_store.path, start=pretrained.run, overrides=finetune_settings)


def test_random_weights_with_too_few_channels(photo_store: Store, random_settings: Settings, tmp_path: Path) -> None:
    words = r"backbone\.in_chans is 1.*\n?.*backbone\.in_chans=3"
    refused(UsageError, words, tmp_path / "run", photo_store.path, overrides=random_settings)


@pytest.mark.parametrize("budget", ["1%", "k=500"])
def test_a_budget_that_cannot_be_drawn(
    budget: str, phantom_store: Store, random_settings: Settings, tmp_path: Path
) -> None:
    overrides = (*random_settings, f"labels.budget={budget}")
    refused(DataError, rf"labels\.budget={budget}", tmp_path / "run", phantom_store.path, overrides=overrides)


def test_positives_are_for_pretraining(phantom_store: Store, random_settings: Settings, tmp_path: Path) -> None:
    overrides = (*random_settings, "data.positives=patient")
    refused(UsageError, "fine-tuning compares no views", tmp_path / "run", phantom_store.path, overrides=overrides)


def test_an_unknown_target(phantom_store: Store, random_settings: Settings, tmp_path: Path) -> None:
    overrides = (*random_settings, "data.target=age")
    refused(UsageError, "no label 'age'; it has finding", tmp_path / "run", phantom_store.path, overrides=overrides)


def with_split(images: Path, folder: Path, header: str, keep: Any) -> Path:
    """The phantoms with another table: ``keep`` makes a line of each old one."""
    with (images / "labels.csv").open(newline="") as file:
        lines = [",".join(keep(number, row)) for number, row in enumerate(csv.DictReader(file))]
    table = folder / "table.csv"
    table.write_text("\n".join([header, *lines]) + "\n")
    ingest(images, folder / "store", modality="xray", labels=table)
    return folder / "store"


def test_a_store_without_labels(phantom_images: Path, random_settings: Settings, tmp_path: Path) -> None:
    store = with_split(phantom_images, tmp_path, "file,patient", lambda _, row: [row["file"], row["patient"]])
    refused(DataError, "has no labels; add some: sslmed label", tmp_path / "run", store, overrides=random_settings)


@pytest.mark.parametrize(
    ("side", "words"),
    [("test", "no test patient .* has a label 'finding'"), ("val", "val patients .* fewer than two classes")],
)
def test_a_side_without_labels(
    side: str, words: str, phantom_images: Path, random_settings: Settings, tmp_path: Path
) -> None:
    def keep(number: int, row: dict[str, str]) -> list[str]:
        split = ("train", "train", "val", "test", "train", "val", "test")[int(row["patient"][1:]) % 7]
        return [row["file"], row["patient"], split, "" if split == side else row["label:finding"]]

    store = with_split(phantom_images, tmp_path, "file,patient,split,label:finding", keep)
    refused(DataError, words, tmp_path / "run", store, overrides=random_settings)


def test_a_score_that_is_not_defined_is_kept_as_such(
    phantom_images: Path, random_settings: Settings, tmp_path: Path
) -> None:
    """All labelled test patients are clear: no AUROC, and no reason to lose the model."""

    def keep(number: int, row: dict[str, str]) -> list[str]:
        patient = int(row["patient"][1:])
        label = row["label:finding"]
        split = "test" if label == "clear" and patient % 3 == 0 else "val" if patient % 5 == 0 else "train"
        return [row["file"], row["patient"], split, label]

    store = with_split(phantom_images, tmp_path, "file,patient,split,label:finding", keep)
    overrides = (*random_settings, "train.max_steps=2")
    result = finetune(RECIPE, store, tmp_path / "run", overrides=overrides)
    assert np.isnan(result.test["auroc"][0])
    assert read(tmp_path / "run")["status"] == "done"
    again = finetune(RECIPE, store, tmp_path / "run", overrides=overrides, resume=True)
    assert again.best_step == result.best_step
    assert np.isnan(again.test["auroc"][0])


def test_missing_and_unfinished_starts(phantom_store: Store, finetune_settings: Settings, tmp_path: Path) -> None:
    data = phantom_store.path
    refused(MissingInputError, "no run or artifact", tmp_path / "run", data, start=tmp_path / "absent")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "run.json").write_text("{}")
    refused(DataError, "no artifact yet", tmp_path / "run", data, start=tmp_path / "unfinished")


def test_an_existing_output_is_not_touched(
    tuned: FinetuneResult, phantom_store: Store, random_settings: Settings
) -> None:
    before = sha256(Path(tuned.run) / "run.json")
    with pytest.raises(OutputExistsError):
        finetune(RECIPE, phantom_store.path, tuned.run, overrides=random_settings)
    assert sha256(Path(tuned.run) / "run.json") == before


def test_a_pretraining_run_is_not_resumed_as_fine_tuning(
    pretrained: PretrainResult, phantom_store: Store, random_settings: Settings
) -> None:
    with pytest.raises(DataError, match="a run of `sslmed pretrain`"):
        finetune(RECIPE, phantom_store.path, pretrained.run, overrides=random_settings, resume=True)


def test_a_pretraining_recipe_is_refused(phantom_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 'head'"):
        finetune("xray/simclr_resnet18", phantom_store.path, tmp_path / "run")
