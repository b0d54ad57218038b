"""The images of a store by the names of their files, for those who know nothing but names."""

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from sslmed.data.annotations.masks import before_shrinking
from sslmed.data.store import Store


class Images:
    """The rows of a store, by file, by folder, and as they were read.

    Args:
        files: of every row the file that it was read from, relative to the source.
        parts: of every row which scan of its file it is, see `Scan`; "" of all without it.
    """

    def __init__(self, store: Store, files: Sequence[str], parts: Sequence[str] = ()) -> None:
        if len(files) != len(store) or len(parts or files) != len(store):
            raise ValueError(f"{len(files)} files and {len(parts)} parts for {len(store)} rows")
        self.store, self.files, self._parts = store, files, parts or ("",) * len(files)
        self.scan_of = store.index.scan
        self.rows: dict[str, list[int]] = {}
        for row, file in enumerate(files):
            self.rows.setdefault(file, []).append(row)
        self._folders = self._series()

    def targets(self) -> dict[str, str]:
        """What may be named, and the file or folder of rows that it means."""
        return {name: name for name in (*self.rows, *self._folders)}

    def groups(self, name: str) -> dict[str, npt.NDArray[np.int64]]:
        """The rows of a file or folder, in the order of slices, by part."""
        rows = np.array(self._folders[name] if name in self._folders else self.rows[name], np.int64)
        parts = np.array([self._parts[row] for row in rows], object)
        return {part: rows[parts == part] for part in dict.fromkeys(parts.tolist())}

    def depth(self, scan: int) -> int:
        """How many rows a scan has."""
        return int(self.store.scans.depth[scan])

    def source_size(self, row: int) -> tuple[int, int]:
        """Height and width of a row as it was read."""
        scan = int(self.scan_of[row])
        return int(self.store.scans.source_height[scan]), int(self.store.scans.source_width[scan])

    def stored_size(self, row: int) -> tuple[int, int]:
        """Height and width of a row as it is stored."""
        return int(self.store.index.height[row]), int(self.store.index.width[row])

    def affine(self, scan: int) -> npt.NDArray[np.float64] | None:
        """See `Scan.affine`, of the scan as it was read."""
        row = int(self.store.scans.first[scan])
        stored = self.store.volume(scan).affine
        return None if stored is None else before_shrinking(stored, self.source_size(row), self.stored_size(row))

    def flips(self, scan: int) -> tuple[bool, bool, bool]:
        """See `Scan.flipped`: what is drawn on the file's own pixels has to be turned round likewise."""
        bits = int(self.store.scans.flipped[scan])
        return bool(bits & 1), bool(bits & 2), bool(bits & 4)

    def sheared(self, scan: int) -> bool:
        """See `Scan.sheared`."""
        return bool(self.store.scans.sheared[scan])

    def name(self, scan: int) -> str:
        """What to call a scan: its folder when it is a series that has one for itself, else its file."""
        first = int(self.store.scans.first[scan])
        folder = str(PurePosixPath(self.files[first]).parent)
        return folder if first in self._folders.get(folder, ())[:1] else self.files[first]

    def _series(self) -> dict[str, list[int]]:
        """The rows of folders that hold the slices of one scan and nothing else."""
        scans: dict[str, set[int]] = {}
        rows: dict[str, list[int]] = {}
        for row, file in enumerate(self.files):
            folder = str(PurePosixPath(file).parent)
            scans.setdefault(folder, set()).add(int(self.scan_of[row]))
            rows.setdefault(folder, []).append(row)
        return {
            folder: rows[folder]
            for folder, held in scans.items()
            if folder != "." and len(held) == 1 and len({self.files[row] for row in rows[folder]}) > 1
        }
