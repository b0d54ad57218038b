"""A store: the folder of HDF5 shards that training reads, one modality each.

``store.json`` says what the store is and carries the digests. ``index.h5`` has one fixed-width column a property, so
that 10^6 images open in well under a second. ``shard-00000.h5`` and on hold the pixels: one dataset for each dtype and
shape, one image (or tile of a slice) a chunk, bitshuffle-lz4 with a Fletcher-32 checksum (of 24 flipped bytes it found
24; without it, 1). `sslmed.data.shards.writer` makes stores; labels, masks and boxes are in files of their own
(`sslmed.data.annotations.reader`).
"""

import os
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.reader import Annotations
from sslmed.data.intensity import Intensity
from sslmed.data.scan import NiftiGrid
from sslmed.data.shards.format import (
    INDEX_H5,
    STORE_JSON,
    TILED,
    Geometries,
    Index,
    LabelColumn,
    MetaColumn,
    ScanTable,
    group_name,
    read_about,
)
from sslmed.data.shards.hdf5 import HardDataset, open_h5, read_column
from sslmed.data.shards.volumes import StoredVolume
from sslmed.data.splits import SPLITS
from sslmed.durable import sha256

_OPEN_SHARDS = 64  # far below the usual limit of 1024 open files, even with several stores
_OPEN_DATASETS = 512  # of one shard


