"""The rows that are shown come from every split and shape, and of volumes from where there is something."""

from pathlib import Path

import numpy as np
import pytest
from stores import picture, write_store

from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.previews.spread import choose
from sslmed.data.shards.tables import NewScan
from sslmed.data.splits import SPLITS
from sslmed.data.store import Store


def pictures(path: Path, shapes: list[tuple[int, int]], split: list[str]) -> Store:
    scans = [picture(np.full(shape, number, np.uint8), f"{number:064x}") for number, shape in enumerate(shapes)]
    sides = np.array([SPLITS.index(name) for name in split], np.uint8)
    return write_store(path, scans, [f"{number:032x}" for number in range(len(scans))], split=sides)


def volumes(path: Path, depths: list[int]) -> Store:
    scans = [
        NewScan(
            np.full((depth, 20, 20), number, np.int16),
            Intensity(0, 9, 4, 2),
            f"{number:064x}",
            "volume",
            (20, 20),
            (3.0, 1.0, 1.0),
        )
        for number, depth in enumerate(depths)
    ]
    return write_store(path, scans, [f"{number:032x}" for number in range(len(scans))], modality="mri")


def test_rare_splits_and_shapes_are_shown(tmp_path: Path) -> None:
    shapes, split = [(20, 20)] * 40, ["train"] * 40
    shapes[17], split[23], split[31] = (20, 30), "val", "test"
    store = pictures(tmp_path / "store", shapes, split)
    for seed in range(5):
        assert {17, 23, 31} < set(choose(store, 5, seed))
        assert len(set(choose(store, 5, seed))) == 5


def test_the_seed_decides(tmp_path: Path) -> None:
    store = pictures(tmp_path / "store", [(20, 20)] * 40, ["train"] * 40)
    assert choose(store, 6, 0) == choose(store, 6, 0) == sorted(choose(store, 6, 0))
    assert len({tuple(choose(store, 6, seed)) for seed in range(5)}) == 5


def test_no_more_than_there_are(tmp_path: Path) -> None:
    store = pictures(tmp_path / "store", [(20, 20)] * 3, ["train"] * 3)
    assert choose(store, 10, 0) == [0, 1, 2]


@pytest.mark.parametrize(("count", "expected"), [(1, [5]), (3, [2, 5, 7]), (20, list(range(10)))])
def test_slices_of_one_volume_are_spread(count: int, expected: list[int], tmp_path: Path) -> None:
    assert choose(volumes(tmp_path / "store", [10]), count, 0) == expected


def test_many_volumes_give_their_middle(tmp_path: Path) -> None:
    store = volumes(tmp_path / "store", [10, 20, 30])
    assert choose(store, 3, 0) == [5, 20, 45]
    assert len(choose(store, 5, 0)) == 5


def test_slices_with_a_class_come_first(tmp_path: Path) -> None:
    store = volumes(tmp_path / "store", [10])
    masks = [(row, np.full((20, 20), 1 if row == 8 else 0, np.uint8)) for row in range(10)]
    annotate(store.path, masks=masks)
    assert choose(Store(store.path), 1, 0) == [8]
