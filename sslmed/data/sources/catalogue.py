"""Which files are to be ingested, whose they are and what is known of them, before any is opened."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.readers import SUFFIXES, Listing, is_dicom_file, listing
from sslmed.data.sources.labels import LabelTable, class_folders, read_split_file, relative_name
from sslmed.data.splits import SPLITS, UNLABELLED

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})  # whose folders may be classes
# Why a file is left out before anyone looks into it.
NO_FORMAT = f"no image format that is read here ({', '.join(sorted(SUFFIXES))})"
OUTSIDE = "a link that leads out of the source: not followed"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that is not in the store, or the first of so many, and why."""

    file: str
    reason: str
    files: int = 1


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one image, or of all slices of a scan alike: its file, whose it is, its split and CSV cells.

    ``part`` as in `Scan`; ``split`` and ``values`` "" where nothing is said.
    """

    name: str
    patient: str
    split: str
    values: tuple[str, ...]
    part: str = ""


@dataclass
class Catalogue:
    """The files in the order of the store (sorted by name), what was left out, and what the user should know.

    ``folders`` are the classes of the files by their folders, where these are taken as classes.
    """

    base: Path
    files: list[Path] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    labels: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    table: LabelTable | None = None
    pattern: re.Pattern[str] | None = None
    folders: dict[str, str] = field(default_factory=dict)

    def name(self, path: Path) -> str:
        """A file as it is called everywhere: its path relative to the source."""
        return relative_name(path.relative_to(self.base))

    def row(self, path: Path, patient: str = "") -> Row | None:
        """What is known of a file; None when nobody says whose it is.

        Args:
            patient: as the file itself says.
        """
        name = self.name(path)
        told = self.table.row(name) if self.table is not None else None
        match = self.pattern.search(name) if self.pattern is not None else None
        who = told.patient if told is not None else ""
        if not who and match is not None:
            who = (match[1] if match.re.groups else match[0]) or ""
        who = who if who.strip() else patient
        if not who.strip():
            return None
        return Row(name, who, told.split if told else "", self._values(name, told.values if told else None))

    def alone(self, path: Path, part: str = "") -> Row:
        """What is known of a file, or of a part of it, of which nobody says whose it is: a patient of its own."""
        name = self.name(path)
        told = self.table.row(name) if self.table is not None else None
        who = f"{name}#{part}" if part else name
        who = who.encode("utf-8", "backslashreplace").decode()
        return Row(name, who, told.split if told else "", self._values(name, told.values if told else None), part)

    def _values(self, name: str, told: tuple[str, ...] | None) -> tuple[str, ...]:
        if self.folders:
            return (self.folders[name],)
        return told if told is not None else ("",) * (len(self.labels) + len(self.meta))


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
    """List the images under ``source``.

    Args:
        source: a folder, or one image.
        table: the labels CSV, if any; files it does not name are skipped unless ``pattern``, or a DICOM file itself,
            tells their patient.
        pattern: finds the patient in a relative path: its first group, or the whole match.
        ignore: files and folders that are known to hold no images, such as the CSV itself or the masks.

    Raises:
        MissingInputError: no such source.
        DataError: no image under it.
    """
    listed = listing(source)
    found = Catalogue(base_folder(source), table=table, pattern=pattern)
    apart = [path.resolve() for path in ignore]
    files = sorted(_without(listed.images, apart), key=found.name)
    _leave_out(found, listed, apart)
    if not files:
        kinds = Counter(path.suffix or "no suffix" for path in listed.others).most_common(5)
        others = ", ".join(f"{count} {suffix}" for suffix, count in kinds) or "nothing"
        raise DataError(f"no image in {source}: looked for {', '.join(sorted(SUFFIXES))}, found {others}.")
    if table is not None:
        found.labels, found.meta = table.labels, table.meta
        found.warnings += table.warnings
    for path in files:
        if why := _stranger(found, path):
            found.skipped.append(Skipped(found.name(path), why))
        else:
            found.files.append(path)
    if not found.files:
        raise DataError(f"none of the {len(files)} images in {source} can be used: {found.skipped[-1].reason}.")
    if table is None:
        _assume_classes(found)
    return found


def given_splits(
    found: Catalogue, rows: Sequence[Row], patients: npt.NDArray[np.bytes_], file: Path | None
) -> npt.NDArray[np.uint8]:
    """The split of each row from ``--split FILE``, from the ``split`` column or from the files themselves.

    A row of which nothing is said follows the other images of its patient, else it is unlabelled.

    Returns:
        (N,) positions in SPLITS.
    """
    names = [row.split for row in rows]
    if file is not None:
        by, told = read_split_file(file)
        names = [told.get(row.name if by == "file" else row.patient, "") for row in rows]
        if not any(names):
            raise DataError(f"{file} names none of the {by}s that were ingested (such as {rows[0].name!r}).")
        if absent := len(set(told) - {row.name if by == "file" else row.patient for row in rows}):
            found.warnings.append(f"{absent} {by}s of {file.name} were not ingested")
    of_patient = {patient: name for patient, name in zip(patients.tolist(), names, strict=True) if name}
    split = [name or of_patient.get(patient, "") for patient, name in zip(patients.tolist(), names, strict=True)]
    if unknown := split.count(""):
        found.warnings.append(f"{unknown} images without a split are unlabelled")
    return np.array([SPLITS.index(name) if name else UNLABELLED for name in split], np.uint8)


def _without(paths: Iterable[Path], apart: Sequence[Path]) -> list[Path]:
    if not apart:
        return list(paths)
    folders = {folder for folder in apart if folder.is_dir()}
    files = set(apart) - folders
    return [
        path
        for path in paths
        if (real := path.resolve()) not in files and not any(folder in real.parents for folder in folders)
    ]


def _leave_out(found: Catalogue, listed: Listing, apart: Sequence[Path]) -> None:
    for paths, why in ((_without(listed.others, apart), NO_FORMAT), (_without(listed.outside, apart), OUTSIDE)):
        found.skipped += [Skipped(found.name(path), why) for path in paths]


def _stranger(found: Catalogue, path: Path) -> str:
    """Why a file cannot be used for want of a patient; "" when it can, or its content may tell."""
    if found.table is None and found.pattern is None:
        return ""
    if found.row(path) is not None or is_dicom_file(path):
        return ""
    if found.pattern is not None:
        return f"no patient: --patient {found.pattern.pattern!r} finds none in the path"
    return "not in the labels CSV, so its patient is unknown"


def _assume_classes(found: Catalogue) -> None:
    """Folders of pictures as classes, which is said; never those of scans, which are mostly called after patients."""
    if any(path.suffix.lower() not in PICTURES for path in found.files):
        return
    names = [found.name(path) for path in found.files]
    classes = class_folders(names)
    if classes is None:
        return
    patients = [found.row(path) or found.alone(path) for path in found.files]
    if len(set(zip(classes, (row.patient for row in patients), strict=True))) == len(set(classes)):
        return  # one folder a patient
    found.labels = ("class",)
    found.folders = dict(zip(names, classes, strict=True))
    named = sorted(set(classes) - {""})
    found.warnings.append(
        f"no labels CSV: the {len(named)} folder names ({', '.join(named[:5])}{', …' if len(named) > 5 else ''}) "
        "are taken as the label 'class' and stand in the store; if they name patients, give --patient '([^/]+)/'"
    )
