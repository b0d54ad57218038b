import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import picture, write_store

from sslmed import durable
from sslmed.config import DataError, DiskError, TemporaryError
from sslmed.data.annotations import writer as annotation_writer
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.writer import annotate
from sslmed.data.shards.format import STORE_JSON, LabelColumn, MetaColumn
from sslmed.data.shards.hdf5 import read_column
from sslmed.data.store import Store

ROWS, SHAPE = 5, (8, 6)


def mask(row: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([row, seed]).integers(0, 3, SHAPE).astype(np.uint8)


def label(name: str, *numbers: int) -> tuple[LabelColumn, np.ndarray]:
    return LabelColumn(name, "class", ("a", "b")), np.array(numbers, np.int16)


def one_box(left: float, number: int = 0) -> Boxes:
    return Boxes(np.array([[left, 0, 6, 8]], np.float32), np.array([number], np.int16))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    scans = [picture(np.full(SHAPE, row, np.uint8), f"{row:064x}") for row in range(ROWS)]
    path = write_store(tmp_path / "store", scans, [f"{row:032x}" for row in range(ROWS)]).path
    annotate(
        path,
        labels=[label("kind", 0, 1, -1, 0, -1)],
        masks=((row, mask(row)) for row in (0, 1)),
        boxes={0: one_box(1), 1: Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int16))},
        box_classes=("dog",),
    )
    return path


def files(store: Path) -> set[str]:
    return {path.name for path in store.iterdir()}


def pixels(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name.startswith(("shard", "index"))}


def test_pixels_and_index_stay_byte_for_byte_and_old_files_go(store: Path) -> None:
    before, fingerprint = pixels(store), Store(store).fingerprint
    annotate(store, labels=[label("other", 1, 1, 1, 1, 1)], masks=[(3, mask(3))])
    assert pixels(store) == before
    assert Store(store).fingerprint != fingerprint
    new = {"labels-2.h5", "masks-2.h5", "masks-2-00000.h5", "boxes-1.h5", "masks-1-00000.h5"}
    assert files(store) == {*before, STORE_JSON, *new}
    assert Store(store).verify() == []


def test_what_is_there_stays(store: Path) -> None:
    annotate(
        store,
        labels=[label("other", 1, 1, 1, 1, 1), label("kind", -1, -1, 1, -1, -1)],
        meta=[(MetaColumn("age", "number"), np.arange(5.0))],
        masks=[(3, mask(3))],
        boxes={2: one_box(2)},
        box_classes=("cat",),
    )
    opened = Store(store)
    assert opened.target("kind").tolist() == [0, 1, 1, 0, -1]
    assert list(opened.labels) == ["kind", "other"]
    for row in (0, 1, 3):
        np.testing.assert_array_equal(opened.mask(row), mask(row))
    assert opened.box_classes == ("cat", "dog")
    found = [opened.boxes(row) for row in range(3)]
    assert [each.classes.tolist() for each in found if each is not None] == [[1], [], [0]]
    annotate(store, labels=[label("kind", 0, 1, 1, 0, 0)])
    assert Store(store).target("kind").tolist() == [0, 1, 1, 0, 0]
    assert Store(store).mask(3) is not None
    assert Store(store).boxes(2) is not None


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ({"labels": [label("kind", 1, 1, 0, 0, 0)]}, r"label 'kind' already: 'a' of r0, not 'b'.*--replace"),
        ({"masks": [(1, mask(1, 9))]}, r"r1 has another mask already.*--replace"),
        ({"boxes": {0: one_box(3)}, "box_classes": ("dog",)}, r"r0 has other boxes already.*--replace"),
        ({"boxes": {0: one_box(1)}, "box_classes": ("cat",)}, r"r0 has other boxes already"),
    ],
)
def test_another_value_needs_replace(store: Path, what: dict[str, Any], why: str) -> None:
    names = [f"r{row}" for row in range(ROWS)]
    before, about = files(store), (store / STORE_JSON).read_bytes()
    with pytest.raises(DataError, match=f"(?s){why}"):
        annotate(store, names=names, **what)
    assert (files(store), (store / STORE_JSON).read_bytes()) == (before, about)
    annotate(store, names=names, replace=True, **what)
    opened = Store(store)
    assert opened.verify() == []
    if "labels" in what:
        assert opened.target("kind").tolist() == [1, 1, 0, 0, 0]
    if "masks" in what:
        np.testing.assert_array_equal(opened.mask(1), mask(1, 9))
        np.testing.assert_array_equal(opened.mask(0), mask(0))
    if "boxes" in what:
        assert opened.boxes(0) is not None


def test_the_same_again_changes_nothing_but_the_generation(store: Path) -> None:
    annotate(store, masks=[(0, mask(0)), (1, mask(1))], boxes={0: one_box(1)}, box_classes=("dog",))
    assert {"masks-1-00000.h5", "masks-2.h5"} <= files(store)
    assert "masks-2-00000.h5" not in files(store)
    assert Store(store).annotations.generation == 2


