"""What is learnt from whom, and what is refused before anything is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores

from sslmed.config import DataError, UsageError
from sslmed.data import splits
from sslmed.data.shards.format import LabelColumn
from sslmed.data.store import Store
from sslmed.recipe import FinetuneRecipe, load_finetune
from sslmed.supervised.task import target_of, task_of


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.write_shapes(tmp_path_factory.mktemp("task") / "store")


def recipe(*overrides: str, name: str = "xray/segmentation") -> FinetuneRecipe:
    return load_finetune(name, ("data.size=32", *overrides))


def test_masks_are_what_segmentation_learns(shapes: Store) -> None:
    task = task_of(recipe(), shapes, 1)
    assert (task.target.kind, task.target.classes) == ("mask", stores.SHAPES)
    assert [len(rows) for rows in (task.train, task.val, task.test)] == [12, 6, 6]
    assert task.shrunk_to is None


@pytest.mark.parametrize("budget", ["k=5", "50%"])
def test_a_budget_of_masks_counts_patients_in_all(budget: str, shapes: Store) -> None:
    task = task_of(recipe(f"labels.budget={budget}"), shapes, 1)
    assert len(task.train) == task.patients(task.train) == {"k=5": 5, "50%": 6}[budget]
    assert set(task.train) <= set(shapes.rows("train"))


def test_draws_of_one_seed_are_nested_and_of_another_differ(shapes: Store) -> None:
    rows = {
        (budget, seed): set(task_of(recipe(f"labels.budget={budget}", f"labels.seed={seed}"), shapes, 1).train)
        for budget in ("k=3", "k=6")
        for seed in (0, 1)
    }
    assert rows["k=3", 0] < rows["k=6", 0]
    assert rows["k=6", 0] != rows["k=6", 1]


def test_labels_name_no_masks(shapes: Store) -> None:
    with pytest.raises(UsageError, match=r"data\.target .* segmentation learns the store's masks"):
        target_of(recipe("data.target=finding"), shapes)


def test_a_store_without_masks(phantom_store: Store) -> None:
    with pytest.raises(DataError, match="has no masks; add some: sslmed label"):
        task_of(recipe(), phantom_store, 1)


def without(label: int, *sides: int) -> Any:
    """Masks without a class on some sides of the split."""
    place = (splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST)
    return lambda patient, mask: (
        np.where(mask == label, 0, mask).astype(np.uint8) if place[patient % 4] in sides else mask
    )


def test_a_class_that_training_never_shows(tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store", mask_of=without(2, splits.TRAIN))
    with pytest.raises(DataError, match="train patients never show bar of 'masks', but val or test patients"):
        task_of(recipe(), store, 1)


def test_a_class_that_nobody_shows_is_no_error(tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store", mask_of=without(2, splits.TRAIN, splits.VAL, splits.TEST))
    assert task_of(recipe(), store, 1).target.classes == stores.SHAPES


@pytest.mark.parametrize(("side", "words"), [(2, "no val patient .* has a mask"), (3, "no test patient .* has a mask")])
def test_a_side_without_masks(side: int, words: str, tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store", mask_of=lambda patient, mask: None if patient % 4 == side else mask)
    with pytest.raises(DataError, match=words):
        task_of(recipe(), store, 1)


def test_val_masks_that_show_nothing(tmp_path: Path) -> None:
    empty = lambda patient, mask: mask * 0 if patient % 4 == 2 else mask  # noqa: E731
    store = stores.write_shapes(tmp_path / "store", mask_of=empty)
    with pytest.raises(DataError, match=r"val patients .* show no class but background"):
        task_of(recipe(), store, 1)


def test_images_smaller_than_a_tile(shapes: Store) -> None:
    with pytest.raises(DataError, match=r"smaller than a tile of 64 x 64 pixels \(such as 40 x 48\)"):
        task_of(recipe("data.size=64", "head.input=tiles"), shapes, 1)
    assert task_of(recipe("head.input=tiles"), shapes, 1).tiles


def findings(path: Path, values: dict[str, list[int]]) -> Store:
    count = len(next(iter(values.values())))
    scans = [stores.picture(np.full((40, 40), number, np.uint8), f"{number:064x}") for number in range(count)]
    split = np.array([(splits.TRAIN, splits.VAL, splits.TEST)[number % 3] for number in range(count)], np.uint8)
    labels = [(LabelColumn(name, "binary", ("0", "1")), np.array(each, np.int16)) for name, each in values.items()]
    return stores.write_store(path, scans, [f"{number:032x}" for number in range(count)], split=split, labels=labels)


def test_several_findings_are_learnt_together(tmp_path: Path) -> None:
    values = {"edema": [0, 0, 1, 1, 1, 0, -1, 0, 0], "mass": [1, 0, 1, 0, 1, 0, -1, -1, -1]}
    store = findings(tmp_path / "store", values)
    task = task_of(recipe(name="xray/classification"), store, 1)
    assert (task.target.kind, task.target.name) == ("findings", "edema, mass")
    assert sorted(task.train) == [0, 3]  # of row 6 nothing is known


def test_a_finding_that_training_never_shows(tmp_path: Path) -> None:
    store = findings(tmp_path / "store", {"edema": [0, 0, 1, 1, 1, 0], "mass": [0, 1, 1, 0, 0, 0]})
    with pytest.raises(DataError, match="never show mass of 'edema, mass'"):
        task_of(recipe(name="xray/classification"), store, 1)
