"""The tables of a store that is being written: rows, scans and where they lie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.intensity import Intensity
from sslmed.data.scan import NiftiGrid
from sslmed.data.shards.format import GEOMETRY, KINDS, ROW, SCAN
from sslmed.data.splits import SPLITS

Entries = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class NewScan:
    """A scan as the store keeps it.

    Attributes:
        pixels: (H, W) or (H, W, 3) of an image, (D, H, W) or (D, H, W, 3) of a volume or clip.
        content: keyed digest of the scan as it was read.
        source_size: height and width before they were shrunk.
        spacing, affine, flipped, sheared, grid: of the pixels as they are here; see `Scan`.
        note: what the caller wants to know of the scan when all are written; plain JSON. It is kept through a kill.
    """

    pixels: npt.NDArray[Any]
    intensity: Intensity
    content: str
    kind: str = "image"
    source_size: tuple[int, int] | None = None
    spacing: tuple[float, ...] | None = None
    affine: npt.NDArray[np.float64] | None = None
    flipped: tuple[bool, bool, bool] = (False, False, False)
    sheared: bool = False
    grid: NiftiGrid | None = None
    note: Any = None


class Tables:
    """Rows, scans and geometries, which grow together."""

    def __init__(self) -> None:
        self.rows, self.scans, self.geometries = Table(ROW), Table(SCAN), Table(GEOMETRY)

    def extend(self, rows: Entries, scans: Entries, geometries: Entries) -> None:
        """Take over entries as they are."""
        self.rows.extend(rows)
        self.scans.extend(scans)
        self.geometries.extend(geometries)

    def counts(self) -> tuple[int, int, int]:
        """How many entries there are."""
        return len(self.rows), len(self.scans), len(self.geometries)

    def add(self, scan: NewScan, images: Entries, *, shard: int, group: int, place: int) -> int:
        """Enter a scan whose ``images`` (D, H, W) or (D, H, W, 3) lie at ``place`` and on; its first row.

        Patients and splits come later.
        """
        if len(scan.content) > ROW["content"].itemsize:
            raise ValueError(f"content {scan.content!r} is no keyed digest")
        first, depth = len(self.rows), len(images)
        height, width, channels = (*images.shape[1:], 1)[:3]
        rows = np.zeros(depth, ROW)
        rows["content"], rows["split"] = scan.content.encode(), SPLITS.index("unlabelled")
        rows["scan"], rows["slice"] = len(self.scans), np.arange(depth)
        rows["shard"], rows["group"], rows["row"] = shard, group, place + np.arange(depth)
        rows["height"], rows["width"], rows["channels"] = height, width, channels
        rows["dtype"] = images.dtype.name.encode()
        self.rows.extend(rows)
        known = scan.spacing or ()
        spacing = (np.nan,) * (3 - len(known)) + tuple(known)
        source = scan.source_size or (height, width)
        kind = KINDS.index(scan.kind)
        flipped = sum(1 << axis for axis, turned in enumerate(scan.flipped) if turned)
        placed = self._place(scan)
        self.scans.append((first, depth, kind, *source, flipped, scan.sheared, *scan.intensity, spacing, placed))
        return first

    def _place(self, scan: NewScan) -> int:
        if scan.affine is None:
            return -1
        grid = scan.grid
        shape, turn = ((0, 0, 0), np.zeros((3, 2), np.int8)) if grid is None else (grid.shape, grid.turn)
        values = np.full(GEOMETRY["grid_fields"].shape, np.nan) if grid is None else grid.fields
        self.geometries.append((scan.affine, shape, turn, values))
        return len(self.geometries) - 1


class Table:
    """A structured array that grows."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._array = np.zeros(1024, dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, entry: tuple[Any, ...]) -> None:
        one = np.zeros(1, self._array.dtype)
        one[0] = entry
        self.extend(one)

    def extend(self, entries: npt.NDArray[Any]) -> None:
        needed = self._count + len(entries)
        if needed > len(self._array):
            grown = np.zeros(max(needed, 2 * len(self._array)), self._array.dtype)
            grown[: self._count] = self.all()
            self._array = grown
        self._array[self._count : needed] = entries
        self._count = needed

    def all(self) -> npt.NDArray[Any]:
        return self._array[: self._count]

    def column(self, name: str) -> npt.NDArray[Any]:
        return self._array[name][: self._count]
