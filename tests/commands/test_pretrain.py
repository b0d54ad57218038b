import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch

from sslmed import artifact
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.predict import predict
from sslmed.commands.pretrain import PretrainResult, plan, pretrain
from sslmed.config import DataError, MissingInputError, OutputExistsError, TrainingAborted, UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.methods.simclr import SimCLR
from sslmed.models.backbones import BackboneConfig, build
from sslmed.recipe import load_pretrain
from sslmed.run import read, read_metrics

RECIPE = "xray/simclr_resnet18"
WEIGHTS = "artifact/model.safetensors"


@pytest.fixture
def quick(pretrain_settings: tuple[str, ...]) -> tuple[str, ...]:
    return (*without_epochs(pretrain_settings), "train.max_steps=3", "monitor.knn_every=0")


def without_epochs(settings: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(setting for setting in settings if not setting.startswith("train.epochs"))


def training_rows(store: Store) -> set[int]:
    return set(store.rows("train", "unlabelled").tolist())


# A whole run.


def test_the_run_folder(pretrained: PretrainResult) -> None:
    run = Path(pretrained.run)
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "train.log",
        "checkpoints",
        "artifact",
        ".lock",
    }
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert {path.name for path in (run / "artifact").iterdir()} == {
        "model.safetensors",
        "card.json",
        "README.md",
        "MANIFEST.json",
        "selftest.safetensors",
        "fingerprint.safetensors",
    }


def test_the_result(pretrained: PretrainResult, phantom_store: Store) -> None:
    steps = 2 * (len(training_rows(phantom_store)) // 16)
    assert pretrained.steps == steps
    assert pretrained.seconds > 0
    assert pretrained.artifact == str(Path(pretrained.run) / "artifact")
    assert set(pretrained.metrics) == {"loss", "embedding_std", "rankme", "knn_val_auroc"}
    assert pretrained.next == f"sslmed evaluate {pretrained.run} --data {phantom_store.path}"
    assert f"pretrained {steps} steps" in pretrained.lines()[0]
    assert json.loads(json.dumps(pretrained.as_dict()))["metrics"] == pretrained.metrics


def test_the_recipe_of_a_run_is_a_recipe(pretrained: PretrainResult, pretrain_settings: Sequence[str]) -> None:
    asked = load_pretrain(RECIPE, pretrain_settings)
    assert load_pretrain(Path(pretrained.run) / "recipe.yaml") == asked
    assert artifact.read_card(pretrained.run).recipe == asked.model_dump(mode="json")


def test_run_json(pretrained: PretrainResult, phantom_store: Store) -> None:
    state = read(Path(pretrained.run))
    assert {name: state[name] for name in ("command", "status", "exit_code", "seed")} == {
        "command": "pretrain",
        "status": "done",
        "exit_code": 0,
        "seed": 0,
    }
    assert state["data_fingerprint"] == phantom_store.fingerprint
    assert state["precision"] == "32-true"
    assert state["result"] == pretrained.as_dict()
    assert str(phantom_store.path) not in (Path(pretrained.run) / "recipe.yaml").read_text()
    assert state["threads"] == torch.get_num_threads()


def test_metrics_of_every_step_and_the_probe_of_every_epoch(pretrained: PretrainResult) -> None:
    lines = read_metrics(Path(pretrained.run))
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, pretrained.steps + 1))
    for line in lines:
        if "loss" in line:
            assert 0 < line["loss"] < 20
            assert 0 < line["embedding_std"] < 0.2
            assert line["rankme"] >= 1
            assert line["lr"] >= 0
            assert line["images_per_second"] > 0
    probed = {line["step"]: line["knn_val_auroc"] for line in lines if "knn_val_auroc" in line}
    assert set(probed) == {pretrained.steps // 2, pretrained.steps}
    assert all(0 <= score <= 1 for score in probed.values())
    assert lines[-1]["epoch"] == 2


def test_the_card(pretrained: PretrainResult, phantom_store: Store) -> None:
    card = artifact.read_card(pretrained.artifact)
    rows = phantom_store.rows("train", "unlabelled")
    assert card.kind == "backbone"
    assert card.backbone == BackboneConfig(name="test_resnet", in_chans=1)
    assert (card.size, card.modality, card.steps) == (32, "xray", pretrained.steps)
    assert card.method["name"] == "simclr"
    assert (card.head, card.parent) == (None, None)
    assert (card.data.images, card.data.key_id) == (len(rows), phantom_store.key_id)
    assert "clip" in card.normalisation
    np.testing.assert_array_equal(
        artifact.read_fingerprint(pretrained.artifact), artifact.fingerprint(phantom_store, rows)
    )


def test_the_weights_are_trained_and_those_of_the_last_step(pretrained: PretrainResult) -> None:
    weights = artifact.load_backbone(pretrained.run).state_dict()
    last = torch.load(Path(pretrained.run) / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == pretrained.steps
    fresh = build(BackboneConfig(name="test_resnet"), 32, 0).network.state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, last["state_dict"][f"backbone.network.{name}"])
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in weights.items() if tensor.ndim == 4)


