"""Labels that come as a CSV: read, checked line by line, and turned into class numbers.

Columns: ``file`` and ``patient``, optional ``split``, then ``label:NAME`` and ``meta:NAME``; the label columns of a CSV
without such prefixes are named by the caller. One text column is a class, several 0/1 columns are multi-label, blank is
unlabelled.
"""

import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.shards.format import LabelColumn, MetaColumn
from sslmed.data.sources.csv_table import read_csv, some
from sslmed.data.splits import SPLITS

MOST_CLASSES = 32_000  # class numbers are int16
MOST_CATEGORIES = 1_000  # a text with more values is an identifier, and no identifier may enter a store
CLASS_FOLDERS = range(2, 101)

_WHOLE = re.compile(r"[+-]?\d+(\.0+)?")


@dataclass(frozen=True)
class LabelRow:
    """What the CSV says of one file; ``values`` holds the label and then the meta cells, stripped, "" where blank."""

    line: int
    patient: str
    split: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class LabelTable:
    """A labels CSV: ``rows`` by path relative to the source (POSIX, NFC), of a file or of a folder.

    ``absent`` are files that are named, but not among the names that were given to `read_labels`.
    """

    rows: dict[str, LabelRow]
    labels: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def row(self, name: str) -> LabelRow | None:
        """What is said of a file, or else of the nearest folder that holds it; None when nothing is."""
        if name in self.rows:
            return self.rows[name]
        return next(
            (self.rows[str(folder)] for folder in PurePosixPath(name).parents if str(folder) in self.rows), None
        )


def relative_name(path: Path | str) -> str:
    """A relative path as it is compared: POSIX separators, NFC (file systems and spreadsheets disagree on é)."""
    return unicodedata.normalize("NFC", Path(os.path.normpath(path)).as_posix())


def read_labels(
    path: Path,
    source: Path,
    label_columns: Sequence[str] = (),
    *,
    need_patient: bool = True,
    names: Collection[str] | None = None,
) -> LabelTable:
    """Read a labels CSV.

    Args:
        path: the CSV, UTF-8 with or without BOM, separated by commas.
        source: the folder of the images; cells of ``file`` are relative to it or to the CSV's folder, and name a file
            or a folder, which stands for all that is below it.
        label_columns: names of the label columns that have no ``label:`` prefix.
        need_patient: whether each row must name its patient.
        names: of the files that there are, when the disk is not to be asked.

    Raises:
        MissingInputError: there is no such CSV.
        UsageError: ``label_columns`` names what the CSV does not have.
        DataError: it is no such CSV, lacks a column, contradicts itself, or names files that do not exist.
    """
    header, lines = read_csv(path)
    if "file" not in header:
        raise DataError(
            f"{path} has no column 'file'. Its columns: {some(header, 12)}. Rename the one that holds the paths."
        )
    if need_patient and "patient" not in header:
        raise DataError(
            f"{path} has no column 'patient'. Its columns: {some(header, 12)}.\n"
            "Without patients the splits would leak: add the column, or give --patient REGEX to take it from the paths."
        )
    labels, meta, unused = _choose_columns(path, header, label_columns)
    table = LabelTable({}, labels=tuple(map(_bare, labels)), meta=tuple(map(_bare, meta)))
    if unused:
        table.warnings.append(
            f"columns of {path.name} that were not used: {some(unused, 12)} (labels: --label-columns NAME,NAME)"
        )
    places = _Places(path, source, None if names is None else frozenset(names))
    _fill(table, places, lines, [header.index(name) for name in (*labels, *meta)], header, need_patient)
    return table


