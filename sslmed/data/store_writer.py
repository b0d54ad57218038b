"""Writing a store: built in a hidden folder beside the target, renamed at the end, so that it is whole or absent."""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sslmed import __version__
from sslmed.config import DataError, DiskError, OutputExistsError, TemporaryError
from sslmed.data.hdf5 import chunk_filters, h5_bytes, new_h5
from sslmed.data.splits import SPLITS
from sslmed.data.store_format import INDEX_H5, SCHEMA, STORE_JSON, Index, LabelColumn, MetaColumn, digest, group_name
from sslmed.durable import write_json

SHARD_BYTES = 2**29  # a shard is built in memory, and is there twice while it goes to the disk

_ROW = np.dtype(
    [
        ("patient", "S32"),
        ("split", "u1"),
        ("shard", "u2"),
        ("group", "u4"),
        ("row", "u4"),
        ("height", "u4"),
        ("width", "u4"),
        ("channels", "u1"),
        ("dtype", "S8"),
        ("low", "f4"),
        ("high", "f4"),
        ("content", "S64"),
    ]
)


class StoreWriter:
    """Adds images one by one, in the order of their rows; `finish` makes the store appear at ``target``.

    Use it as a context manager: leaving it without `finish` removes what was written. A killed process leaves a hidden
    ``.NAME.partial-…`` folder, which the next writer of that target removes.

    Args:
        target: the store's folder, which must not exist.
        modality: name of the modality of every image.
        key_id: id of the site key that hid the patients.
        shard_bytes: no shard holds more pixel bytes (before compression) than this, unless one image does.

    Raises:
        OutputExistsError: ``target`` exists.
        TemporaryError: another process is writing the same target.
        DiskError: disk full, read-only or an I/O error, here or in any method.
    """

    def __init__(self, target: Path, *, modality: str, key_id: str, shard_bytes: int = SHARD_BYTES) -> None:
        self.target = target.absolute()
        self.modality, self._key_id, self._shard_bytes = modality, key_id, shard_bytes
        self._rows = np.zeros(1024, _ROW)
        self._count = 0
        self._groups: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._datasets: dict[str, Any] = {}  # of the open shard
        self._bytes = 0
        refuse_existing(self.target)
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            self._partial = self.target.with_name(f".{self.target.name}.partial-{uuid.uuid4().hex[:8]}")
            self._partial.mkdir()
            # Held while this process lives: it tells folders in use from those that a killed process left.
            self._lock = os.open(self._partial, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._file.close()
        os.close(self._lock)
        shutil.rmtree(self._partial, ignore_errors=True)  # renamed away when `finish` was reached

    def __len__(self) -> int:
        return self._count

    def add(self, pixels: npt.NDArray[Any], *, patient: str, low: float, high: float, content: str) -> int:
        """Append one image, (H, W) or (H, W, 3), with its keyed patient, intensity range and keyed content digest.

        Returns:
            Its row.
        """
        if len(patient) > _ROW["patient"].itemsize or len(content) > _ROW["content"].itemsize:
            raise ValueError(f"patient {patient!r} or content {content!r} is no keyed digest")
        group = group_name(pixels.dtype, pixels.shape)
        with disk_errors(self.target):
            place = self._append(group, pixels)
        if self._count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        height, width, channels = (*pixels.shape, 1)[:3]
        number = self._groups.setdefault(group, len(self._groups))
        self._rows[self._count] = (
            patient.encode(),
            SPLITS.index("unlabelled"),
            len(self._shards),
            number,
            place,
            height,
            width,
            channels,
            pixels.dtype.name.encode(),
            low,
            high,
            content.encode(),
        )
        self._count += 1
        return self._count - 1

    def column(self, name: str) -> npt.NDArray[Any]:
        """What the index will hold so far under ``name``."""
        return self._rows[name][: self._count]

    def finish(
        self,
        *,
        split: npt.NDArray[np.uint8],
        split_digest: str,
        labels: Sequence[tuple[LabelColumn, npt.NDArray[np.int16]]] = (),
        meta: Sequence[tuple[MetaColumn, npt.NDArray[Any]]] = (),
    ) -> dict[str, Any]:
        """Write index and ``store.json``, flush everything to the disk and rename the folder to its target.

        Args:
            split: position in SPLITS of every row, (N,).
            split_digest: digest of who is on which side.
            labels: columns with the class number of every row, -1 without label.
            meta: columns with float64 numbers (NaN blank) or int32 positions in the categories (-1 blank).

        Returns:
            The content of ``store.json``.
        """
        if self._count == 0:
            raise DataError(f"no image to write to {self.target}.")
        self._rows["split"][: self._count] = split
        with disk_errors(self.target):
            self._close_shard()
            index_digest = self._write_index([column for _, column in labels], [column for _, column in meta])
            about = self._about(split_digest, [column for column, _ in labels], [column for column, _ in meta])
            about["index"] = {"file": INDEX_H5, "sha256": index_digest}
            about["digest"] = digest(about)
            write_json(self._partial / STORE_JSON, about)
            _flush(self._partial)
            refuse_existing(self.target)
            self._partial.rename(self.target)
            _flush(self.target.parent)
        return about

    # Machinery.

    def _append(self, group: str, pixels: npt.NDArray[Any]) -> int:
        if self._bytes + pixels.nbytes > self._shard_bytes:
            self._close_shard()
        if self._file is None:
            self._file = new_h5(self._shard_name())
        if group not in self._datasets:
            sizes = {"shape": (0, *pixels.shape), "maxshape": (None, *pixels.shape), "chunks": (1, *pixels.shape)}
            self._datasets[group] = self._file.create_dataset(group, **sizes, dtype=pixels.dtype, **chunk_filters())
        dataset = self._datasets[group]
        place = int(dataset.shape[0])
        dataset.resize(place + 1, axis=0)
        dataset[place] = pixels
        self._bytes += pixels.nbytes
        return place

    def _shard_name(self) -> str:
        return f"shard-{len(self._shards):05d}.h5"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        content = h5_bytes(self._file)
        self._file.close()
        self._file, self._datasets, self._bytes = None, {}, 0
        name = self._shard_name()
        _write(self._partial / name, content)
        self._shards.append({"file": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)})

    def _write_index(self, labels: list[npt.NDArray[Any]], meta: list[npt.NDArray[Any]]) -> str:
        columns = {field.name: self.column(field.name) for field in fields(Index)}
        columns |= {f"label_{number:03d}": column for number, column in enumerate(labels)}
        columns |= {f"meta_{number:03d}": column for number, column in enumerate(meta)}
        with new_h5(INDEX_H5) as file:
            for name, column in columns.items():
                if column.shape != (self._count,):
                    raise ValueError(f"column {name} has shape {column.shape}, not ({self._count},)")
                file.create_dataset(name, data=np.ascontiguousarray(column))
            content = h5_bytes(file)
        _write(self._partial / INDEX_H5, content)
        return hashlib.sha256(content).hexdigest()

    def _about(self, split_digest: str, labels: list[LabelColumn], meta: list[MetaColumn]) -> dict[str, Any]:
        split = self.column("split")
        return {
            "schema": SCHEMA,
            "sslmed": __version__,
            "modality": self.modality,
            "key_id": self._key_id,
            "split_digest": split_digest,
            "images": self._count,
            "patients": len(np.unique(self.column("patient"))),
            "splits": {name: int((split == number).sum()) for number, name in enumerate(SPLITS)},
            "labels": [_plain(column) for column in labels],
            "meta": [_plain(column) for column in meta],
            "groups": list(self._groups),
            "shards": self._shards,
        }

    def _remove_stale(self) -> None:
        for stale in self.target.parent.glob(f".{glob.escape(self.target.name)}.partial-*"):
            lock = os.open(stale, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise TemporaryError(f"another sslmed is writing {self.target} now. Wait for it, or end it.") from error
            finally:
                os.close(lock)
            shutil.rmtree(stale, ignore_errors=True)


def refuse_existing(target: Path) -> None:
    """Raise OutputExistsError when there is anything at ``target``."""
    if target.exists() or target.is_symlink():
        raise OutputExistsError(
            f"{target} exists and a store is never overwritten. Give another --out, or remove it first."
        )


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what the system raises while writing into a DiskError that names ``target``."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror or error}. Nothing was left behind.") from error


def _plain(column: LabelColumn | MetaColumn) -> Mapping[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(column).items()}


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
