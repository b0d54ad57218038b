"""How a detector is judged: val decides temperature, offset and thresholds; test is written, scored and drawn."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stores

from sslmed.data import splits
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.loading import DataConfig
from sslmed.data.modality import named
from sslmed.data.store import Store
from sslmed.data.targets import boxes
from sslmed.data.views import Pixels
from sslmed.evaluation import box_calibration, detections, froc
from sslmed.evaluation.detections import Detected, Found
from sslmed.supervised.applying import Answer
from sslmed.supervised.box_scoring import CURVE, EFFECT, PICTURE, RATES, WITHOUT, BoxScorer
from sslmed.supervised.task import Task

METRICS = ("map50", "map", "froc", "sensitivity_at_1")
EACH = 8  # images of train, val and test, each of a patient
SIDES = np.repeat(np.array([splits.TRAIN, splits.VAL, splits.TEST], np.uint8), EACH)
CLASSES = ("cell", "nerve")


def true_boxes(row: int) -> Boxes:
    """None in every fourth image; else one or two."""
    count = (row % 4 > 0) + (row % 4 == 3)
    corners = [[5 + 20 * at, 4, 17 + 20 * at, 18 + row % 5] for at in range(count)]
    return Boxes(
        np.array(corners, np.float32).reshape(-1, 4), np.array([(row + at) % 2 for at in range(count)], np.int16)
    )


class Says:
    """In the place of a network: most true boxes, some a little off, and what is false, most of it by low scores.

    ``reducing`` takes away what is false and scores above a half.
    """

    def __init__(self, reducing: bool | None = None) -> None:
        more = {} if reducing is None else {"reducing": reducing}
        self.head: Any = SimpleNamespace(kind="boxes", temperature=1.0, offset=0.0, metrics=lambda: METRICS, **more)
        self.breaks = False

    def raw(self, row: int) -> list[tuple[list[float], float, int]]:
        """Boxes, scores and classes of one image."""
        true, stream = true_boxes(row), np.random.default_rng(row)
        found = [
            ([each + float(stream.integers(0, 2)) for each in box], float(stream.uniform(0.3, 0.9)), int(kind))
            for box, kind in zip(true.xyxy.tolist(), true.classes, strict=True)
            if stream.random() < 0.8
        ]
        found += [([30, 30, 36, 38], float(stream.uniform(0.02, 0.5)), int(stream.integers(2))) for _ in range(2)]
        if not getattr(self.head, "reducing", True):
            found.append(([1, 32, 9, 39], 0.95, row % 2))
        return sorted(found, key=lambda each: -each[1])

    def found(self, row: int) -> Found:
        said = self.raw(row)
        scores = np.array([score for _, score, _ in said])
        scores = box_calibration.calibrated(scores, self.head.temperature, self.head.offset)
        return Found(
            np.array([box for box, _, _ in said], np.float32), scores, np.array([k for *_, k in said], np.int16)
        )

    def __call__(self, images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[Answer]:
        if self.breaks:
            raise RuntimeError("broken")
        for pixels, _ in images:
            yield Answer(np.empty(0, np.float32), np.empty(0), boxes=self.found(int(pixels[0, 0])))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """Of 24 images that hold their own number."""
    scans = [stores.picture(np.full((40, 48), row, np.uint8), f"{row:064x}") for row in range(3 * EACH)]
    patients = [f"{row:032x}" for row in range(3 * EACH)]
    made = stores.write_store(tmp_path_factory.mktemp("scoring") / "store", scans, patients, split=SIDES)
    annotate(made.path, boxes={row: true_boxes(row) for row in range(3 * EACH)}, box_classes=CLASSES)
    store = Store(made.path)
    sides = [store.rows(side) for side in ("train", "val", "test")]
    return Task(store, named("xray"), boxes(store), *sides, DataConfig(), 1)


def detected(task: Task, says: Says, side: str) -> Detected:
    rows = getattr(task, side)
    truth, found = (tuple(map(of, rows.tolist())) for of in (true_boxes, says.found))
    return Detected(rows, task.store.patients(rows), truth, found, CLASSES)


def test_val_is_map_at_half_overlap_of_val_images(task: Task) -> None:
    says = Says()
    expected = detections.measures(CLASSES)["map50"](detected(task, says, "val"))
    assert 0 < expected < 1
    assert BoxScorer(task, says).val() == expected  # type: ignore[arg-type]


def test_val_settles_temperature_offset_and_thresholds_once_and_again(task: Task) -> None:
    says = Says()
    plain = detected(task, says, "val")
    scores, hit = np.concatenate([each.scores for each in plain.found]), np.concatenate(detections.hits(plain))
    temperature, offset = box_calibration.fit(scores, hit)
    assert (temperature, offset) != (1.0, 0.0)
    scorer = BoxScorer(task, says)  # type: ignore[arg-type]
    says.head.temperature, says.head.offset = 3.0, -2.0  # of an earlier calibration
    for _ in range(2):
        scorer.settle()
        assert (says.head.temperature, says.head.offset) == (temperature, offset)
        after = detected(task, says, "val")
        assert scorer.settled.thresholds == box_calibration.thresholds(after)
        about = scorer.settled.about
        assert about["val_ece_before"] == pytest.approx(box_calibration.ece(scores, hit))
        calibrated = np.concatenate([each.scores for each in after.found])
        assert about["val_ece_after"] == pytest.approx(box_calibration.ece(calibrated, hit))


def test_a_val_without_anything_found_settles_nothing(task: Task) -> None:
    says = Says()
    nothing = Found(np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, np.int16))
    says.found = lambda _: nothing  # type: ignore[method-assign]
    scorer = BoxScorer(task, says)  # type: ignore[arg-type]
    scorer.settle()
    assert (says.head.temperature, says.head.offset) == (1.0, 0.0)
    assert scorer.settled.thresholds == (0.5, 0.5)
    assert scorer.settled.about == {}
    assert scorer.val() == 0


def test_test_images_are_scored_written_and_drawn(task: Task, tmp_path: Path) -> None:
    says = Says()
    tested = BoxScorer(task, says).test(tmp_path)  # type: ignore[arg-type]
    expected = detected(task, says, "test")
    kept = detections.read(tmp_path)
    assert kept.same_test(expected)
    for one, other in zip(kept.found, expected.found, strict=True):
        np.testing.assert_array_equal(one.xyxy, other.xyxy)
        np.testing.assert_array_equal(one.scores, other.scores)
    measures = detections.measures(CLASSES)
    assert set(tested.overall) == set(METRICS)
    assert set(tested.by_class) == set(CLASSES)
    for kind in METRICS:
        value, low, high = tested.overall[kind]
        assert value == pytest.approx(measures[kind](expected))
        assert low < value < high
        for name in CLASSES:
            assert tested.by_class[name][kind][0] == pytest.approx(measures[f"{kind}:{name}"](expected))
    assert tested.notes[-1] == "2 of 8 test images have no box: what is found there is false"
    assert tested.others == {}
    with (tmp_path / CURVE).open(newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["false_positives_an_image", "sensitivity", "low", "high"]
    rates, mean, low, high = np.array(lines, np.float64).T
    np.testing.assert_allclose(rates, RATES, rtol=1e-5)
    by_hand = np.mean([froc.sensitivities(expected, k, np.ones((EACH, 1)), RATES)[:, 0] for k in range(2)], axis=0)
    np.testing.assert_allclose(mean, by_hand, atol=1e-5)
    assert (np.diff(mean) >= 0).all()
    assert (low <= mean + 1e-5).all()
    assert (mean <= high + 1e-5).all()
    assert (tmp_path / "plots" / PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_what_the_reducer_gains_is_told_with_the_difference(task: Task, tmp_path: Path) -> None:
    says = Says(reducing=True)
    tested = BoxScorer(task, says).test(tmp_path)  # type: ignore[arg-type]
    assert says.head.reducing
    says.head.reducing = False
    alone = detected(task, says, "test")
    measures = detections.measures(CLASSES)
    assert set(tested.others) == {WITHOUT, EFFECT}
    for kind in METRICS:
        without, gained = tested.others[WITHOUT][kind], tested.others[EFFECT][kind]
        assert without[0] == pytest.approx(measures[kind](alone))
        assert gained[0] == pytest.approx(tested.overall[kind][0] - without[0])
        assert gained[1] <= gained[0] <= gained[2]
    assert tested.others[EFFECT]["map50"][0] > 0
    assert detections.read(tmp_path).found[0].scores[0] < 0.95, "what is kept is with the reducer"


def test_the_reducer_is_on_again_after_an_error(task: Task) -> None:
    says = Says(reducing=True)
    scorer = BoxScorer(task, says)  # type: ignore[arg-type]
    says.breaks = True
    with pytest.raises(RuntimeError, match="broken"):
        scorer._without_reducer(detected(task, says, "test"), {}, np.ones((1, EACH)))
    assert says.head.reducing
