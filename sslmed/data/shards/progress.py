"""What an interrupted ingest had done: a file for every finished shard, for their owner alone.

The files name patients and say what is wrong with files, so they lie beside the store, and go when it is finished.
"""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.shards.format import GEOMETRY, ROW, SCAN
from sslmed.durable import sha256, write_atomically


@dataclass(frozen=True, eq=False)
class Part:
    """A finished shard, as ``store.json`` names it, and what is known of its images; ``groups`` are all so far."""

    shard: dict[str, Any]
    groups: list[str]
    rows: npt.NDArray[Any]
    scans: npt.NDArray[Any]
    geometries: npt.NDArray[Any]
    notes: list[Any]
    skips: list[Any]


_TABLES = {"rows": ROW, "scans": SCAN, "geometries": GEOMETRY}


class Progress:
    """Parts in a folder of their own. Parts of another plan are as good as none."""

    def __init__(self, folder: Path, plan: str) -> None:
        self._folder, self._plan = folder, plan

    def start(self) -> None:
        """Make the folder, and the one that it lies in, closed to everyone else."""
        for folder in (self._folder.parent, self._folder):
            folder.mkdir(mode=0o700, exist_ok=True)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()  # unless something else is in it

    def save(self, number: int, part: Part) -> None:
        """Keep the part of shard ``number``, which is on the disk already."""
        about = {"plan": self._plan, **{name: getattr(part, name) for name in ("shard", "groups", "notes", "skips")}}
        tables = {name: np.ascontiguousarray(getattr(part, name)) for name in _TABLES}
        words = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with write_atomically(self._name(number)) as partial, _for_owner(partial) as file:
            np.savez(file, about=words, **tables)  # type: ignore[arg-type]

    def parts(self, shards: Path) -> list[Part]:
        """The parts of this plan whose shards in ``shards`` are as they were written, up to the first that is not."""
        found: list[Part] = []
        while (part := self._read(len(found))) is not None:
            shard = shards / part.shard["file"]
            if not shard.is_file() or sha256(shard) != part.shard["sha256"]:
                break
            found.append(part)
        return found

    def _read(self, number: int) -> Part | None:
        try:
            with np.load(self._name(number), allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                tables = {name: file[name] for name in _TABLES}
            if about.pop("plan") != self._plan:
                return None
            if any(tables[name].dtype != dtype for name, dtype in _TABLES.items()):
                return None
            return Part(**about, **tables) if about.keys() | tables.keys() == _PART else None
        except Exception:  # a file of a killed process or of another version: what it was for is read again
            return None

    def _name(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.npz"


def _for_owner(path: Path) -> Any:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


_PART = {field.name for field in fields(Part)}
