"""Fine-tuning on boxes, end to end on drawn shapes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import stores

from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.pretrain import pretrain
from sslmed.config import DataError, UsageError
from sslmed.data.phantoms import write_phantoms
from sslmed.data.store import Store
from sslmed.evaluation import detections
from sslmed.run import read_metrics
from sslmed.supervised.box_scoring import EFFECT, WITHOUT
from sslmed.supervised.model import load

RECIPE = "xray/localization"
SMALL = (
    "backbone.name=test_resnet",
    "data.size=48",
    "data.workers=0",
    "train.batch_size=8",
    "train.precision=32",
    "optim.lr=3e-3",
    "head.width=32",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """With masks and no boxes: boxes are laid around what the masks show."""
    return stores.write_shapes(tmp_path_factory.mktemp("shapes") / "store")


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Phantoms with boxes of their own, and negatives."""
    folder = tmp_path_factory.mktemp("boxed")
    drawn = write_phantoms(folder / "raw", patients=40, boxes=True)
    ingest(drawn.folder, folder / "store", modality="xray", labels=drawn.labels, boxes=drawn.boxes)
    return Store(folder / "store")


@pytest.fixture(scope="module")
def tuned(shapes: Store) -> FinetuneResult:
    """Learnt in 80 steps. Read it, never change it."""
    overrides = (*SMALL, "train.max_steps=80", "views.crop=[0.8,1.0]", "stop.check_every=40", "head.reducer=true")
    return finetune(RECIPE, shapes.path, shapes.path.parent / "tuned", overrides=overrides)


def test_shapes_are_found(tuned: FinetuneResult, shapes: Store) -> None:
    assert (tuned.target, tuned.kind) == ("boxes around masks", "boxes")
    assert tuned.classes == shapes.mask_classes[1:]
    assert tuned.test["map50"][0] > 0.5
    for value, low, high in tuned.test.values():
        assert 0 <= low <= value <= high <= 1
    assert set(tuned.test) == {"map50", "map", "froc", "sensitivity_at_1"}
    assert tuned.by_class.keys() == set(tuned.classes)
    assert type(tuned).from_dict(json.loads(json.dumps(tuned.as_dict()))) == tuned


def test_the_reducer_s_effect_is_told(tuned: FinetuneResult) -> None:
    for name, (gained, low, high) in tuned.others[EFFECT].items():
        assert gained == pytest.approx(tuned.test[name][0] - tuned.others[WITHOUT][name][0])
        assert low <= gained <= high
    assert WITHOUT in "\n".join(tuned.lines())


def test_what_a_run_keeps(tuned: FinetuneResult, shapes: Store) -> None:
    run = Path(tuned.run)
    found = detections.read(run)
    assert detections.measures(found.classes)["map50"](found) == pytest.approx(tuned.test["map50"][0])
    assert sorted(found.row.tolist()) == sorted(shapes.rows("test").tolist())
    with (run / "test_froc.csv").open(newline="") as file:
        curve = [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]
    at_one = next(line for line in curve if line["false_positives_an_image"] == 1)
    assert at_one["sensitivity"] == pytest.approx(tuned.test["sensitivity_at_1"][0], abs=1e-5)
    sensitivities = [line["sensitivity"] for line in curve]
    assert sensitivities == sorted(sensitivities)
    assert all(line["low"] <= line["high"] for line in curve)
    assert (run / "plots" / "froc.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in read_metrics(run) if "val_map50" in line] == [40, 80]
    assert "AP at IoU 0.5" in (run / "test_scores.md").read_text()


def test_the_model_answers_as_it_was_tested(tuned: FinetuneResult, shapes: Store) -> None:
    model, found = load(tuned.run), detections.read(Path(tuned.run))
    assert model.about.offset != 0
    assert model.about.thresholds is not None
    assert len(model.about.thresholds) == len(tuned.classes)
    images = [(shapes.pixels(row), shapes.intensity(row)) for row in found.row.tolist()]
    for answer, kept in zip(model.applied(images), found.found, strict=True):
        assert answer.boxes is not None
        np.testing.assert_allclose(answer.boxes.xyxy, kept.xyxy, atol=1e-3)
        np.testing.assert_allclose(answer.boxes.scores, kept.scores, atol=1e-5)
    every = [each for answer in model.applied(images) for each in model.kept(answer.boxes).scores.tolist()]
    assert every
    assert min(every) >= min(model.about.thresholds)


def test_boxes_of_a_store_with_negatives(boxed: Store, tmp_path: Path) -> None:
    done = finetune(
        RECIPE,
        boxed.path,
        tmp_path / "run",
        overrides=[*SMALL, "train.max_steps=2", "head.input=tiles", "data.size=64"],
    )
    assert done.target == "boxes"
    assert done.classes == ("nodule",)
    assert not done.by_class, "of one class the whole says it all"
    assert any("test images have no box: what is found there is false" in note for note in done.notes)
    assert done.train_images == int(boxed.annotations.boxed()[boxed.rows("train")].sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.target=finding"], "localization learns the store's boxes; remove it"),
        (["data.augment_on=device"], "masks and boxes move with their images on the cpu alone"),
        (["head.overlap=1"], "head.overlap"),
        (["head.input=tiles", "data.size=40"], "tiles for boxes need at least 64 pixels a side"),
    ],
)
def test_settings_that_do_not_go_with_boxes(settings: list[str], message: str, boxed: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(RECIPE, boxed.path, tmp_path / "run", overrides=[*SMALL, *settings])
    assert not (tmp_path / "run").exists()


def test_a_store_without_boxes_is_refused(phantom_store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither boxes nor masks.*sslmed label STORE --boxes"):
        finetune(RECIPE, phantom_store.path, tmp_path / "run", overrides=SMALL)


def test_starts_compared_on_boxes(boxed: Store, tmp_path: Path) -> None:
    small = ["backbone.name=test_resnet", "data.size=32", "data.workers=0", "train.max_steps=2", "train.batch_size=8"]
    pretrain("xray/simclr_resnet18", boxed.path, tmp_path / "run", overrides=small)
    done = evaluate(
        tmp_path / "run",
        boxed.path,
        recipe=RECIPE,
        overrides=["train.max_steps=2", "data.size=48", "head.width=16", "data.workers=0", "train.batch_size=8"],
        budgets="k=12",
        seeds=1,
        replicates=100,
        out=tmp_path / "out",
    )
    assert done.kind == "boxes"
    arms = {(row.arm, row.metric) for row in done.rows}
    assert {("random", "map50"), ("pretrained", "map50"), ("pretrained", "froc:nodule")} <= arms
    assert any("mAP at IoU 0.5" in line for line in done.lines())
    assert done.next.startswith("sslmed finetune xray/localization")