def read_split_file(path: Path) -> tuple[str, dict[str, str]]:
    """Read a CSV with the columns ``split`` and either ``file`` or ``patient``.

    Returns:
        "file" or "patient", and the split by relative path or by patient.
    """
    header, lines = read_csv(path)
    by = "file" if "file" in header else "patient"
    if by not in header or "split" not in header:
        raise DataError(f"{path} needs the columns 'split' and either 'file' or 'patient'; it has {some(header, 12)}.")
    splits: dict[str, str] = {}
    for line, cells in lines:
        name = cells[header.index(by)]
        name = relative_name(name) if by == "file" else name
        split = _split(path, line, cells[header.index("split")])
        if splits.setdefault(name, split) != split:
            raise DataError(f"{path}, line {line}: {by} {name!r} is in {splits[name]} and in {split}.")
    return by, splits


def encode_labels(name: str, values: Sequence[str]) -> tuple[LabelColumn, npt.NDArray[np.int16]]:
    """Turn the cells of a label into class numbers, (N,), -1 where blank.

    Classes are sorted, by number when all are whole numbers (1.0, as spreadsheets write it, is 1).
    """
    given = sorted({value for value in values if value})
    if len(given) > MOST_CLASSES:
        raise DataError(
            f"label {name!r} has {len(given)} different values; at most {MOST_CLASSES} classes are possible."
        )
    if all(_WHOLE.fullmatch(value) for value in given):
        classes = tuple(map(str, sorted({int(float(value)) for value in given})))
        number = {text: position for position, text in enumerate(classes)}
        place = {value: number[str(int(float(value)))] for value in given}
    else:
        classes = tuple(given)
        place = {value: position for position, value in enumerate(classes)}
    if classes and set(classes) <= {"0", "1"}:
        place = {value: int(float(value)) for value in given}
        column = LabelColumn(name, "binary", ("0", "1"))
    else:
        column = LabelColumn(name, "class", classes)
    return column, np.array([place.get(value, -1) for value in values], np.int16)


def encode_meta(name: str, values: Sequence[str]) -> tuple[MetaColumn, npt.NDArray[Any]]:
    """The cells of a meta column as float64 numbers (NaN where blank) or int32 positions in the categories (-1)."""
    try:
        numbers = np.array([float(value) if value else np.nan for value in values], np.float64)
    except ValueError:
        categories = tuple(sorted({value for value in values if value}))
        if len(categories) > MOST_CATEGORIES:
            raise DataError(
                f"meta column {name!r} has {len(categories)} different texts, so it looks like an identifier, and "
                f"none may be inside a store. Leave it out, or group it to at most {MOST_CATEGORIES} values."
            ) from None
        place = {value: number for number, value in enumerate(categories)}
        return MetaColumn(name, "category", categories), np.array([place.get(value, -1) for value in values], np.int32)
    return MetaColumn(name, "number"), numbers


def class_folders(names: Iterable[str]) -> list[str] | None:
    """The class of each relative path by its immediate folder ("" without one), or None when folders are no classes.

    Folders are classes when there are 2 to 100 of them, at least two images each on average, not named like splits.
    """
    folders = [Path(name).parent.name for name in names]
    distinct = set(folders) - {""}
    usual = {*SPLITS, "valid", "validation", "images"}
    if (
        len(distinct) not in CLASS_FOLDERS
        or {name.lower() for name in distinct} <= usual
        or len(folders) < 2 * len(distinct)
    ):
        return None
    return folders


# What read_labels and read_split_file are made of.