# Repeatable.


def test_the_same_seed_gives_the_same_bytes_whatever_the_workers(
    quick: tuple[str, ...], phantom_store: Store, tmp_path: Path
) -> None:
    ranks.context()  # workers come from one forkserver that has the heavy imports done
    settings = {
        "one": quick,
        "two": quick,
        "workers": (*quick, "data.workers=2"),
        "other": (*quick, "train.seed=1"),
    }
    digests = {}
    for name, overrides in settings.items():
        pretrain(RECIPE, phantom_store.path, tmp_path / name, overrides=overrides)
        digests[name] = sha256(tmp_path / name / WEIGHTS)
    assert digests["one"] == digests["two"] == digests["workers"]
    assert digests["other"] != digests["one"]


# What it reads.


def test_only_train_and_unlabelled_rows_are_read(
    quick: tuple[str, ...], phantom_store: Store, tmp_path: Path, reads: Any
) -> None:
    steps = len(training_rows(phantom_store)) // 16
    pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=(*quick, f"train.max_steps={steps}"))
    assert set(reads.rows) <= training_rows(phantom_store)
    assert len(reads.rows) == len(set(reads.rows)) == 16 * steps  # each once an epoch, for both views


def test_the_probe_reads_val_and_never_test(
    pretrain_settings: tuple[str, ...], phantom_store: Store, tmp_path: Path, reads: Any
) -> None:
    overrides = (*without_epochs(pretrain_settings), "train.max_steps=1")
    pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    target = phantom_store.target("finding")
    val = {row for row in phantom_store.rows("val").tolist() if target[row] >= 0}
    assert val <= set(reads.rows)
    assert set(reads.rows) <= val | training_rows(phantom_store)


