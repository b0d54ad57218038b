"""What is known of each row of a store that is being made: whose it is, its split, labels and meta columns."""

from collections.abc import Mapping, Sequence
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


def rows_of(found: Catalogue, told: Sequence[Told], depths: Sequence[int], wanted: Sequence[Unit]) -> list[list[Row]]:
    """What is known of each row of each scan; see `rows_of_scan`. What is taken for granted is said."""
    adopt_labels(found, told)
    others = other_names(found, told, wanted)
    rows = [rows_of_scan(found, scan, depth, wanted, others) for scan, depth in zip(told, depths, strict=True)]
    warn_of_strangers(found, [each for _, each in rows])
    return [each for each, _ in rows]


def other_names(found: Catalogue, told: Sequence[Told], wanted: Sequence[Unit]) -> dict[str, str]:
    """By PatientID, what the labels CSV or ``--patient`` calls that patient, where it calls him by one name.

    Series of which the CSV says nothing are of the same patient as those of which it does.
    """
    names: dict[str, set[str]] = {}
    for scan in told:
        if who := _same(scan.patient):
            paths = [Path(source) for source in scan.sources] or [wanted[scan.unit].paths[0]]
            names.setdefault(who, set()).update(row.patient for path in paths if (row := found.row(path)))
    return {who: next(iter(given)) for who, given in names.items() if len(given) == 1}


def _same(patient: str) -> str:
    return " ".join(patient.casefold().split())


def rows_of_scan(
    found: Catalogue, scan: Told, depth: int, wanted: Sequence[Unit], others: Mapping[str, str]
) -> tuple[list[Row], str]:
    """What is known of each row of a scan, and what stood in for its patient: "", "study" or "file".

    Whose a scan is the labels CSV says, else ``--patient``, else its DICOM file: PatientID, or without one the study,
    of which at least the series belong together. Else it is a patient of its own.

    Args:
        others: see `other_names`.

    Raises:
        DataError: slices of one series belong to several patients.
    """
    paths = [Path(source) for source in scan.sources] or [wanted[scan.unit].paths[0]]
    whose = others.get(_same(scan.patient), scan.patient) or (f"study {scan.study}" if scan.study else "")
    instead = "study" if scan.study and not scan.patient.strip() else ""
    of_slices = [found.row(path) for path in paths]
    if any(of_slices):
        instead = ""
    else:
        of_slices = [found.row(path, whose) for path in paths]
    if not any(of_slices):
        instead = "file"
        # A part in a folder of parts is one image of many, another one a volume of the file's patient.
        alone = [found.alone(path, scan.part if "/" in scan.part else "") for path in paths]
        of_slices = [replace(row, patient=alone[0].patient) for row in alone]
    rows = [_with(found, row, scan) for row in _of_one(found, paths, of_slices)]
    return rows * (depth // len(paths)), instead


def warn_of_strangers(found: Catalogue, instead: Sequence[str]) -> None:
    """Say of how many scans nobody told the patient, from what stood in for it."""
    whole = len(instead)
    if own := instead.count("file"):
        found.warnings.append(
            f"nobody says whose {own} of {whole} scans are (no --patient, no labels CSV, no DICOM PatientID): each "
            "of their files counts as a patient of its own, so images of one patient may lie on two sides of the split"
        )
    if studies := instead.count("study"):
        found.warnings.append(
            f"{studies} of {whole} scans have no PatientID: each study counts as a patient of its own, so images of "
            "one patient may lie on two sides of the split"
        )


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


def adopt_labels(found: Catalogue, told: Sequence[Told]) -> None:
    """Labels that stand in the files of images themselves, where no CSV names others."""
    if found.table is None and not found.folders and not found.labels:
        found.labels = tuple(dict.fromkeys(name for scan in told for name, _ in scan.labels))


def _of_one(found: Catalogue, paths: Sequence[Path], rows: Sequence[Row | None]) -> list[Row]:
    """The rows of the slices of one scan; a slice of which nothing is said has its scan's patient and split."""
    known = [row for row in rows if row is not None]
    if other := next((row for row in known if row.patient != known[0].patient), None):
        raise DataError(
            f"{known[0].name} and {other.name} are slices of one series, but belong to different patients. "
            "Mend the labels CSV, or --patient."
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
