import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from stores import picture, write_store

from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.writer import annotate
from sslmed.data.shards.format import STORE_JSON, LabelColumn, MetaColumn, digest
from sslmed.data.store import Store

ROWS = 6
SHAPES = [(8, 6), (8, 6), (5, 7), (8, 6), (5, 7), (8, 6)]


def mask(row: int, values: int = 3) -> np.ndarray:
    return np.random.default_rng(row).integers(0, values, SHAPES[row]).astype(np.uint8)


def boxes(*rows: tuple[float, ...]) -> Boxes:
    corners = np.array([row[:4] for row in rows], np.float32).reshape(-1, 4)
    return Boxes(corners, np.array([row[4] for row in rows], np.int16))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Six images, not annotated yet."""
    scans = [picture(np.full(shape, row, np.uint8), f"{row:064x}") for row, shape in enumerate(SHAPES)]
    return write_store(tmp_path / "store", scans, [f"{row:032x}" for row in range(ROWS)]).path


def annotated(store: Path) -> Store:
    annotate(
        store,
        labels=[(LabelColumn("kind", "class", ("a", "b")), np.array([0, 1, -1, 0, 1, 1], np.int16))],
        meta=[(MetaColumn("age", "number"), np.array([1, 2, np.nan, 4, 5, 6.5]))],
        masks=((row, mask(row)) for row in (0, 2, 3)),
        mask_classes=("bg", "nerve", "vessel"),
        boxes={1: boxes((0, 0, 6, 8, 1), (1, 2, 3, 4.5, 0)), 4: boxes()},
        box_classes=("cat", "dog"),
    )
    return Store(store)


def test_what_was_written_is_read(store: Path) -> None:
    opened = annotated(store)
    assert opened.target("kind").tolist() == [0, 1, -1, 0, 1, 1]
    np.testing.assert_array_equal(opened.meta("age"), [1, 2, np.nan, 4, 5, 6.5])
    assert opened.mask_classes == ("bg", "nerve", "vessel")
    for row in range(ROWS):
        found = opened.mask(row)
        if row in (0, 2, 3):
            np.testing.assert_array_equal(found, mask(row))
        else:
            assert found is None
    assert opened.box_classes == ("cat", "dog")
    first = opened.boxes(1)
    assert first is not None
    assert first.xyxy.tolist() == [[0, 0, 6, 8], [1, 2, 3, 4.5]]
    assert first.classes.tolist() == [1, 0]
    negative = opened.boxes(4)
    assert negative is not None
    assert len(negative) == 0
    assert opened.boxes(0) is None
    assert opened.annotations.masked().tolist() == [True, False, True, True, False, False]
    assert opened.annotations.boxed().tolist() == [False, True, False, False, True, False]
    assert [column.tolist() for column in opened.annotations.every_box()] == [[1, 1], [1, 0]]
    presence = opened.annotations.mask_presence()
    assert presence.shape == (ROWS, 3)
    assert presence[2].tolist() == [value in mask(2) for value in range(3)]
    assert not presence[1].any()
    assert opened.verify() == []


def test_a_store_without_annotations(store: Path) -> None:
    opened = Store(store)
    assert (opened.mask(0), opened.boxes(0), opened.mask_classes, opened.box_classes) == (None, None, (), ())
    assert opened.labels == {}
    assert not opened.annotations.masked().any()
    assert opened.annotations.mask_presence().shape == (ROWS, 0)
    assert [len(column) for column in opened.annotations.every_box()] == [0, 0]


def test_255_is_the_foreground_or_void(store: Path) -> None:
    binary = np.where(mask(0) > 1, 255, 0).astype(np.uint8)
    annotate(store, masks=[(0, binary)])
    opened = Store(store)
    assert opened.mask_classes == ("0", "1")
    np.testing.assert_array_equal(opened.mask(0), binary // 255)
    void = mask(0)
    void[0] = 255
    annotate(store, masks=[(0, void)], replace=True)
    np.testing.assert_array_equal(Store(store).mask(0), void)
    assert Store(store).mask_classes == ("0", "1", "2")


def _read(store: Store) -> list[Any]:
    return [None if (found := store.mask(row)) is None else found.tolist() for row in range(ROWS)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_masks(store: Path, method: str) -> None:
    opened = annotated(store)
    here = _read(opened)  # its handles are open before the fork
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read, (opened,)) == here
    assert _read(pickle.loads(pickle.dumps(opened))) == here  # noqa: S301


def _group(part: dict[str, Any]) -> None:
    part["masks"]["groups"][0] = "../x"


TAMPERED: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("labels", lambda part: part.update(file="../labels-1.h5")),
    ("labels absolute", lambda part: part.update(file="/etc/passwd")),
    ("index as labels", lambda part: part.update(file="index.h5")),
    ("masks", lambda part: part["masks"].update(file="masks-1.h5/../../x")),
    ("shard", lambda part: part["masks"]["shards"][0].update(file="shard-00000.h5")),
    ("newline", lambda part: part["boxes"].update(file="boxes-1.h5\n")),
    ("boxes", lambda part: part["boxes"].update(file=["boxes-1.h5"])),
    ("digest", lambda part: part["boxes"].update(sha256="x")),
    ("group", _group),
    ("values", lambda part: part["masks"].update(values=[0, 1, 300])),
    ("bool values", lambda part: part["masks"].update(values=[False, True, 2])),
    ("classes", lambda part: part["masks"].update(classes="abc")),
    ("no masks", lambda part: part.pop("masks")),
    ("kind", lambda part: part["labels"][0].update(kind="evil")),
    ("twice", lambda part: part["labels"].append(part["labels"][0])),
    ("nothing", lambda part: part.clear()),
]


@pytest.mark.parametrize(("what", "change"), TAMPERED, ids=[what for what, _ in TAMPERED])
def test_tampered_names_are_refused(store: Path, what: str, change: Callable[[dict[str, Any]], Any]) -> None:
    annotated(store)
    about = json.loads((store / STORE_JSON).read_text())
    change(about["annotations"])
    about["digest"] = digest(about)
    (store / STORE_JSON).write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"store\.json is damaged: its annotations"):
        Store(store).labels  # noqa: B018


def test_damage_is_found(store: Path) -> None:
    annotated(store)
    (shard,) = store.glob("masks-1-0*.h5")
    content = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        chunk = file["8x6"].id.get_chunk_info(0)
    content[chunk.byte_offset + chunk.size // 2] ^= 1
    shard.write_bytes(content)
    opened = Store(store)
    with pytest.raises(DataError, match=r"masks-1-00000\.h5: the mask of sample 0 \(8x6\) cannot be read"):
        opened.mask(0)
    np.testing.assert_array_equal(opened.mask(2), mask(2))
    assert opened.annotations.verify() == ["masks-1-00000.h5: SHA-256 differs"]
    shard.unlink()
    assert opened.annotations.verify() == ["masks-1-00000.h5: missing"]
    (store / "labels-1.h5").write_bytes(b"x")
    assert Store(store).verify() == ["labels-1.h5: SHA-256 differs", "masks-1-00000.h5: missing"]
    with pytest.raises(DataError, match=r"is damaged: labels-1\.h5: SHA-256 differs"):
        Store(store).target("kind")


def test_a_mask_of_another_shape_is_refused_when_read(store: Path) -> None:
    opened = annotated(store)
    with pytest.raises(DataError, match=r"holds uint8 \(8, 6\), but the image has \(6, 8\)"):
        opened.annotations.mask(0, (6, 8))
