"""What is known of each row of a store that is being made: whose it is, its split, labels and meta columns."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.shards.format import LabelColumn, MetaColumn
from sslmed.data.shards.writer import StoreWriter
from sslmed.data.sources.catalogue import Catalogue, Row
from sslmed.data.sources.kept import Told
from sslmed.data.sources.labels import encode_labels, encode_meta
from sslmed.data.sources.reading import Unit

Labelled = list[tuple[LabelColumn, npt.NDArray[np.int16]]]
Described = list[tuple[MetaColumn, npt.NDArray[Any]]]


def rows_of(found: Catalogue, writer: StoreWriter, wanted: Sequence[Unit]) -> tuple[list[Row], list[Told]]:
    """What is known of each row, and what each scan's file told.

    Whose a scan is the labels CSV says, else ``--patient``, else its DICOM file; else it is a patient of its own, which
    is said.

    Raises:
        DataError: slices of one series belong to several patients.
    """
    told = [Told.from_list(note) for note in writer.notes]
    _adopt_labels(found, told)
    rows: list[Row] = []
    own = 0
    for scan, depth in zip(told, writer.scans("depth").tolist(), strict=True):
        paths = [Path(source) for source in scan.sources] or [wanted[scan.unit].paths[0]]
        of_slices = [found.row(path) for path in paths]
        if not any(of_slices):
            of_slices = [found.row(path, scan.patient) for path in paths]
        if not any(of_slices):
            own += 1
            # A part in a folder of parts is one image of many, another one a volume of the file's patient.
            alone = [found.alone(path, scan.part if "/" in scan.part else "") for path in paths]
            of_slices = [replace(row, patient=alone[0].patient) for row in alone]
        rows += [_with(found, row, scan) for row in _of_one(found, paths, of_slices)] * (depth // len(paths))
    if own:
        found.warnings.append(
            f"nobody says whose {own} of {len(told)} scans are (no --patient, no labels CSV, no DICOM PatientID): each "
            "of their files counts as a patient of its own, so images of one patient may lie on two sides of the split"
        )
    return rows, told


def columns(
    found: Catalogue, rows: Sequence[Row], told: Sequence[Told], writer: StoreWriter
) -> tuple[Labelled, Described]:
    """The label columns, and the meta columns: those of the CSV, then what the scans themselves tell."""
    cells = list(zip(*(row.values for row in rows), strict=True))
    labels = [encode_labels(name, values) for name, values in zip(found.labels, cells, strict=False)]
    meta = [encode_meta(name, values) for name, values in zip(found.meta, cells[len(labels) :], strict=True)]
    for column, numbers in labels:
        if not (numbers >= 0).any():
            found.warnings.append(f"label {column.name!r} is blank for every image")
        elif len(np.unique(numbers[numbers >= 0])) == 1:
            found.warnings.append(f"label {column.name!r} has one class only, {column.classes[int(numbers.max())]!r}")
        elif len(column.classes) > max(20, (numbers >= 0).sum() // 2):
            found.warnings.append(f"label {column.name!r} has {len(column.classes)} classes: is it really a class?")
    return labels, meta + [
        (MetaColumn(name, "number"), values)
        for name, values in _of_scans(told, writer).items()
        if name not in found.meta and np.isfinite(values).any()
    ]


def _adopt_labels(found: Catalogue, told: Sequence[Told]) -> None:
    """Labels that stand in the files of images themselves, where no CSV names others."""
    if found.table is None and not found.folders and not found.labels:
        found.labels = tuple(dict.fromkeys(name for scan in told for name, _ in scan.labels))


def _of_one(found: Catalogue, paths: Sequence[Path], rows: Sequence[Row | None]) -> list[Row]:
    """The rows of the slices of one scan; a slice of which nothing is said has its scan's patient and split."""
    known = [row for row in rows if row is not None]
    if other := next((row for row in known if row.patient != known[0].patient), None):
        raise DataError(
            f"{known[0].name} and {other.name} are slices of one series, but belong to the patients "
            f"{known[0].patient!r} and {other.patient!r}. Mend the labels CSV, or --patient."
        )
    side = next((row.split for row in known if row.split), "")
    blank = ("",) * len(known[0].values)
    return [row or Row(found.name(path), known[0].patient, side, blank) for path, row in zip(paths, rows, strict=True)]


def _with(found: Catalogue, row: Row, scan: Told) -> Row:
    """The row with what its file tells of this part of it."""
    if not (scan.part or scan.split or scan.labels):
        return row
    values = row.values
    if scan.labels and found.table is None:
        values = tuple(dict(scan.labels).get(name, "") for name in found.labels)
    return Row(row.name, row.patient, row.split or scan.split, values, scan.part)


def _of_scans(told: Sequence[Told], writer: StoreWriter) -> dict[str, npt.NDArray[np.float64]]:
    """(N,) numbers of every row: which study and series it is of, where they are known, and its place there in mm."""
    numbers: dict[str, int] = {}
    study = np.array([numbers.setdefault(scan.study, len(numbers) + 1) if scan.study else np.nan for scan in told])
    scan, depth = writer.column("scan"), writer.scans("depth")
    volume = (depth > 1)[scan]
    return {
        "study": study[scan],
        "series": np.where(volume, scan + 1.0, np.nan),
        "position": np.where(volume, writer.column("slice") * writer.scans("spacing")[:, 0][scan], np.nan),
    }
