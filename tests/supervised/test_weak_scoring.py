"""Weak boxes are held against the boxes of a store, which taught nothing."""

from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.config import UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.phantoms import write_phantoms
from sslmed.data.store import Store
from sslmed.data.targets import Target
from sslmed.evaluation import detections
from sslmed.supervised import model as models
from sslmed.supervised.weak_scoring import WEAK, _numbers, _renumbered

SMALL = ["backbone.name=test_resnet", "data.size=32", "data.workers=0", "train.max_steps=2", "train.batch_size=8"]


def boxes_of(*classes: str) -> Target:
    return Target("boxes", "boxes", classes, np.ones(1, bool), None)


def test_classes_go_together_by_name_or_as_the_only_ones() -> None:
    assert _numbers({1: "b", 2: "c"}, boxes_of("c", "d", "b")) == {1: 2, 2: 0}
    assert _numbers({1: "nodule"}, boxes_of("lesion")) == {1: 0}
    assert _numbers({1: "nodule", 2: "mass"}, boxes_of("lesion")) == {}
    assert _numbers({1: "nodule"}, boxes_of("lesion", "vessel")) == {}


def test_boxes_of_other_classes_are_left_out() -> None:
    corners = np.array([[0, 0, 1, 1], [1, 1, 3, 3], [2, 2, 4, 4]], np.float32)
    kept = _renumbered(Boxes(corners, np.array([0, 2, 1], np.int16)), {2: 0, 0: 1})
    assert kept.classes.tolist() == [1, 0]
    assert kept.xyxy.tolist() == [[0, 0, 1, 1], [1, 1, 3, 3]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weak")
    drawn = write_phantoms(folder / "raw", patients=40, boxes=True)
    ingest(drawn.folder, folder / "store", modality="xray", labels=drawn.labels, boxes=drawn.boxes)
    return folder / "store"


def test_a_run_has_both_scores_and_says_that_boxes_are_weak(store: Path, tmp_path: Path) -> None:
    done = finetune("xray/weak_localization", store, tmp_path / "run", overrides=SMALL)
    assert done.kind == "class"
    assert "auroc" in done.test
    assert set(done.others[WEAK]) == {"map50", "map", "froc", "sensitivity_at_1"}
    (note,) = (each for each in done.notes if "weak" in each)
    assert note.startswith("weak boxes are held against boxes of nodule (nodule) on ")
    assert any(WEAK in line for line in done.lines())
    assert WEAK.capitalize() in (tmp_path / "run" / "test_scores.md").read_text()
    assert type(done).from_dict(done.as_dict()) == done

    found = detections.read(tmp_path / "run" / "weak")
    opened = Store(store)
    assert found.classes == ("nodule",)
    for row, truth in zip(found.row.tolist(), found.truth, strict=True):
        np.testing.assert_array_equal(truth.xyxy, opened.boxes(row).xyxy)
    made = models.load(tmp_path / "run")
    assert made.about.weak
    assert made.applied.head.located == (1,)
    measured = detections.measures(found.classes)["froc"](found)
    assert done.others[WEAK]["froc"][0] == pytest.approx(measured, nan_ok=True)


def test_without_boxes_the_labels_are_scored_alone(phantom_store: Store, tmp_path: Path) -> None:
    done = finetune("xray/weak_localization", phantom_store.path, tmp_path / "run", overrides=SMALL)
    assert not done.others
    assert any("could not be scored: the store has no boxes" in note for note in done.notes)
    assert not (tmp_path / "run" / "weak").exists()


def test_a_class_that_means_nothing_must_be_told(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"head.nothing is 'normal'.*Allowed: clear, nodule"):
        finetune("xray/weak_localization", store, tmp_path / "run", overrides=[*SMALL, "head.nothing=normal"])
    assert not (tmp_path / "run").exists()