class Store:
    """A store opened for reading.

    It may be pickled, forked and spawned: files are opened at the first read of each process, and an unpickled copy
    insists on finding the same store.

    Args:
        path: the store's folder.
        verify: check the digest of the index (about 0.1 s for 10^6 images). Pixels are checked when read.

    Raises:
        MissingInputError: there is no such folder.
        DataError: no store, a damaged one, or one of another schema version.
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        self.path = Path(path)
        self._about = read_about(self.path)
        index_path = self.path / INDEX_H5
        if not index_path.is_file() or index_path.is_symlink():
            raise DataError(f"{self.path}: {INDEX_H5} is missing. Ingest the images again.")
        if verify and sha256(index_path) != self._about["index"]["sha256"]:
            raise DataError(
                f"{index_path} is damaged: its SHA-256 is not the one in {STORE_JSON}. Ingest the images again."
            )
        self._forget_handles()

    # What it is.

    @property
    def modality(self) -> str:
        """The name of the modality of every image."""
        return cast(str, self._about["modality"])

    @property
    def key_id(self) -> str:
        """Which site key the patients were hidden under."""
        return cast(str, self._about["key_id"])

    @property
    def split_digest(self) -> str:
        """The digest of who is on which side."""
        return cast(str, self._about["split_digest"])

    @property
    def fingerprint(self) -> str:
        """The digest of the whole: 64 hexadecimal digits that change with any pixel, label or split."""
        return cast(str, self._about["digest"])

    @property
    def about(self) -> Mapping[str, Any]:
        """What ``store.json`` says."""
        return dict(self._about)

    @property
    def policy(self) -> Mapping[str, Any]:
        """How the modality made pixels and intensities when the store was made."""
        return dict(self._about["policy"])

    @cached_property
    def annotations(self) -> Annotations:
        """Labels, meta columns, masks and boxes."""
        return Annotations(self.path, self._about, len(self))

    @property
    def labels(self) -> dict[str, LabelColumn]:
        """The label columns by name, in the order of the labels CSV."""
        return self.annotations.labels

    @property
    def meta_columns(self) -> dict[str, MetaColumn]:
        """The meta columns by name."""
        return self.annotations.meta_columns

    def __len__(self) -> int:
        return cast(int, self._about["images"])

    @cached_property
    def index(self) -> Index:
        """The columns of the index, read at first use."""
        return Index(**{field.name: self._column(field.name, len(self)) for field in fields(Index)})

    @cached_property
    def scans(self) -> ScanTable:
        """The table of scans, read at first use."""
        count = self._about["scans"]
        return ScanTable(**{field.name: self._column(f"scan_{field.name}", count) for field in fields(ScanTable)})

    # Rows and labels.

    def rows(self, *splits: str) -> npt.NDArray[np.int64]:
        """The rows of the named splits in rising order; of all splits when none is named."""
        if unknown := set(splits) - set(SPLITS):
            raise UsageError(f"no split {sorted(unknown)[0]!r}; there are {', '.join(SPLITS)}.")
        wanted = [SPLITS.index(split) for split in splits or SPLITS]
        return np.flatnonzero(np.isin(self.index.split, wanted)).astype(np.int64)

    def patients(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bytes_]:
        """The keyed patient of each of ``rows``, (N,) S32."""
        return self.index.patient[rows]

    def classes(self, name: str) -> tuple[str, ...]:
        """The class names of a label, in the order of its numbers."""
        return self.annotations.label(name).classes

    def target(self, name: str) -> npt.NDArray[np.int64]:
        """The class number of every row, (N,), -1 where the image has no label ``name``."""
        return self.annotations.target(name)

    def default_target(self) -> str | None:
        """The first label column, or None when the store has no labels."""
        return next(iter(self.labels), None)

    def meta(self, name: str) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
        """A meta column of every row: numbers (NaN where blank), or positions in its categories (-1 where blank)."""
        return self.annotations.meta(name)

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """The classes of the masks' numbers; empty when the store has no masks."""
        return self.annotations.mask_classes

    def mask(self, row: int) -> npt.NDArray[np.uint8] | None:
        """Class numbers (H, W) of an image, 255 where they are to be ignored; None without a mask."""
        return self.annotations.mask(row, (int(self.index.height[row]), int(self.index.width[row])))

    @property
    def box_classes(self) -> tuple[str, ...]:
        """The classes of the boxes' numbers; empty when the store has no boxes."""
        return self.annotations.box_classes

    def boxes(self, row: int) -> Boxes | None:
        """The boxes of an image, none of a negative; None when nobody has looked for any."""
        return self.annotations.boxes(row)

    # Pixels.

    def intensity(self, row: int) -> Intensity:
        """What the intensities of a row's scan are measured by, as the modality found it at ingest, in stored units."""
        scans, scan = self.scans, int(self.index.scan[row])
        return Intensity(*(float(column[scan]) for column in (scans.low, scans.high, scans.mean, scans.std)))

    def pixels(self, row: int, slices: int = 1) -> npt.NDArray[Any]:
        """The image, (H, W) or (H, W, 3), in its stored dtype; (H, W, slices) with its neighbours in the scan.

        Args:
            slices: an odd number; at the ends of a volume, and of a picture, the outermost slice is repeated.

        Raises:
            DataError: the checksum does not match, or the shard is missing or not what the index says.
            UsageError: slices of an image in colour, or an even number of them.
        """
        place = int(self.index.row[row])
        if slices == 1:
            image: npt.NDArray[Any] = self._read(row, (slice(place, place + 1),))[0]
            return image
        return self.volume(int(self.index.scan[row])).stack(0, int(self.index.slice[row]), slices)

    def volume(self, scan: int) -> StoredVolume:
        """A scan as a whole, of which only what is asked for is read."""
        scans, index = self.scans, self.index
        row = int(scans.first[scan])
        place, depth, channels = int(index.row[row]), int(scans.depth[scan]), int(index.channels[row])
        shape = (depth, int(index.height[row]), int(index.width[row]), *((channels,) if channels > 1 else ()))
        affine, grid = self._geometry(int(scans.geometry[scan]))

        def read(window: tuple[slice, slice, slice]) -> npt.NDArray[Any]:
            return self._read(row, (slice(place + window[0].start, place + window[0].stop), *window[1:]))

        down, across = (float(side) for side in scans.spacing[scan][1:])
        return StoredVolume(shape, (float(scans.spacing[scan][0]), down, across), affine, grid, read)

    def verify(self) -> list[str]:
        """Check every digest; where a shard differs, read all its images and name those that are damaged.

        Returns:
            One line a finding; empty when the store is as it was written.
        """
        findings = []
        if sha256(self.path / INDEX_H5) != self._about["index"]["sha256"]:
            return [f"{INDEX_H5}: SHA-256 differs"]
        for number, shard in enumerate(self._about["shards"]):
            path = self.path / shard["file"]
            if not path.is_file() or path.is_symlink():
                findings.append(f"{shard['file']}: missing")
            elif sha256(path) != shard["sha256"]:
                findings.append(f"{shard['file']}: SHA-256 differs")
                findings += self._damaged(number)
        return findings + self.annotations.verify()

    def close(self) -> None:
        """Close the files that this process has open; the next read opens them again."""
        if self._pid == os.getpid():
            for file, _ in self._open.values():
                file.close()
        self._forget_handles()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._about = read_about(self.path)
        if self.fingerprint != state["fingerprint"]:
            raise DataError(f"{self.path} is no longer the store it was when this process was started. Start again.")
        self._forget_handles()

    # Machinery.

    def _column(self, name: str, count: int) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = read_column(self.path / INDEX_H5, name)
        if len(column) != count:
            raise DataError(f"{self.path / INDEX_H5}: column {name!r} has {len(column)} entries, not {count}.")
        return column

    def _geometry(self, place: int) -> tuple[npt.NDArray[np.float64] | None, NiftiGrid | None]:
        if place < 0:
            return None, None
        found = self._geometries
        affine = found.affine[place]
        shape = tuple(int(side) for side in found.grid_shape[place])
        if not any(shape):
            return affine, None
        return affine, NiftiGrid((shape[0], shape[1], shape[2]), found.grid_turn[place], found.grid_fields[place])

    @cached_property
    def _geometries(self) -> Geometries:
        path = self.path / INDEX_H5
        return Geometries(**{field.name: read_column(path, f"place_{field.name}") for field in fields(Geometries)})

    def _read(self, row: int, window: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Part of the dataset in which a row lies."""
        index = self.index
        shard = self._about["shards"][int(index.shard[row])]["file"]
        group = self._about["groups"][int(index.group[row])]
        try:
            dataset = self._dataset(shard, group)
            if window[0].stop > len(dataset):
                raise ValueError(f"the dataset has {len(dataset)} images")
            return dataset.read(window)
        except (OSError, RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.path / shard}: sample {row} ({group}, row {int(index.row[row])}) cannot be read: {reason}.\n"
                f"`sslmed verify {self.path}` lists everything that is damaged; then ingest the images again."
            ) from error

    def _forget_handles(self) -> None:
        # A forked child must not use its parent's HDF5 handles; it drops them unclosed and opens its own.
        self._pid = os.getpid()
        self._open: dict[str, tuple[Any, dict[str, HardDataset]]] = {}  # file and datasets of each open shard

    def _dataset(self, shard: str, group: str) -> HardDataset:
        if self._pid != os.getpid():
            self._forget_handles()
        if shard not in self._open:
            self._open[shard] = open_h5(self.path / shard), {}
        file, datasets = self._open[shard] = self._open.pop(shard)  # the last one is the one used last
        if len(self._open) > _OPEN_SHARDS:
            self._open.pop(next(iter(self._open)))[0].close()
        if group not in datasets:
            dataset = HardDataset(file, group)
            name = group_name(dataset.dtype, dataset.shape[1:])
            if group.removesuffix(TILED) != name:
                raise ValueError(f"the dataset is {name}")
            if len(datasets) >= _OPEN_DATASETS:
                datasets.clear()
            datasets[group] = dataset
        return datasets[group]

    def _damaged(self, shard: int) -> list[str]:
        findings = []
        for row in np.flatnonzero(self.index.shard == shard):
            try:
                self.pixels(int(row))
            except DataError as error:
                findings.append(str(error).splitlines()[0])
        return findings
