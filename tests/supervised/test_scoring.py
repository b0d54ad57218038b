"""What is one unit when a head is judged: a scan whose slices have one label, a slice otherwise; a volume of masks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stores

from sslmed.data import splits
from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.loading import DataConfig
from sslmed.data.modality import named
from sslmed.data.shards.format import LabelColumn
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store
from sslmed.data.targets import labels, masks
from sslmed.data.views import Pixels
from sslmed.evaluation import overlap, predictions
from sslmed.supervised.applying import Answer
from sslmed.supervised.scoring import LabelScorer, MaskScorer
from sslmed.supervised.task import Task

SLICES = 3
SIDES = (splits.TRAIN, splits.TRAIN, *[splits.VAL] * 4, *[splits.TEST] * 4)  # of volumes, a patient each
NOTE = "12 slices and frames are scored as 4 scans, by their mean probability"
# In percent the probability of class 1 that each slice says by its pixels. By their means, 50, 30, 40 and 60, the scans
# 0 and 3 are above the others; single slices are in no such order.
SAID = [[90, 50, 10], [10, 20, 60], [70, 40, 10], [60, 100, 20]]
TRUTH = [1, 0, 0, 1]


class Says:
    """In the place of a network: the mean of an image's pixels is the percentage of class 1."""

    def __init__(self, kind: str) -> None:
        self.head = SimpleNamespace(kind=kind, temperature=1.0, metrics=lambda: ("auroc", "brier"))

    def __call__(self, images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[Answer]:
        for pixels, _ in images:
            there = float(pixels.mean()) / 100
            scores = [1 - there, there] if self.head.kind == "class" else [there]
            yield Answer(np.empty(0, np.float32), np.array(scores))


def volumes(path: Path, truth: list[list[int]]) -> Store:
    """Ten volumes: two to train on, then the same four twice, to val and to test; ``truth`` of the four, by slice."""
    said = [[50] * SLICES] * 2 + SAID * 2
    pixels = [np.stack([np.full((4, 5), value, np.uint8) for value in each]) for each in said]
    scans = [
        NewScan(each, Intensity(0, 100, 50, 25), f"{number:064x}", kind="volume") for number, each in enumerate(pixels)
    ]
    rows = [[0] * SLICES, [1] * SLICES, *truth, *truth]
    return stores.write_store(
        path,
        scans,
        [f"{number:032x}" for number in range(len(scans))],
        modality="mri",
        split=np.repeat(np.array(SIDES, np.uint8), SLICES),
        labels=[(LabelColumn("tumour", "class", ("no", "yes")), np.array(rows, np.int16).reshape(-1))],
    )


def task(store: Store, target: Any) -> Task:
    sides = [np.flatnonzero(target.known & np.isin(np.arange(len(store)), store.rows(side))) for side in ORDER]
    return Task(store, named(store.modality), target, *sides, DataConfig(), 1)


ORDER = ("train", "val", "test")


def test_slices_that_agree_are_scored_as_a_scan(tmp_path: Path) -> None:
    store = volumes(tmp_path / "store", [[label] * SLICES for label in TRUTH])
    scorer = LabelScorer(task(store, labels(store, None)), Says("class"))
    assert scorer.val() == 1, "by single slices it is less"
    tested = scorer.test(tmp_path)
    assert tested.overall["auroc"][0] == 1
    assert tested.notes == (NOTE,)
    kept = predictions.read(tmp_path)
    assert kept.row.tolist() == [18, 21, 24, 27], "the first slice of each"
    assert kept.target.tolist() == TRUTH
    means = np.array(SAID).mean(axis=1) / 100
    np.testing.assert_allclose(kept.scores[:, 1], means, atol=1e-6)
    assert tested.overall["brier"][0] == pytest.approx(np.mean((means - TRUTH) ** 2))


def test_slices_that_differ_are_scored_one_by_one(tmp_path: Path) -> None:
    truth = [[1, 1, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]]  # one slice says other than its neighbours
    store = volumes(tmp_path / "store", truth)
    scorer = LabelScorer(task(store, labels(store, None)), Says("class"))
    tested = scorer.test(tmp_path)
    assert tested.notes == ()
    kept = predictions.read(tmp_path)
    assert kept.row.tolist() == list(range(18, 30))
    assert kept.target.tolist() == np.reshape(truth, -1).tolist()
    np.testing.assert_allclose(kept.scores[:, 1], np.reshape(SAID, -1) / 100, atol=1e-6)
    high, low = [[s for s, t in zip(np.ravel(SAID), np.ravel(truth), strict=True) if t == each] for each in (1, 0)]
    pairs = [(a > b) + (a == b) / 2 for a in high for b in low]
    assert tested.overall["auroc"][0] == scorer.val() == pytest.approx(np.mean(pairs))


def test_slices_without_a_label_are_no_part_of_a_scan(tmp_path: Path) -> None:
    truth = [[1, -1, 1], [0, 0, 0], [0, 0, 0], [-1, -1, 1]]
    store = volumes(tmp_path / "store", truth)
    scorer = LabelScorer(task(store, labels(store, None)), Says("class"))
    tested = scorer.test(tmp_path)
    assert tested.notes == ("9 slices and frames are scored as 4 scans, by their mean probability",)
    kept = predictions.read(tmp_path)
    assert kept.row.tolist() == [18, 21, 24, 29]
    np.testing.assert_allclose(kept.scores[[0, 3], 1], [0.5, 0.2], atol=1e-6)


# Masks.

DEPTH = 4
ANNOTATED = (1, 2)  # the slices of a volume that have a mask


class Draws:
    """In the place of a network: what is brighter than 100 is class 1."""

    def __init__(self) -> None:
        self.head = SimpleNamespace(kind="mask", metrics=lambda: ("dice",))
        self.seen = 0

    def __call__(self, images: Iterable[tuple[Pixels, Intensity]]) -> Iterator[Answer]:
        for pixels, _ in images:
            self.seen += 1
            yield Answer(np.empty(0, np.float32), np.empty(0), (pixels > 100).astype(np.uint8))


def half_masked(path: Path, annotated: tuple[int, ...] = ANNOTATED) -> tuple[Store, np.ndarray, np.ndarray]:
    """Three volumes with masks on some slices, truth and pixels being the same in each: (D, H, W)."""
    stream = np.random.default_rng(0)
    pixels = np.where(stream.random((DEPTH, 12, 10)) < 0.4, 200, 20).astype(np.uint8)
    truth = (stream.random(pixels.shape) < 0.4).astype(np.uint8)
    scans = [
        NewScan(pixels, Intensity(0, 255, 128, 64), f"{number:064x}", kind="volume", spacing=(5.0, 0.5, 2.0))
        for number in range(3)
    ]
    split = np.repeat(np.array([splits.TRAIN, splits.VAL, splits.TEST], np.uint8), DEPTH)
    store = stores.write_store(path, scans, [f"{number:032x}" for number in range(3)], modality="mri", split=split)
    kept = [(volume * DEPTH + number, truth[number]) for volume in range(3) for number in annotated]
    annotate(store.path, masks=kept, mask_classes=("dark", "bright"))
    return Store(path), truth[list(annotated)], pixels[list(annotated)]


def dice_of(truth: np.ndarray, found: np.ndarray) -> float:
    return float(2 * (truth & found).sum() / (truth.sum() + found.sum()))


def test_a_volume_with_masks_on_some_slices_is_judged_by_these(tmp_path: Path) -> None:
    store, truth, pixels = half_masked(tmp_path / "store")
    applied = Draws()
    scorer = MaskScorer(task(store, masks(store)), applied)
    expected = dice_of(truth, (pixels > 100).astype(np.uint8))
    assert scorer.val() == pytest.approx(expected)
    assert applied.seen == len(ANNOTATED), "slices without a mask are not even looked at"
    tested = scorer.test(tmp_path)
    assert tested.overall["dice"][0] == pytest.approx(expected)
    assert tested.unit == "mm"
    kept = overlap.read(tmp_path)
    assert kept.row.tolist() == [2], "the scan's number"
    assert kept.dice.shape == (1, 2)
    assert np.isfinite(kept.hd95[0, 1])


def test_a_volume_with_one_mask_is_still_a_volume(tmp_path: Path) -> None:
    store, truth, pixels = half_masked(tmp_path / "store", annotated=(2,))
    tested = MaskScorer(task(store, masks(store)), Draws()).test(tmp_path)
    assert tested.overall["dice"][0] == pytest.approx(dice_of(truth, (pixels > 100).astype(np.uint8)))
    assert tested.unit == "mm"