def test_shards_that_hold_nothing_any_more_go(store: Path) -> None:
    annotate(store, masks=((row, mask(row, 7)) for row in range(ROWS)), replace=True, shard_bytes=100)
    names = {name for name in files(store) if name.startswith("masks")}
    assert names == {"masks-2.h5", *(f"masks-2-{number:05d}.h5" for number in range(3))}  # two of 48 bytes each
    for row in range(ROWS):
        np.testing.assert_array_equal(Store(store).mask(row), mask(row, 7))


def test_errors_of_the_masks_leave_the_store_as_it_was(store: Path) -> None:
    def broken() -> Iterator[tuple[int, np.ndarray]]:
        yield 2, mask(2)
        raise DataError("a bad mask")

    before, about = files(store), (store / STORE_JSON).read_bytes()
    with pytest.raises(DataError, match="a bad mask"):
        annotate(store, labels=[label("new", 0, 0, 0, 0, 0)], masks=broken())
    assert (files(store), (store / STORE_JSON).read_bytes()) == (before, about)
    for wrong in (mask(2)[:5], mask(2).astype(np.int16)):
        with pytest.raises(ValueError, match="row 2: mask"):
            annotate(store, masks=[(2, wrong)])
    with pytest.raises(ValueError, match="row 2: boxes outside"):
        annotate(store, boxes={2: Boxes(np.array([[0, 0, 7, 8]], np.float32), np.zeros(1, np.int16))}, box_classes="x")


def test_masks_are_let_go_one_by_one(store: Path) -> None:
    taken: list[weakref.ref[np.ndarray]] = []

    def stream() -> Iterator[tuple[int, np.ndarray]]:
        for row in range(2, ROWS):
            assert all(earlier() is None for earlier in taken[:-1])
            one = mask(row)
            taken.append(weakref.ref(one))
            yield row, one

    annotate(store, masks=stream())
    assert len(taken) == 3


def test_two_at_once(store: Path) -> None:
    lock = os.open(store / "index.h5", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(TemporaryError, match="another process is writing labels"):
            annotate(store, labels=[label("new", 0, 0, 0, 0, 0)])
    finally:
        os.close(lock)
    annotate(store, labels=[label("new", 0, 0, 0, 0, 0)])


def test_a_full_disk(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> dict[str, Any]:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    before, about = files(store), (store / STORE_JSON).read_bytes()
    monkeypatch.setattr(annotation_writer, "_write", full)
    with pytest.raises(DiskError, match=r"No space left on device\. What was there before is untouched"):
        annotate(store, labels=[label("new", 0, 0, 0, 0, 0)])
    assert (files(store), (store / STORE_JSON).read_bytes()) == (before, about)


def _dying(step: Callable[..., Any], count: list[int], death: int) -> Callable[..., Any]:
    """``step``, in whose midst or before which the process is gone when its turn comes."""

    def wrapped(*given: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == death:
            if step is annotation_writer._write:
                given[0].write_bytes(given[1][: len(given[1]) // 2])
            os._exit(9)
        return step(*given, **named)

    return wrapped


def _annotate_and_die(store: Path, death: int) -> bool:
    """Whether a process that annotates is gone at its ``death``-th step; a kill runs no clean-up."""
    child = os.fork()
    if child == 0:
        try:
            count = [0]
            annotation_writer._write = _dying(annotation_writer._write, count, death)
            os.fsync, os.replace = _dying(os.fsync, count, death), _dying(os.replace, count, death)
            durable.json.dumps = _dying(durable.json.dumps, count, death)
            Path.unlink = _dying(Path.unlink, count, death)  # type: ignore[method-assign]
            annotate(
                store,
                labels=[label("new", 0, 1, 0, 1, 0)],
                masks=((row, mask(row, 5)) for row in range(ROWS)),
                boxes={4: one_box(4)},
                box_classes=("dog",),
                replace=True,
            )
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_killed_at_every_step_it_is_the_old_store_or_the_new(store: Path) -> None:
    old, before = Store(store).fingerprint, pixels(store)
    found = []
    for death in range(1, 100):
        gone = _annotate_and_die(store, death)
        opened = Store(store)
        assert opened.verify() == []
        is_new = opened.fingerprint != old
        assert list(opened.labels) == (["kind", "new"] if is_new else ["kind"])
        np.testing.assert_array_equal(opened.mask(1), mask(1, 5 if is_new else 0))
        assert (opened.boxes(4) is not None) == is_new
        assert pixels(store) == before
        found.append(is_new)
        if not gone or is_new:
            break
    assert found[-1]
    assert len(found) > 8  # there were that many places to die at
    annotate(store, labels=[label("last", 0, 0, 0, 0, 0)])  # what the killed one left goes
    named = {"labels-3.h5", "masks-2.h5", "masks-2-00000.h5", "boxes-2.h5", STORE_JSON}
    assert files(store) == {*before, *named}


def test_killed_after_the_commit(store: Path) -> None:
    for death in range(1, 100):
        if not _annotate_and_die(store, death):
            break
        fingerprint = Store(store).fingerprint
        assert Store(store).verify() == []
        Store(store).mask(0)
        assert len(fingerprint) == 64
    assert files(store) == {*pixels(store), STORE_JSON, *Store(store).annotations.files()}
    assert read_column(store / "index.h5", "height").tolist() == [8] * ROWS