def _choose_columns(path: Path, header: list[str], named: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    known = {_bare(name): name for name in header if name not in ("file", "patient", "split")}
    known |= {name: name for name in known.values()}
    if absent := [name for name in named if name not in known]:
        raise UsageError(
            f"--label-columns: {path} has no label column {absent[0]!r}; it has {some(sorted(set(known.values())))}."
        )
    labels = [name for name in header if name.startswith("label:") or name in {known[each] for each in named}]
    meta = [name for name in header if name.startswith("meta:") and name not in labels]
    for group in (labels, meta):
        bare = [_bare(name) for name in group]
        if "" in bare or len(set(bare)) < len(bare):
            raise DataError(
                f"{path}: each of the columns {some(group)} needs a name of its own after 'label:' or 'meta:'."
            )
    unused = [name for name in header if name not in ("file", "patient", "split", *labels, *meta)]
    return labels, meta, unused


def _fill(
    table: LabelTable,
    places: "_Places",
    lines: list[tuple[int, list[str]]],
    columns: list[int],
    header: list[str],
    need_patient: bool,
) -> None:
    path, source = places.path, places.source
    file, patient, split = (header.index(name) if name in header else None for name in ("file", "patient", "split"))
    absent, outside, repeated = [], 0, 0
    for line, cells in lines:
        who = cells[patient] if patient is not None else ""
        if need_patient and not who:
            raise DataError(
                f"{path}, line {line}: the patient of {cells[file or 0]!r} is blank. Name it, or give --patient REGEX."
            )
        side = _split(path, line, cells[split]) if split is not None else ""
        name = places.locate(line, cells[file or 0])
        if name is None:
            absent.append(cells[file or 0])
            continue
        if name.startswith("../"):
            outside += 1
            continue
        row = LabelRow(line, who, side, tuple(cells[column] for column in columns))
        before = table.rows.setdefault(name, row)
        repeated += before is not row
        if (before.patient, before.split, before.values) != (row.patient, row.split, row.values):
            raise DataError(
                f"{path}: lines {before.line} and {line} say different things of {name!r}. Keep one of them."
            )
    if absent and places.names is not None:
        table.absent.extend(absent)
    elif absent:
        raise DataError(
            f"{path} names {len(absent)} file{'s' * (len(absent) > 1)} that do not exist: {some(absent)}.\n"
            f"Paths are relative to {source} or to the CSV's folder. Mend the paths, or remove these rows."
        )
    if outside:
        table.warnings.append(f"{outside} rows of {path.name} name files outside {source}: not read")
    if repeated:
        table.warnings.append(f"{repeated} rows of {path.name} repeat another row")


class _Places:
    """Finds the files that the cells of a CSV name; see `read_labels`."""

    def __init__(self, path: Path, source: Path, names: frozenset[str] | None) -> None:
        self.path, self.source, self.names = path, source, names
        self._bases = [str(source.absolute()), str(path.parent.absolute())]
        self._folders = {str(folder) for name in names or () for folder in PurePosixPath(name).parents}

    def locate(self, line: int, cell: str) -> str | None:
        """The cell's file or folder relative to the source, or None when it does not exist."""
        if not cell:
            raise DataError(f"{self.path}, line {line}: the file is blank.")
        if "\0" in cell:
            raise DataError(f"{self.path}, line {line}: the file holds a NUL character.")
        inside = False
        for written in dict.fromkeys(
            (cell, unicodedata.normalize("NFC", cell), unicodedata.normalize("NFD", cell), cell.replace("\\", "/"))
        ):
            for base in self._bases:
                full = Path(os.path.normpath(Path(base, written)))  # not resolved: links in the source are the user's
                if not any(full.is_relative_to(os.path.normpath(each)) for each in self._bases):
                    continue
                inside = True
                name = relative_name(os.path.relpath(full, self._bases[0]))
                if self._exists(full, name):
                    return name
        if not inside:
            raise DataError(
                f"{self.path}, line {line}: {cell!r} leads out of {self._bases[0]}. "
                "Use paths relative to it or to the CSV's folder."
            )
        return None

    def _exists(self, full: Path, name: str) -> bool:
        if self.names is not None:
            return name in self.names or name in self._folders
        return full.is_file() or full.is_dir()


def _split(path: Path, line: int, cell: str) -> str:
    if cell and cell.lower() not in SPLITS:
        raise DataError(f"{path}, line {line}: split {cell!r} is none of {', '.join(SPLITS)}.")
    return cell.lower()


def _bare(column: str) -> str:
    return column.removeprefix("label:").removeprefix("meta:").strip()
