"""Masks and boxes held against scans that were measured, of which no store was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from sslmed.config import DataError
from sslmed.data.annotations.attach import Report, Sources
from sslmed.data.checks.findings import Checker, Severity
from sslmed.data.checks.measured import Measured
from sslmed.data.sources.catalogue import Catalogue
from sslmed.data.sources.reading import Unit

# What `Sources` calls its problems -> how bad they are; the others are errors.
_SEVERITIES: dict[str, Severity] = {
    "mask_without_image": "warning",
    "boxes_without_image": "warning",
    "link_outside": "warning",
    "image_without_mask": "note",
    "image_without_boxes": "note",
}


@dataclass(frozen=True)
class Unwritten:
    """A scan that was measured, and the files that it was read from."""

    unit: Unit
    told: Measured


def look(checker: Checker, found: Catalogue, scans: Sequence[Unwritten], sources: Sources) -> None:
    """Tell ``checker`` which masks and boxes do not fit, and which go with nothing."""
    if not sources or not scans:
        return
    files, parts = [], []
    for scan in scans:
        paths = [Path(path) for path in scan.told.slices] or [scan.unit.paths[0]]
        files += [found.name(path) for path in paths for _ in range(scan.told.depth // len(paths))]
        parts += [scan.told.part] * scan.told.depth
    try:
        report = sources.look(cast(Any, _as_store(scans)), files, parts)
    except DataError as error:
        checker.tell("label-mismatch", "error", (), str(error).replace("\n", " "))
        return
    _tell(checker, report)


def _tell(checker: Checker, report: Report) -> None:
    alike: dict[tuple[str, str], list[str]] = {}
    for problem in report.problems:
        if problem.code in _SEVERITIES:
            alike.setdefault((problem.code, problem.reason), []).append(problem.file)
        else:
            checker.tell("label-mismatch", "error", (problem.file,), problem.reason)
    for (code, reason), files in alike.items():
        checker.tell("label-mismatch", _SEVERITIES[code], files, f"{code.replace('_', ' ')}: {reason}")


def _as_store(scans: Sequence[Unwritten]) -> SimpleNamespace:
    """What `Sources.look` asks a store for, of one that would keep images as they are."""
    depth = np.array([scan.told.depth for scan in scans])
    sides = np.array([scan.told.sides for scan in scans])
    scan_of = np.repeat(np.arange(len(scans)), depth)
    none = np.zeros(len(scan_of), bool)

    def volume(scan: int) -> SimpleNamespace:
        affine = scans[scan].told.affine if scans[scan].told.kind == "volume" else None
        return SimpleNamespace(affine=None if affine is None else np.reshape(affine, (4, 4)))

    return _Sized(
        len(scan_of),
        index=SimpleNamespace(scan=scan_of, height=sides[scan_of, 0], width=sides[scan_of, 1]),
        scans=SimpleNamespace(
            first=np.cumsum(depth) - depth,
            depth=depth,
            source_height=sides[:, 0],
            source_width=sides[:, 1],
            flipped=np.zeros(len(scans), np.uint8),  # whether something fits does not depend on it
            sheared=np.array([scan.told.sheared for scan in scans]),
        ),
        annotations=SimpleNamespace(masked=none.copy, boxed=none.copy),
        volume=volume,
    )


class _Sized(SimpleNamespace):
    def __init__(self, rows: int, **parts: Any) -> None:
        super().__init__(**parts)
        self._rows = rows

    def __len__(self) -> int:
        return self._rows
