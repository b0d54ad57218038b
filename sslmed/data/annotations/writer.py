"""Writing labels, masks and boxes into a store: all of them appear at once, or none.

Every file of a generation has a name of its own and is flushed before ``store.json``, which names it, is replaced: that
is the commit. Files that no ``store.json`` names any more go afterwards; those that a killed writer left go first.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, DiskError, TemporaryError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.format import NAMES, VALUES
from sslmed.data.annotations.label_columns import merged_labels, merged_meta
from sslmed.data.annotations.mask_values import Present, legend
from sslmed.data.annotations.reader import Annotations
from sslmed.data.shards.format import INDEX_H5, STORE_JSON, LabelColumn, MetaColumn, digest, read_about
from sslmed.data.shards.hdf5 import chunk_filters, h5_bytes, new_h5, read_column
from sslmed.durable import sync_folder, write_flushed, write_json

MASK_SHARD_BYTES = 2**28  # of masks before compression; a shard is built in memory

Mask = npt.NDArray[np.uint8]


def annotate(
    folder: Path,
    *,
    labels: Sequence[tuple[LabelColumn, npt.NDArray[np.int16]]] = (),
    meta: Sequence[tuple[MetaColumn, npt.NDArray[Any]]] = (),
    masks: Iterable[tuple[int, Mask]] | None = None,
    mask_classes: Sequence[str] = (),
    boxes: Mapping[int, Boxes] | None = None,
    box_classes: Sequence[str] = (),
    replace: bool = False,
    names: Sequence[str] | None = None,
    shard_bytes: int = MASK_SHARD_BYTES,
) -> dict[str, Any]:
    """Add labels, masks and boxes to a store. What it has already stays, pixels are not touched.

    A blank cell, a row without a mask and a row without boxes change nothing. Killed at any point it leaves the old
    annotations or the new ones.

    Args:
        folder: a whole store.
        labels, meta: columns with a value for every row, -1 (NaN) where blank.
        masks: rows with masks (H, W) that hold the values of the mask files; taken one at a time. An error that it
            raises leaves the store as it was.
        mask_classes: names of the values 0, 1, ...; "" of the values themselves.
        boxes: by row, their class numbers being positions in ``box_classes``; none in a `Boxes` is a negative.
        replace: let what comes take the place of what is there, where they differ.
        names: what to call the rows in messages, such as file names.
        shard_bytes: greatest size of one file of masks before compression, unless one mask is larger.

    Returns:
        What ``store.json`` says now.

    Raises:
        DataError: something other is there already, or masks and names do not go together.
        TemporaryError: another process annotates this store.
        DiskError: disk full, read-only or an I/O error.
    """
    with _disk_errors(folder), _exclusive(folder):
        about = read_about(folder)
        shapes = np.stack([read_column(folder / INDEX_H5, side) for side in ("height", "width")], 1).astype(np.int64)
        old = Annotations(folder, about, len(shapes))
        _sweep(folder, old)
        try:
            new = _Generation(folder, old, shapes, names or [f"row {row}" for row in range(len(shapes))], replace)
            part = dict(new.columns(labels, meta), generation=new.number)
            part["masks"] = new.masks(masks, mask_classes, shard_bytes)
            part["boxes"] = new.boxes(boxes, box_classes)
            old.close()
            about["annotations"] = part
            about["digest"] = digest(about)
            Annotations(folder, about, len(shapes))  # what was written can be read
            sync_folder(folder)
            write_json(folder / STORE_JSON, about)
        finally:
            _sweep(folder, Annotations(folder, read_about(folder), len(shapes), verify=False))
    return about


class _Generation:
    """The files of one more annotation of a store."""

    def __init__(
        self, folder: Path, old: Annotations, shapes: npt.NDArray[np.int64], names: Sequence[str], replace: bool
    ) -> None:
        self.number = old.generation + 1
        self._folder, self._old, self._shapes, self._names, self._replace = folder, old, shapes, names, replace

    def columns(
        self,
        labels: Sequence[tuple[LabelColumn, npt.NDArray[np.int16]]],
        meta: Sequence[tuple[MetaColumn, npt.NDArray[Any]]],
    ) -> dict[str, Any]:
        old = self._old
        known = [(column, old.target(name).astype(np.int16)) for name, column in old.labels.items()]
        told = [(column, old.meta(name)) for name, column in old.meta_columns.items()]
        all_labels = merged_labels(known, labels, self._names, self._replace)
        all_meta = merged_meta(told, meta, self._names, self._replace)
        arrays = {f"label_{number:03d}": values for number, (_, values) in enumerate(all_labels)}
        arrays |= {f"meta_{number:03d}": values for number, (_, values) in enumerate(all_meta)}
        if any(array.shape != (len(self._shapes),) for array in arrays.values()):
            raise ValueError(f"a column does not have {len(self._shapes)} rows")
        entry = self._write(f"labels-{self.number}.h5", arrays) if arrays else {"file": None, "sha256": None}
        plain = {"labels": [_plain(column) for column, _ in all_labels], "meta": [_plain(c) for c, _ in all_meta]}
        return {**plain, **entry}

    def masks(
        self, masks: Iterable[tuple[int, Mask]] | None, classes: Sequence[str], shard_bytes: int
    ) -> dict[str, Any] | None:
        old, before = self._old, self._old.about("masks")
        if masks is None:
            return before
        place = old.mask_places()
        fresh = np.zeros(len(self._shapes), bool)
        shards = _MaskShards(self._folder, self.number, before, shard_bytes)
        for row, mask in masks:
            if mask.dtype != np.uint8 or mask.shape != tuple(self._shapes[row]):
                raise ValueError(f"{self._names[row]}: mask {mask.dtype} {mask.shape}, not {tuple(self._shapes[row])}")
            if place["shard"][row] >= 0 and not self._is_new(row, mask):
                continue
            fresh[row] = True
            place["shard"][row], place["group"][row], place["row"][row] = shards.add(mask)
            present = np.bincount(mask.reshape(-1), minlength=VALUES) > 0
            place["present"][row] = np.packbits(present, bitorder="little")
        shards.close()
        if not (place["shard"] >= 0).any():
            return None
        found = legend(_values(place, fresh), _values(place, ~fresh), old.legend, classes, self._replace)
        kept, place["shard"] = shards.kept(place["shard"])
        entry = self._write(f"masks-{self.number}.h5", place)
        about = {"classes": list(found.classes), "values": list(found.values), "named": found.named}
        return {**about, "shards": kept, "groups": shards.groups, **entry}

    def boxes(self, boxes: Mapping[int, Boxes] | None, classes: Sequence[str]) -> dict[str, Any] | None:
        old = self._old
        if boxes is None:
            return old.about("boxes")
        every = sorted({*old.box_classes, *classes})
        earlier, given = _renumber(old.box_classes, every), _renumber(classes, every)
        count = np.full(len(self._shapes), -1, np.int32)
        corners: list[npt.NDArray[np.float32]] = [np.empty((0, 4), np.float32)]
        numbers: list[npt.NDArray[np.int16]] = [np.empty(0, np.int16)]
        for row in range(len(self._shapes)):
            there, came = old.boxes(row), boxes.get(row)
            if there is not None:
                there = Boxes(there.xyxy, earlier[there.classes])
            if came is not None:
                came = Boxes(came.xyxy, given[came.classes])
                self._check_boxes(row, came, there)
            chosen = came if came is not None else there
            if chosen is not None:
                count[row] = len(chosen)
                corners.append(chosen.xyxy)
                numbers.append(chosen.classes)
        arrays: dict[str, npt.NDArray[Any]] = {
            "count": count,
            "xyxy": np.concatenate(corners),
            "class": np.concatenate(numbers),
        }
        entry = self._write(f"boxes-{self.number}.h5", arrays)
        return {"classes": every, "count": len(arrays["class"]), **entry}

    def _is_new(self, row: int, mask: Mask) -> bool:
        """Whether a mask differs from the one that is there, and may take its place."""
        height, width = self._shapes[row]
        there = self._old.raw_mask(row, (int(height), int(width)))
        if there is not None and np.array_equal(there, mask):
            return False
        if not self._replace:
            raise DataError(
                f"{self._names[row]} has another mask already. Give --replace to put this one in its place."
            )
        return True

    def _check_boxes(self, row: int, came: Boxes, there: Boxes | None) -> None:
        height, width = self._shapes[row]
        if len(came) and (
            not (came.xyxy >= 0).all()
            or not (came.xyxy <= (width, height, width, height)).all()
            or not (came.xyxy[:, :2] < came.xyxy[:, 2:]).all()
        ):
            raise ValueError(f"{self._names[row]}: boxes outside the image, or without area")
        if there is None or self._replace:
            return
        if not (np.array_equal(came.xyxy, there.xyxy) and np.array_equal(came.classes, there.classes)):
            raise DataError(f"{self._names[row]} has other boxes already. Give --replace to put these in their place.")

    def _write(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        with new_h5(name) as file:
            for column, values in arrays.items():
                file.create_dataset(column, data=np.ascontiguousarray(values))
            content = h5_bytes(file)
        return _write(self._folder / name, content)


class _MaskShards:
    """Files of masks, one open at a time."""

    def __init__(self, folder: Path, generation: int, before: Mapping[str, Any] | None, most: int) -> None:
        self._folder, self._generation, self._most = folder, generation, most
        self._shards = list(before["shards"]) if before else []
        self.groups = list(before["groups"]) if before else []
        self._numbers = {group: number for number, group in enumerate(self.groups)}
        self._new, self._bytes = 0, 0
        self._file: Any = None
        self._datasets: dict[str, Any] = {}

    def add(self, mask: Mask) -> tuple[int, int, int]:
        """Shard, group and row of a mask that was added."""
        if self._bytes and self._bytes + mask.nbytes > self._most:
            self.close()
        if self._file is None:
            self._file = new_h5(self._name())
        group = "{}x{}".format(*mask.shape)
        if group not in self._datasets:
            sizes = {"shape": (0, *mask.shape), "maxshape": (None, *mask.shape), "chunks": (1, *mask.shape)}
            self._datasets[group] = self._file.create_dataset(group, **sizes, dtype=np.uint8, **chunk_filters())
        dataset = self._datasets[group]
        row = int(dataset.shape[0])
        dataset.resize(row + 1, axis=0)
        dataset[row] = mask
        self._bytes += mask.nbytes
        if group not in self._numbers:
            self._numbers[group] = len(self.groups)
            self.groups.append(group)
        return len(self._shards), self._numbers[group], row

    def close(self) -> None:
        """Write the open shard."""
        if self._file is None:
            return
        content = h5_bytes(self._file)
        self._file.close()
        self._file, self._datasets, self._bytes = None, {}, 0
        self._shards.append({**_write(self._folder / self._name(), content), "bytes": len(content)})
        self._new += 1

    def kept(self, shard: npt.NDArray[np.int32]) -> tuple[list[Any], npt.NDArray[np.int32]]:
        """The shards in which a row still lies, and their numbers among these for each row, (N,)."""
        used = np.unique(shard[shard >= 0])
        numbers = np.full(len(self._shards) + 1, -1, np.int32)
        numbers[used] = np.arange(len(used))
        return [self._shards[number] for number in used], numbers[shard]

    def _name(self) -> str:
        return f"masks-{self._generation}-{self._new:05d}.h5"


def _values(place: Mapping[str, npt.NDArray[Any]], rows: npt.NDArray[np.bool_]) -> Present:
    return np.unpackbits(np.bitwise_or.reduce(place["present"][rows], axis=0), bitorder="little").astype(bool)


def _renumber(old: Sequence[str], new: Sequence[str]) -> npt.NDArray[np.int16]:
    return np.array([new.index(name) for name in old], np.int16)


def _plain(column: LabelColumn | MetaColumn) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(column).items()}


def _sweep(folder: Path, current: Annotations) -> None:
    """Remove what looks like a file of annotations and counts for nothing."""
    counts = set(current.files())
    for file in folder.iterdir():
        ours = any(pattern.fullmatch(file.name) for pattern in NAMES) or file.match(f".{STORE_JSON}.*.partial")
        if ours and file.name not in counts:
            file.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> dict[str, Any]:
    write_flushed(path, content)
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Hold the store; a killed process lets go of it."""
    try:
        lock = os.open(folder / INDEX_H5, os.O_RDWR)  # the one file that is never replaced
    except FileNotFoundError:
        yield  # no store: whoever reads it says so
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise TemporaryError(f"another process is writing labels of {folder}. Wait for it, or end it.") from error
    finally:
        os.close(lock)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write labels into {folder}: {error.strerror or error}. What was there before is untouched."
        ) from error
