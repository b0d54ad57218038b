"""Which files are to be ingested, whose they are and what is known of them, before any is opened."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.labels import LabelTable, class_folders, read_split_file, relative_name
from sslmed.data.readers import SUFFIXES, listing
from sslmed.data.splits import SPLITS, UNLABELLED


@dataclass(frozen=True)
class Entry:
    """A file to ingest: path, name relative to the source, patient as written, split ("" unknown), CSV cells."""

    path: Path
    name: str
    patient: str
    split: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A file that is not in the store, and why."""

    file: str
    reason: str


@dataclass
class Catalogue:
    """The entries in the order of the store (sorted by name), what was left out, and what the user should know."""

    entries: list[Entry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def base_folder(source: Path) -> Path:
    """The folder that names are relative to: the source, or where it lies when it is one file."""
    return source.parent if source.is_file() else source


def patient_pattern(regex: str | None) -> re.Pattern[str] | None:
    """Compile ``--patient``."""
    try:
        return re.compile(regex) if regex is not None else None
    except re.error as error:
        raise UsageError(f"--patient {regex!r} is no regular expression: {error}.") from error


def catalogue(
    source: Path, table: LabelTable | None, pattern: re.Pattern[str] | None, ignore: Sequence[Path]
) -> Catalogue:
    """List the images under ``source``, each with its patient and labels.

    Args:
        source: a folder, or one image.
        table: the labels CSV, if any; files it does not name are skipped unless ``pattern`` tells their patient.
        pattern: finds the patient in a relative path: its first group, or the whole match.
        ignore: files that are known to be no images, such as the CSV itself.

    Raises:
        MissingInputError: no such source.
        DataError: no image under it.
    """
    files, others = listing(source)
    base = base_folder(source)
    apart = {path.resolve() for path in ignore}
    why = f"no image format that is read here ({', '.join(sorted(SUFFIXES))})"
    strays = [path for path in others if path.resolve() not in apart]
    found = Catalogue(skipped=[Skipped(relative_name(path.relative_to(base)), why) for path in strays])
    if not files:
        kinds = Counter(path.suffix or "no suffix" for path in others).most_common(5)
        others_text = ", ".join(f"{count} {suffix}" for suffix, count in kinds) or "nothing"
        raise DataError(f"no image in {source}: looked for {', '.join(sorted(SUFFIXES))}, found {others_text}.")
    if table is not None:
        found.labels, found.meta = table.labels, table.meta
        found.warnings += table.warnings
    for name, path in sorted((relative_name(path.relative_to(base)), path) for path in files):
        entry = _entry(path, name, table, pattern)
        if isinstance(entry, Entry):
            found.entries.append(entry)
        else:
            found.skipped.append(entry)
    if not found.entries:
        raise DataError(f"none of the {len(files)} images in {source} can be used: {found.skipped[-1].reason}.")
    if table is None:
        _assume(found, pattern)
    return found


def given_splits(
    found: Catalogue, rows: Sequence[Entry], patients: npt.NDArray[np.bytes_], file: Path | None
) -> npt.NDArray[np.uint8]:
    """The split of each row from ``--split FILE`` or from the ``split`` column.

    A row of which nothing is said follows the other images of its patient, else it is unlabelled.

    Returns:
        (N,) positions in SPLITS.
    """
    names = [entry.split for entry in rows]
    if file is not None:
        by, told = read_split_file(file)
        names = [told.get(entry.name if by == "file" else entry.patient, "") for entry in rows]
        if not any(names):
            raise DataError(f"{file} names none of the {by}s that were ingested (such as {rows[0].name!r}).")
        if absent := len(set(told) - {entry.name if by == "file" else entry.patient for entry in rows}):
            found.warnings.append(f"{absent} {by}s of {file.name} were not ingested")
    of_patient = {patient: name for patient, name in zip(patients.tolist(), names, strict=True) if name}
    split = [name or of_patient.get(patient, "") for patient, name in zip(patients.tolist(), names, strict=True)]
    if unknown := split.count(""):
        found.warnings.append(f"{unknown} images without a split are unlabelled")
    return np.array([SPLITS.index(name) if name else UNLABELLED for name in split], np.uint8)


def _entry(path: Path, name: str, table: LabelTable | None, pattern: re.Pattern[str] | None) -> Entry | Skipped:
    row = table.rows.get(name) if table is not None else None
    match = pattern.search(name) if pattern is not None else None
    patient = row.patient if row is not None else ""
    if not patient and match is not None:
        patient = (match[1] if match.re.groups else match[0]) or ""
    if not patient.strip():
        if pattern is not None:
            return Skipped(name, f"no patient: --patient {pattern.pattern!r} finds none in the path")
        if table is not None:
            return Skipped(name, "not in the labels CSV, so its patient is unknown")
        patient = name.encode("utf-8", "backslashreplace").decode()  # each file its own patient
    if row is None:
        return Entry(
            path, name, patient, "", ("",) * (len(table.labels) + len(table.meta)) if table is not None else ()
        )
    return Entry(path, name, patient, row.split, row.values)


def _assume(found: Catalogue, pattern: re.Pattern[str] | None) -> None:
    """What is taken for granted without a labels CSV, and said."""
    if pattern is None:
        found.warnings.append(
            "no --patient and no labels CSV: every file counts as a patient of its own, so images of one patient may "
            "lie on two sides of the split"
        )
    classes = class_folders(entry.name for entry in found.entries)
    if classes is None or len(set(zip(classes, (entry.patient for entry in found.entries), strict=True))) == len(
        set(classes)
    ):
        return  # no folders that could be classes, or one folder a patient
    found.labels = ("class",)
    found.entries = [
        Entry(entry.path, entry.name, entry.patient, entry.split, (folder,))
        for entry, folder in zip(found.entries, classes, strict=True)
    ]
    named = sorted(set(classes) - {""})
    found.warnings.append(
        f"no labels CSV: the {len(named)} folder names ({', '.join(named[:5])}{', …' if len(named) > 5 else ''}) "
        "are taken as the label 'class' and stand in the store; if they name patients, give --patient '([^/]+)/'"
    )
