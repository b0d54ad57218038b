"""Labels, masks and boxes of a store: in files of their own, so that they can come later and pixels stay untouched.

``labels-G.h5`` has the label and meta columns, ``masks-G.h5`` says where each row's mask lies, ``masks-G-00000.h5`` and
on hold the masks, one a chunk, ``boxes-G.h5`` the boxes. G counts the times that a store was annotated. The part
``annotations`` of ``store.json`` names the files that count, with their digests, so that replacing ``store.json`` makes
all of them appear at once. `sslmed.data.annotations.writer` writes them.
"""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.format import VALUES, checked, tables, verified
from sslmed.data.annotations.mask_values import VOID, Legend
from sslmed.data.shards.format import LabelColumn, MetaColumn
from sslmed.data.shards.hdf5 import HardDataset, open_h5, read_column

_OPEN_SHARDS = 16


class Annotations:
    """What a store's ``store.json`` says of labels, masks and boxes, and the way to them.

    Args:
        path: the store's folder.
        about: all that ``store.json`` says.
        rows: how many images the store has.
        verify: check the digest of a file when it is read for the first time; masks have checksums of their own.

    Raises:
        DataError: it names files that cannot be a store's own, or is not what sslmed writes.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], rows: int, verify: bool = True) -> None:
        self.path, self._rows = path, rows
        self._part = checked(path, about.get("annotations"))
        self._unverified = {entry["file"]: entry for entry in tables(self._part)} if verify else {}
        self._forget_handles()

    # Labels and meta columns.

    @cached_property
    def labels(self) -> dict[str, LabelColumn]:
        """The label columns by name, in the order in which they came."""
        columns = [LabelColumn(each["name"], each["kind"], tuple(each["classes"])) for each in self._part["labels"]]
        return {column.name: column for column in columns}

    @cached_property
    def meta_columns(self) -> dict[str, MetaColumn]:
        """The meta columns by name."""
        columns = [MetaColumn(each["name"], each["kind"], tuple(each["categories"])) for each in self._part["meta"]]
        return {column.name: column for column in columns}

    def label(self, name: str) -> LabelColumn:
        """The label column ``name``; a UsageError says which there are."""
        if name not in self.labels:
            raise UsageError(f"{self.path} has no label {name!r}; it has {', '.join(self.labels) or 'none'}.")
        return self.labels[name]

    def target(self, name: str) -> npt.NDArray[np.int64]:
        """The class number of every row, (N,), -1 where the image has no label ``name``."""
        position = list(self.labels).index(self.label(name).name)
        return self._column(self._part["file"], f"label_{position:03d}").astype(np.int64)

    def meta(self, name: str) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
        """A meta column of every row: numbers (NaN where blank), or positions in its categories (-1 where blank)."""
        if name not in self.meta_columns:
            raise UsageError(
                f"{self.path} has no meta column {name!r}; it has {', '.join(self.meta_columns) or 'none'}."
            )
        column = self._column(self._part["file"], f"meta_{list(self.meta_columns).index(name):03d}")
        if self.meta_columns[name].kind == "number":
            return column.astype(np.float64)
        return column.astype(np.int64)

    # Masks.

    @property
    def mask_classes(self) -> tuple[str, ...]:
        """The class names of the masks' numbers, in their order; empty without masks."""
        return tuple(self._masks["classes"]) if self._masks else ()

    @property
    def mask_values(self) -> tuple[int, ...]:
        """The value that each class has in the mask files, in the order of the classes."""
        return tuple(self._masks["values"]) if self._masks else ()

    def masked(self) -> npt.NDArray[np.bool_]:
        """Which rows have a mask, (N,)."""
        return self._place["shard"] >= 0

    def mask_presence(self) -> npt.NDArray[np.bool_]:
        """Which classes each row's mask holds, (N, C); no mask holds none."""
        present = self._place["present"]
        columns = [present[:, value // 8] >> (value % 8) & 1 for value in self.mask_values]
        return np.stack(columns, 1).astype(bool) if columns else np.zeros((self._rows, 0), bool)

    def mask(self, row: int, shape: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
        """The class numbers of an image's pixels, 255 where they count for nothing; None without a mask.

        Args:
            shape: the image's height and width.

        Raises:
            DataError: the checksum does not match, the shard is missing, or the mask is not of the image's shape.
        """
        raw = self.raw_mask(row, shape)
        return None if raw is None else self._numbers[raw]

    def raw_mask(self, row: int, shape: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
        """The mask with the values of its file, like `mask`."""
        place = self._place
        if not self._masks or place["shard"][row] < 0:
            return None
        shard, group = self._masks["shards"][place["shard"][row]]["file"], self._masks["groups"][place["group"][row]]
        try:
            dataset = self._dataset(shard, group)
            if dataset.dtype != np.uint8 or dataset.shape[1:] != tuple(shape):
                raise ValueError(f"it holds {dataset.dtype} {dataset.shape[1:]}, but the image has {tuple(shape)}")
            number = int(place["row"][row])
            return cast(npt.NDArray[np.uint8], dataset.read((slice(number, number + 1),))[0])
        except (OSError, RuntimeError, KeyError, ValueError, IndexError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"{self.path / shard}: the mask of sample {row} ({group}) cannot be read: {reason}.\n"
                f"`sslmed verify {self.path}` lists everything that is damaged; then label the images again."
            ) from error

    @property
    def legend(self) -> Legend | None:
        """What the masks' values mean; None without masks."""
        return Legend(self.mask_classes, self.mask_values, self._masks["named"]) if self._masks else None

    def mask_places(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of where each row's mask lies: shard (N,), -1 without one, group (N,), row (N,), present (N, 32)."""
        return {name: column.copy() for name, column in self._place.items()}

    # Boxes.

    @property
    def box_classes(self) -> tuple[str, ...]:
        """The class names of the boxes' numbers, in their order; empty without boxes."""
        return tuple(self._part["boxes"]["classes"]) if self._part["boxes"] else ()

    def boxed(self) -> npt.NDArray[np.bool_]:
        """Which rows have been searched for boxes, (N,); a row without any among them is a negative."""
        return self._boxes["count"] >= 0

    def boxes(self, row: int) -> Boxes | None:
        """The boxes of an image, none of a negative; None when nobody has looked for any."""
        if self._boxes["count"][row] < 0:
            return None
        end = int(self._boxes["end"][row])
        window = slice(end - int(self._boxes["count"][row]), end)
        return Boxes(self._boxes["xyxy"][window].copy(), self._boxes["class"][window].copy())

    def every_box(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The row and the class number of every box, (n,) each."""
        count = self._boxes["count"]
        if "class" not in self._boxes:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.repeat(np.arange(len(count)), np.maximum(count, 0)), self._boxes["class"].astype(np.int64)

    # The whole.

    def about(self, what: str) -> dict[str, Any] | None:
        """What ``store.json`` says of "masks" or "boxes"; None when there are none."""
        return cast(dict[str, Any] | None, self._part[what])

    @property
    def generation(self) -> int:
        """How many times the store was annotated."""
        return cast(int, self._part["generation"])

    def files(self) -> list[str]:
        """The names of all files that count."""
        return [entry["file"] for entry in [*tables(self._part), *(self._masks or {"shards": []})["shards"]]]

    def verify(self) -> list[str]:
        """Check the digest of every file; one line a finding."""
        shards = (self._masks or {"shards": []})["shards"]
        return [line for entry in [*tables(self._part), *shards] for line in verified(self.path, entry)]

    def close(self) -> None:
        """Close the files that this process has open; the next read opens them again."""
        if self._pid == os.getpid():
            for file in self._open.values():
                file.close()
        self._forget_handles()

    # Machinery.

    @property
    def _masks(self) -> dict[str, Any] | None:
        return self.about("masks")

    @cached_property
    def _place(self) -> dict[str, npt.NDArray[Any]]:
        """Where each row's mask lies: shard (-1 without a mask), group, row; and the values in it, (N, 32) as bits."""
        if not self._masks:
            none = np.full(self._rows, -1, np.int32)
            return {"shard": none, "group": none, "row": none, "present": np.zeros((self._rows, VALUES // 8), np.uint8)}
        return {name: self._column(self._masks["file"], name) for name in ("shard", "group", "row", "present")}

    @cached_property
    def _numbers(self) -> npt.NDArray[np.uint8]:
        """(256,) from a file's value to its class number."""
        numbers = np.full(VALUES, VOID, np.uint8)
        numbers[list(self.mask_values)] = np.arange(len(self.mask_values))
        return numbers

    @cached_property
    def _boxes(self) -> dict[str, npt.NDArray[Any]]:
        if not self._part["boxes"]:
            return {"count": np.full(self._rows, -1, np.int32)}
        file = self._part["boxes"]["file"]
        count = self._column(file, "count")
        end = np.cumsum(np.maximum(count, 0), dtype=np.int64)
        found = {"count": count, "end": end}
        for name in ("xyxy", "class"):
            found[name] = self._read(file, name)
            if len(found[name]) != end[-1]:
                raise DataError(f"{self.path / file}: column {name!r} has {len(found[name])} entries, not {end[-1]}.")
        return found

    def _column(self, file: str, name: str) -> npt.NDArray[Any]:
        column = self._read(file, name)
        if len(column) != self._rows:
            raise DataError(f"{self.path / file}: column {name!r} has {len(column)} entries, not {self._rows}.")
        return column

    def _read(self, file: str, name: str) -> npt.NDArray[Any]:
        if (entry := self._unverified.get(file)) and (findings := verified(self.path, entry)):
            raise DataError(f"{self.path} is damaged: {findings[0]}. Ingest the images again.")
        self._unverified.pop(file, None)
        return read_column(self.path / file, name)

    def _forget_handles(self) -> None:
        # A forked child must not use its parent's HDF5 handles; it drops them unclosed and opens its own.
        self._pid = os.getpid()
        self._open: dict[str, Any] = {}

    def _dataset(self, shard: str, group: str) -> HardDataset:
        if self._pid != os.getpid():
            self._forget_handles()
        if shard not in self._open:
            self._open[shard] = open_h5(self.path / shard)
        file = self._open[shard] = self._open.pop(shard)  # the last one is the one used last
        if len(self._open) > _OPEN_SHARDS:
            self._open.pop(next(iter(self._open))).close()
        return HardDataset(file, group)
