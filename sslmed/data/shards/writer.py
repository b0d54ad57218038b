"""Writing a store: built in a hidden folder beside the target, renamed at the end, so that it is whole or absent.

A writer that is killed leaves its finished shards, and beside them what is known of their images; the next writer of
the same target and plan goes on after them.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from sslmed import __version__
from sslmed.config import DataError, DiskError, OutputExistsError, TemporaryError
from sslmed.data.shards.format import (
    INDEX_H5,
    SCHEMA,
    STORE_JSON,
    Geometries,
    Index,
    ScanTable,
    digest,
    group_name,
    tile,
)
from sslmed.data.shards.hdf5 import chunk_filters, h5_bytes, new_h5
from sslmed.data.shards.progress import Part, Progress
from sslmed.data.shards.tables import NewScan, Tables
from sslmed.data.splits import SPLITS
from sslmed.durable import sync_folder, write_flushed, write_json

SHARD_BYTES = 2**28  # a shard is built in memory, is there twice while it goes to the disk, and is what a kill loses


class StoreWriter:
    """Adds scans one by one, in the order of their rows; `finish` makes the store appear at ``target``.

    Use it as a context manager. Leaving it without `finish` keeps what a later writer can go on with, if anything.

    Args:
        target: the store's folder, which must not exist.
        modality: name of the modality of every image.
        policy: what the store says of how pixels and intensities came about.
        key_id: id of the site key that hid the patients.
        shard_bytes: a shard is closed before it would hold more pixel bytes (before compression) than this; a scan is
            never parted.
        progress: a folder for what is known of finished shards, for their owner alone; without it a kill loses all.
        plan: digest of everything that decides what will be added; another plan starts again.

    Attributes:
        notes: of every scan added so far, those of an interrupted writer first.
        skips: likewise, what was given to `skip`.

    Raises:
        OutputExistsError: ``target`` exists.
        TemporaryError: another process is writing the same target.
        DiskError: disk full, read-only or an I/O error, here or in any method.
    """

    def __init__(
        self,
        target: Path,
        *,
        modality: str,
        key_id: str,
        policy: Mapping[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
        progress: Path | None = None,
        plan: str = "",
    ) -> None:
        self.target = target.absolute()
        self.modality, self._key_id, self._policy = modality, key_id, dict(policy or {})
        self._shard_bytes = shard_bytes
        self._tables = Tables()
        self._groups: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._datasets: dict[str, Any] = {}  # of the open shard
        self._bytes = 0
        self.notes: list[Any] = []
        self.skips: list[Any] = []
        self._progress = Progress(progress, plan) if progress is not None else None
        refuse_existing(self.target)
        with disk_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._partial = self.target.with_name(f".{self.target.name}.partial")
            self._partial.mkdir(mode=0o700, exist_ok=True)
            self._lock = _locked(self._partial, self.target)
            try:
                self._go_on()
            except BaseException:
                os.close(self._lock)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._file.close()
        os.close(self._lock)
        if not (self._shards and self._progress):  # also after `finish`, which has renamed the folder
            shutil.rmtree(self._partial, ignore_errors=True)
            if self._progress:
                self._progress.remove()

    @property
    def partial(self) -> Path:
        """The hidden folder in which the store comes about."""
        return self._partial

    def __len__(self) -> int:
        return len(self._tables.rows)

    def skip(self, note: Any) -> None:
        """Remember, through a kill, something that will not be in the store; plain JSON."""
        self.skips.append(note)

    def add(self, scan: NewScan) -> int:
        """Append a scan; the number of its first row."""
        tiled = scan.kind == "volume"
        images = scan.pixels if scan.kind != "image" else scan.pixels[None]
        name = group_name(images.dtype, images.shape[1:], tiled)
        with disk_errors(self.target):
            if self._bytes and self._bytes + images.nbytes > self._shard_bytes:
                self._close_shard()
            place = self._append(name, images, tiled)
        group = self._groups.setdefault(name, len(self._groups))
        self.notes.append(scan.note)
        return self._tables.add(scan, images, shard=len(self._shards), group=group, place=place)

    def column(self, name: str) -> npt.NDArray[Any]:
        """What the index will hold so far under ``name``."""
        return self._tables.rows.column(name)

    def shapes(self) -> npt.NDArray[np.uint32]:
        """(N, 2): height and width of every row."""
        return np.stack([self.column("height"), self.column("width")], axis=1)

    def scans(self, name: str) -> npt.NDArray[Any]:
        """What the table of scans will hold so far under ``name``."""
        return self._tables.scans.column(name)

    def complete(self) -> None:
        """All scans have been added: what fails from here on loses none of them."""
        with disk_errors(self.target):
            self._close_shard()

    def finish(self, *, patients: npt.NDArray[np.bytes_], split: npt.NDArray[np.uint8], split_digest: str) -> "Written":
        """Write index and ``store.json`` and flush everything to the disk.

        The store is whole then, in a hidden folder; leaving the context that is returned without an error renames it
        to its target, so that annotations can be added before anyone sees it.

        Args:
            patients: keyed patient of every row, (N,).
            split: position in SPLITS of every row, (N,).
            split_digest: digest of who is on which side.
        """
        if not len(self):
            raise DataError(f"no image to write to {self.target}.")
        self.column("patient")[:], self.column("split")[:] = patients, split
        with disk_errors(self.target):
            self._close_shard()
            for orphan in set(self._partial.iterdir()) - {self._partial / shard["file"] for shard in self._shards}:
                orphan.unlink()
            index_digest = self._write_index()
            about = self._about(split_digest)
            about["index"] = {"file": INDEX_H5, "sha256": index_digest}
            about["digest"] = digest(about)
            write_json(self._partial / STORE_JSON, about)
        return Written(self._partial, self._publish)

    # Machinery.

    def _publish(self) -> None:
        with disk_errors(self.target):
            self._partial.chmod(0o777 & ~_umask())
            sync_folder(self._partial)
            refuse_existing(self.target)
            self._partial.rename(self.target)
            sync_folder(self.target.parent)
        self._shards = []  # nothing is left to go on with

    def _go_on(self) -> None:
        """Take over the shards of an interrupted writer, if they are whole and of the same plan."""
        parts = self._progress.parts(self._partial) if self._progress else []
        for part in parts:
            self._tables.extend(part.rows, part.scans, part.geometries)
            self._groups |= {name: number for number, name in enumerate(part.groups)}
            self._shards.append(part.shard)
            self.notes += part.notes
            self.skips += part.skips
        if not parts and self._progress:
            self._progress.remove()
        if self._progress:
            self._progress.start()
        whole = {self._partial / shard["file"] for shard in self._shards}
        for stale in set(self._partial.iterdir()) - whole:
            stale.unlink()
        self._saved = self._counts()

    def _append(self, group: str, images: npt.NDArray[Any], tiled: bool) -> int:
        if self._file is None:
            self._file = new_h5(self._shard_name())
        if group not in self._datasets:
            shape = images.shape[1:]
            chunk = (1, tile(shape[0]), tile(shape[1]), *shape[2:]) if tiled else (1, *shape)
            sizes = {"shape": (0, *shape), "maxshape": (None, *shape), "chunks": chunk}
            self._datasets[group] = self._file.create_dataset(group, **sizes, dtype=images.dtype, **chunk_filters())
        dataset = self._datasets[group]
        place = int(dataset.shape[0])
        dataset.resize(place + len(images), axis=0)
        dataset[place:] = images
        self._bytes += images.nbytes
        return place

    def _counts(self) -> tuple[int, ...]:
        return (*self._tables.counts(), len(self.notes), len(self.skips))

    def _shard_name(self) -> str:
        return f"shard-{len(self._shards):05d}.h5"

    def _close_shard(self) -> None:
        if self._file is None:
            return
        content = h5_bytes(self._file)
        self._file.close()
        self._file, self._datasets, self._bytes = None, {}, 0
        name = self._shard_name()
        write_flushed(self._partial / name, content)
        shard = {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        if self._progress:
            rows, scans, geometries, notes, skips = self._saved
            tables = self._tables
            part = Part(
                shard,
                list(self._groups),
                tables.rows.all()[rows:],
                tables.scans.all()[scans:],
                tables.geometries.all()[geometries:],
                self.notes[notes:],
                self.skips[skips:],
            )
            self._progress.save(len(self._shards), part)
        self._shards.append(shard)
        self._saved = self._counts()

    def _write_index(self) -> str:
        rows, scans, geometries = self._tables.rows, self._tables.scans, self._tables.geometries
        tables = ((Index, rows, ""), (ScanTable, scans, "scan_"), (Geometries, geometries, "place_"))
        with new_h5(INDEX_H5) as file:
            for kind, table, prefix in tables:
                for field in fields(kind):
                    file.create_dataset(prefix + field.name, data=np.ascontiguousarray(table.column(field.name)))
            content = h5_bytes(file)
        write_flushed(self._partial / INDEX_H5, content)
        return hashlib.sha256(content).hexdigest()

    def _about(self, split_digest: str) -> dict[str, Any]:
        split = self.column("split")
        return {
            "schema": SCHEMA,
            "sslmed": __version__,
            "modality": self.modality,
            "policy": self._policy,
            "key_id": self._key_id,
            "split_digest": split_digest,
            "images": len(self),
            "scans": len(self._tables.scans),
            "patients": len(np.unique(self.column("patient"))),
            "splits": {name: int((split == number).sum()) for number, name in enumerate(SPLITS)},
            "groups": list(self._groups),
            "shards": self._shards,
        }


class Written:
    """A whole store in a hidden folder, ``folder``. Leaving its context without an error makes it visible."""

    def __init__(self, folder: Path, publish: Any) -> None:
        self.folder, self._publish = folder, publish

    def __enter__(self) -> Path:
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()


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
        raise DiskError(
            f"cannot write {target}: {error.strerror or error}. There is no store; the same command goes on from the "
            "last shard that was written, if there is one."
        ) from error


def _locked(partial: Path, target: Path) -> int:
    """Held while this process lives: it tells a folder in use from one that a killed process left."""
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise TemporaryError(f"another process is writing {target}. Wait for it, or give another --out.") from error
    return lock


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