def test_without_labels_there_is_no_probe(quick: tuple[str, ...], phantom_images: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.csv"
    with (phantom_images / "labels.csv").open(newline="") as file:
        rows = [[row["file"], row["patient"]] for row in csv.DictReader(file)]
    bare.write_text("\n".join(",".join(row) for row in [["file", "patient"], *rows]) + "\n")
    ingest(phantom_images, tmp_path / "store", modality="xray", labels=bare)
    overrides = (*quick, "monitor.knn_every=1")
    result = pretrain(RECIPE, tmp_path / "store", tmp_path / "run", overrides=overrides)
    assert "knn_val_auroc" not in result.metrics
    assert "loss" in result.metrics
    assert result.next == f"sslmed verify {tmp_path / 'run'}"  # to evaluate it takes labels


# A plan.


def test_a_plan_reads_no_pixels_and_writes_nothing(
    pretrain_settings: tuple[str, ...],
    pretrained: PretrainResult,
    phantom_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(store: Store, row: int) -> np.ndarray:
        raise AssertionError("a plan reads no pixels")

    monkeypatch.setattr(Store, "pixels", fail)
    monkeypatch.chdir(tmp_path)
    planned = plan(RECIPE, phantom_store.path, overrides=pretrain_settings)
    assert list(tmp_path.iterdir()) == []
    rows = phantom_store.rows("train", "unlabelled")
    assert (planned.images, planned.patients) == (len(rows), len(np.unique(phantom_store.patients(rows))))
    assert planned.steps == pretrained.steps == 2 * planned.steps_per_epoch
    backbone = sum(tensor.numel() for tensor in build(BackboneConfig(name="test_resnet"), 32, 0).network.parameters())
    assert planned.backbone_parameters == backbone
    width = artifact.read_card(pretrained.artifact).num_features
    projector = width * 64 + 2 * 64 + 64 * 128 + 128  # two layers and their norms, the last without shift
    assert planned.parameters == backbone + projector
    run = Path(pretrained.run)
    checkpoint, model = (run / part for part in ("checkpoints/last.ckpt", "artifact/model.safetensors"))
    held = 3 * checkpoint.stat().st_size + model.stat().st_size  # two are kept while the next is written
    assert planned.disk_bytes == pytest.approx(held, rel=0.3)
    assert planned.next.startswith(f"sslmed pretrain {RECIPE} --data {phantom_store.path} --out RUN backbone.name=")
    assert all(str(number) in " ".join(planned.lines()) for number in (planned.images, planned.steps))


def test_a_plan_finds_what_a_run_would_stumble_over(phantom_store: Store, pretrain_settings: Sequence[str]) -> None:
    with pytest.raises(UsageError, match="batch_size"):
        plan(RECIPE, phantom_store.path, overrides=(*pretrain_settings, "train.batch_size=5000"))


# Positives from metadata.


def test_positives_are_said_and_change_what_is_learnt(
    quick: tuple[str, ...], phantom_store: Store, tmp_path: Path, reads: Any
) -> None:
    rows = phantom_store.rows("train", "unlabelled")
    study = phantom_store.meta("study")[rows]
    pairs = Counter(zip(phantom_store.patients(rows).tolist(), study.tolist(), strict=True))
    having = sum(count for count in pairs.values() if count > 1)
    note = f"positives: {having} of {len(rows)} images have another image of the same study"
    overrides = (*quick, "data.positives=study")
    assert plan(RECIPE, phantom_store.path, overrides=overrides).lines()[-1] == note
    assert reads.rows == []
    pretrain(RECIPE, phantom_store.path, tmp_path / "study", overrides=overrides)
    assert set(reads.rows) <= set(rows.tolist())
    assert len(reads.rows) > 3 * 16 * 1.5  # most views but the first are of another image
    assert note in (tmp_path / "study" / "train.log").read_text()
    pretrain(RECIPE, phantom_store.path, tmp_path / "image", overrides=quick)
    assert sha256(tmp_path / "image" / WEIGHTS) != sha256(tmp_path / "study" / WEIGHTS)
    assert "positives" not in (tmp_path / "image" / "train.log").read_text()


def test_positives_that_cannot_be(quick: tuple[str, ...], phantom_store: Store, photo_store: Store) -> None:
    with pytest.raises(UsageError, match=r"rotation sees one image at a time; it is for simclr, moco.*positives=image"):
        plan(RECIPE, phantom_store.path, overrides=("method={name: rotation}", "data.positives=patient"))
    with pytest.raises(UsageError, match=r"needs the meta column 'series', but .* has study"):
        plan(RECIPE, phantom_store.path, overrides=(*quick, "data.positives=neighbour"))
    colour = ("backbone.in_chans=3", "train.batch_size=8", "data.positives=patient")
    with pytest.raises(DataError, match="none of the 14 training images has another image of the same patient"):
        plan(RECIPE, photo_store.path, overrides=(*quick, *colour))


# Height and width.


def test_an_input_that_is_not_square_goes_the_whole_way(
    quick: tuple[str, ...],
    finetune_settings: tuple[str, ...],
    phantom_store: Store,
    phantom_images: Path,
    tmp_path: Path,
) -> None:
    run, model = tmp_path / "run", tmp_path / "model"
    pretrain(RECIPE, phantom_store.path, run, overrides=(*quick, "data.size=[32, 48]", "train.max_steps=2"))
    assert artifact.read_card(run).size == (32, 48)
    found = evaluate(run, phantom_store.path, budgets="100%", seeds=1, replicates=100)
    assert found.as_dict()["protocol"]["size"] == [32, 48]
    overrides = (*finetune_settings, "train.max_steps=2")
    finetune("xray/classification", phantom_store.path, model, start=run, overrides=overrides)
    assert artifact.read_card(model).size == (32, 48)
    assert artifact.self_test(model).passed
    assert predict(model, phantom_images, tmp_path / "predictions").images > 0


# Colour.


def test_fewer_channels_than_the_store_has(quick: tuple[str, ...], photo_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"backbone\.in_chans is 1.*3 channels.*backbone\.in_chans=3"):
        pretrain(RECIPE, photo_store.path, tmp_path / "run", overrides=(*quick, "train.batch_size=8"))
    assert not (tmp_path / "run").exists()


def test_colour_and_grey_through_a_colour_network(
    quick: tuple[str, ...], photo_store: Store, phantom_store: Store, tmp_path: Path
) -> None:
    overrides = (*quick, "backbone.in_chans=3", "train.max_steps=1", "train.batch_size=8")
    for store in (photo_store, phantom_store):
        out = tmp_path / store.modality
        pretrain(RECIPE, store.path, out, overrides=overrides)
        assert artifact.read_card(out).backbone.in_chans == 3
        assert artifact.load_backbone(out)(torch.zeros(2, 3, 32, 32)).shape == (2, artifact.read_card(out).num_features)


# What it refuses, before it touches the disk.


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.batch_size=5000"], r"train\.batch_size is 5000"),
        (["train.batch_size=10", "train.accumulate=3"], "accumulate"),
        (["backbone.name=resnet81"], "no model named 'resnet81'"),
        (["views.vflip=0.5"], r"views\.vflip.*xray"),
        (["data.target=colour"], "colour"),
        (["data.target=[finding, age]"], r"is \[finding, age\], but the probe .* one label; give data\.target=finding"),
        (["train.epoch=3"], "did you mean 'epochs'"),
        (["backbone.init=imagnet"], r"'backbone\.init' is imagnet.*allowed: random, imagenet"),
    ],
)
def test_a_wrong_setting_leaves_no_run(
    overrides: list[str], words: str, pretrain_settings: tuple[str, ...], phantom_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=(*pretrain_settings, *overrides))
    assert list(tmp_path.iterdir()) == []


