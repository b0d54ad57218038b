"""``sslmed label``: labels, masks and boxes that come after the images; the pixels stay as they are."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.console import command
from sslmed.data.annotations.attach import Report, Sources
from sslmed.data.annotations.label_columns import Described, Labelled
from sslmed.data.identity import SiteKey
from sslmed.data.sources import private
from sslmed.data.sources.labels import LabelTable, encode_labels, encode_meta, read_labels
from sslmed.data.splits import SPLITS
from sslmed.data.store import Store
from sslmed.durable import write_json

REPORT = "label_report.json"

Counts = dict[str, dict[str, int]]  # class -> split -> how many


@dataclass(frozen=True)
class LabelResult:
    """What `label` did, and what the store has now.

    ``labels`` and ``masks`` count images, ``boxes`` boxes, by class and split. ``absent`` are files that the CSV names
    and the store does not have; ``problems`` is what else was left out, each with file, code and reason.
    """

    path: Path
    report: Path
    rows: int
    labels: dict[str, Counts]
    masks: Counts
    boxes: Counts
    absent: tuple[str, ...]
    problems: tuple[Mapping[str, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    summary: tuple[str, ...]
    next: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """The same for people, a line each."""
        lines = [f"{self.path}: {self.rows} images"]
        lines += [f"  label {name}: {_words(counts)}" for name, counts in self.labels.items()]
        lines += [f"  masks, images that hold a class: {_words(self.masks)}"] if self.masks else []
        lines += [f"  boxes: {_words(self.boxes)}"] if self.boxes else []
        lines += self.summary
        if self.absent:
            lines.append(f"{len(self.absent)} files of the CSV are not in the store, such as {self.absent[0]!r}")
        if self.absent or self.problems:
            lines.append(f"all that was left out is listed in {self.report}")
        return lines + [f"warning: {warning}" for warning in self.warnings]


def label(
    store: Path | str,
    *,
    labels: Path | str | None = None,
    label_columns: Sequence[str] = (),
    masks: Path | str | None = None,
    mask_classes: Sequence[str] = (),
    boxes: Path | str | None = None,
    replace: bool = False,
) -> LabelResult:
    """Add labels, masks and boxes to a store. Pixels, patients and splits stay; all that is new appears at once.

    The images are found by their file names in the key table beside the store.

    Args:
        store: the store's folder.
        labels: CSV with ``file`` and ``label:NAME`` or ``meta:NAME`` columns. ``file`` names an image, a slice of a
            series, or a folder: then all images below it. Blank cells change nothing.
        label_columns: the label columns of a CSV that does not use the prefix.
        masks: folder of masks that are called like their images.
        mask_classes: names of the values 0, 1, ... of the masks.
        boxes: COCO JSON, or a folder of Pascal VOC XML files.
        replace: let what comes take the place of what the store has, where they differ.

    Raises:
        UsageError, MissingInputError, DataError, DiskError, TemporaryError.
    """
    path = Path(store)
    table_path, sources = _inputs(labels, label_columns, masks, mask_classes, boxes)
    opened = Store(path)
    known = _key_table(path, len(opened))
    table = _table(table_path, label_columns, known) if table_path is not None else None
    labelled, described = _columns(table, known) if table is not None else ([], [])
    report = sources.attach(path, known["file"], parts=known["part"], labels=labelled, meta=described, replace=replace)
    result = _result(path, table, report)
    write_json(result.report, result.as_dict())
    result.report.chmod(0o600)
    return result


def _inputs(
    labels: Path | str | None,
    label_columns: Sequence[str],
    masks: Path | str | None,
    mask_classes: Sequence[str],
    boxes: Path | str | None,
) -> tuple[Path | None, Sources]:
    if labels is None and masks is None and boxes is None:
        raise UsageError("nothing to add: give --labels CSV, --masks DIR or --boxes DIR|COCO.json.")
    if label_columns and labels is None:
        raise UsageError("--label-columns names columns of a CSV: give --labels CSV too.")
    paths = [Path(given) if given is not None else None for given in (labels, masks, boxes)]
    return paths[0], Sources(paths[1], tuple(mask_classes), paths[2])


def _key_table(store: Path, rows: int) -> dict[str, list[str]]:
    """The columns ``file``, ``patient`` and ``part`` of the key table, of every row, and ``source``, of one entry."""
    folder = private.folder_of(store)
    path = folder / private.KEY_TABLE
    if not path.is_file():
        raise MissingInputError(
            f"no key table at {path}: it says which file each image was, and lies beside the store since it names "
            f"patients.\nBring the folder {folder.name} back, or ingest the images again with their labels."
        )
    columns: dict[str, list[str]] = {"file": [""] * rows, "patient": [""] * rows, "part": [""] * rows}
    seen = np.zeros(rows, bool)
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            for line in csv.DictReader(file):
                row = int(line["sample"])
                seen[row] = True
                for name, values in columns.items():
                    values[row] = line[name]
    except (OSError, ValueError, KeyError, IndexError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error!r}). Ingest the images again with their labels.") from error
    if not seen.all():
        raise DataError(f"{path} tells {seen.sum()} of the {rows} images of {store}: it is another store's.")
    return columns | {"source": [_source(folder)]}


def _source(folder: Path) -> str:
    """Where the images were when they were ingested; "" when nobody knows any more."""
    try:
        return str(json.loads((folder / private.REPORT).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _table(path: Path, label_columns: Sequence[str], known: Mapping[str, Sequence[str]]) -> LabelTable:
    files = set(known["file"])
    source = Path(known["source"][0] or path.parent)
    if source.name in files and len(files) == 1:
        source = source.parent
    table = read_labels(path, source, label_columns, need_patient=False, names=files)
    if not table.labels and not table.meta:
        raise DataError(f"{path} has no label column: name them label:NAME, or give --label-columns.")
    if not table.rows:
        raise DataError(
            f"{path} names none of the images of the store, such as {known['file'][0]!r}; it names {table.absent[0]!r}."
            if table.absent
            else f"{path} names no image."
        )
    if any(row.split for row in table.rows.values()):
        table.warnings.append(f"{path.name} has a column split; a store's splits never change, so it was not read")
    return table


def _columns(table: LabelTable, known: Mapping[str, Sequence[str]]) -> tuple[list[Labelled], list[Described]]:
    """The columns of the CSV for every row of the store."""
    blank = ("",) * (len(table.labels) + len(table.meta))
    same = SiteKey(b"")  # under any key two spellings of one patient are alike
    told = {file: table.row(file) for file in dict.fromkeys(known["file"])}
    values = []
    for file, patient in zip(known["file"], known["patient"], strict=True):
        row = told[file]
        if row is not None and row.patient and same.patient(row.patient) != same.patient(patient):
            raise DataError(
                f"line {row.line} of the labels CSV gives {file!r} another patient than it was ingested with (the key "
                "table beside the store says which). One of them is wrong; a store's patients never change."
            )
        values.append(row.values if row is not None else blank)
    cells = list(zip(*values, strict=True))
    labels = [encode_labels(name, column) for name, column in zip(table.labels, cells, strict=False)]
    meta = [encode_meta(name, column) for name, column in zip(table.meta, cells[len(labels) :], strict=True)]
    return labels, meta


def _result(path: Path, table: LabelTable | None, report: Report) -> LabelResult:
    store = Store(path)
    split = store.index.split
    labels = {name: _counts(column.classes, store.target(name), split) for name, column in store.labels.items()}
    presence = store.annotations.mask_presence()
    mask_rows, mask_numbers = np.nonzero(presence)
    masks = _counts(store.mask_classes, mask_numbers, split[mask_rows])
    box_rows, box_numbers = store.annotations.every_box()
    boxes = _counts(store.box_classes, box_numbers, split[box_rows])
    target = store.default_target()
    recipe = f"{store.modality}/simclr_resnet18"
    return LabelResult(
        path=path,
        report=private.folder_of(path) / REPORT,
        rows=len(store),
        labels=labels,
        masks=masks,
        boxes=boxes,
        absent=tuple(table.absent) if table is not None else (),
        problems=tuple(asdict(problem) for problem in report.problems),
        notes=tuple(report.notes),
        warnings=tuple(table.warnings) if table is not None else (),
        summary=tuple(report.lines()),
        next=command("sslmed", "evaluate", "RUN", "--data", path)
        if target is not None
        else command("sslmed", "pretrain", recipe, "--data", path, "--out", path.parent / "run"),
    )


def _counts(names: Sequence[str], numbers: npt.NDArray[Any], split: npt.NDArray[np.uint8]) -> Counts:
    """How often each class stands in each split; a number below 0 is none."""
    there = numbers >= 0
    places = numbers[there].astype(np.int64) * len(SPLITS) + split[there]
    table = np.bincount(places, minlength=len(names) * len(SPLITS)).reshape(len(names), len(SPLITS)).tolist()
    return {
        name: {side: count for side, count in zip(SPLITS, counts, strict=True) if count}
        for name, counts in zip(names, table, strict=True)
    }


def _words(counts: Counts) -> str:
    def one(name: str, by_split: Mapping[str, int]) -> str:
        where = ", ".join(f"{split} {count}" for split, count in by_split.items())
        return f"{name} {sum(by_split.values())}" + (f" ({where})" if where else "")

    return "; ".join(one(name, by_split) for name, by_split in counts.items())