def test_a_fine_tuning_recipe_is_refused(phantom_store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs 'method'"):
        pretrain("xray/classification", phantom_store.path, tmp_path / "run")


def test_missing_inputs(phantom_store: Store, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no store at"):
        pretrain(RECIPE, tmp_path / "absent", tmp_path / "run")
    with pytest.raises(MissingInputError):
        pretrain(tmp_path / "absent.yaml", phantom_store.path, tmp_path / "run")
    with pytest.raises(MissingInputError, match="without --resume"):
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", resume=True)
    with pytest.raises(MissingInputError, match="no weights at"):
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=["backbone.init=runs/absent"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_not_touched(
    pretrained: PretrainResult, quick: tuple[str, ...], phantom_store: Store
) -> None:
    before = sha256(Path(pretrained.run) / "run.json")
    with pytest.raises(OutputExistsError, match="--resume"):
        pretrain(RECIPE, phantom_store.path, pretrained.run, overrides=quick)
    assert sha256(Path(pretrained.run) / "run.json") == before


def test_a_store_without_anybody_to_learn_from(quick: tuple[str, ...], phantom_images: Path, tmp_path: Path) -> None:
    with (phantom_images / "labels.csv").open(newline="") as file:
        patients = sorted({row["patient"] for row in csv.DictReader(file)})
    split = tmp_path / "split.csv"
    split.write_text("patient,split\n" + "".join(f"{patient},test\n" for patient in patients))
    ingest(phantom_images, tmp_path / "store", modality="xray", labels=phantom_images / "labels.csv", split=split)
    with pytest.raises(DataError, match="no train or unlabelled patients"):
        pretrain(RECIPE, tmp_path / "store", tmp_path / "run", overrides=quick)


# Alarms.


def test_collapse_ends_the_run_and_says_so(
    quick: tuple[str, ...], phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(method: SimCLR, batch: Any) -> dict[str, torch.Tensor]:
        embeddings = method.projector(method.backbone(batch.views[0]))
        return {"loss": embeddings.square().mean(), "embeddings": torch.ones_like(embeddings)}

    monkeypatch.setattr(SimCLR, "loss", collapsed)
    overrides = (*quick, "train.max_steps=9", "monitor.collapse_steps=3", "train.save_every_steps=2")
    with pytest.raises(TrainingAborted, match="collapsed") as caught:
        pretrain(RECIPE, phantom_store.path, tmp_path / "run", overrides=overrides)
    assert caught.value.exit_code == 3
    state = read(tmp_path / "run")
    assert (state["status"], state["exit_code"]) == ("failed", 3)
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "artifact").exists()
    result = pretrain(RECIPE, phantom_store.path, tmp_path / "warned", overrides=(*overrides, "monitor.collapse=warn"))
    assert result.steps == 9
    assert "warning: the embeddings have collapsed" in (tmp_path / "warned" / "train.log").read_text()


def test_a_loss_that_is_not_a_number_ends_the_run(
    quick: tuple[str, ...], phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = SimCLR.loss
    steps = iter(range(1, 100))

    def diverging(method: SimCLR, batch: Any) -> dict[str, torch.Tensor]:
        outputs = loss(method, batch)
        return outputs | {"loss": outputs["loss"] * (float("nan") if next(steps) >= 3 else 1)}

    monkeypatch.setattr(SimCLR, "loss", diverging)
    with pytest.raises(TrainingAborted, match=r"step 6 is not finite.*optim\.lr"):
        pretrain(
            RECIPE,
            phantom_store.path,
            tmp_path / "run",
            overrides=(*quick, "train.max_steps=6", "train.save_every_steps=1"),
        )
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved["state_dict"].values())
    assert read(tmp_path / "run")["exit_code"] == 3
