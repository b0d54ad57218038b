"""``sslmed ingest``: a folder of images becomes a checked, patient-aware store."""

import csv
import json
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, TemporaryError, UsageError
from sslmed.console import command, progress
from sslmed.data import splits
from sslmed.data.catalogue import Catalogue, Entry, Skipped, base_folder, catalogue, given_splits, patient_pattern
from sslmed.data.identity import SiteKey, load_or_make_key
from sslmed.data.labels import encode_labels, encode_meta, read_labels
from sslmed.data.modality import accept_scan, named
from sslmed.data.readers import read
from sslmed.data.store_format import LabelColumn, MetaColumn
from sslmed.data.store_writer import SHARD_BYTES, StoreWriter, disk_errors, refuse_existing
from sslmed.data.views import shrink
from sslmed.data.workers import follow
from sslmed.durable import write_atomically

_SMALLEST = 16  # pixels of the shorter side
_BATCH = 8  # files a task of a worker


@dataclass(frozen=True)
class IngestResult:
    """What `ingest` made.

    ``splits`` counts images and patients by split, ``labels`` images by label and class. ``skipped`` has every file
    that is not in the store, with the reason; ``next`` is the command to go on with.
    """

    path: Path
    private: Path
    key: Path
    images: int
    patients: int
    splits: dict[str, dict[str, int]]
    labels: dict[str, dict[str, int]]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    next: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """The same for people, a line each."""
        lines = [f"{self.images} images of {self.patients} patients in {self.path}"]
        lines += [f"  {split}: {n['images']} images, {n['patients']} patients" for split, n in self.splits.items()]
        for label, classes in self.labels.items():
            lines.append(f"  label {label}: " + ", ".join(f"{name} {count}" for name, count in classes.items()))
        reasons = Counter(skipped.reason for skipped in self.skipped)
        if self.skipped:
            lines.append(f"skipped {len(self.skipped)} files; all are listed in {self.private / 'data_report.json'}")
            for skipped in self.skipped[:5] if len(reasons) > 3 or len(self.skipped) <= 5 else ():
                lines.append(f"  {skipped.file}: {skipped.reason}")
            if len(self.skipped) > 5 and len(reasons) <= 3:
                lines += [f"  {count} files: {reason}" for reason, count in reasons.most_common()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines


def ingest(
    source: Path | str,
    out: Path | str,
    *,
    modality: str,
    labels: Path | str | None = None,
    label_columns: Sequence[str] = (),
    patient: str | None = None,
    split: Path | str | None = None,
    key: Path | str | None = None,
    size: int | None = None,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> IngestResult:
    """Read every image under ``source`` and write the store ``out``; report and key table go to ``OUT.private``.

    The store is the same whatever ``workers`` is; it appears whole at the end or not at all.

    Args:
        source: a folder of images, or one image.
        out: the store's folder, which must not exist.
        modality: what kind of image, such as ``xray``.
        labels: CSV with ``file``, ``patient`` and perhaps ``split``, ``label:NAME``, ``meta:NAME``; else class folders.
        label_columns: the label columns of a CSV that does not use the prefix.
        patient: regular expression for the patient in a path relative to ``source``: first group, or whole match.
        split: CSV with ``split`` and ``file`` or ``patient``; else the ``split`` column, else 70/10/20 by patient.
        key: the site key that hides the patients; by default ``site.key`` beside the store, made when absent.
        size: shrink images whose shorter side is longer than this many pixels; by default they stay as they are.
        workers: processes that read images beside this one.
        shard_bytes: greatest size of one shard file, before compression.

    Raises:
        UsageError, MissingInputError, DataError, OutputExistsError, DiskError, TemporaryError.
    """
    source, out = Path(source), Path(out)
    labels, split = (Path(given) if given is not None else None for given in (labels, split))
    policy, pattern = named(modality), patient_pattern(patient)
    _check_numbers(size, workers)
    if label_columns and labels is None:
        raise UsageError("--label-columns names columns of a CSV: give --labels CSV too.")
    refuse_existing(out)
    found = _catalogue(source, labels, label_columns, pattern, split)
    key_path = Path(key) if key is not None else out.parent / "site.key"
    site_key = _site_key(key_path, found)
    load = _Load(policy.name, size, site_key)
    with StoreWriter(out, modality=policy.name, key_id=site_key.id, shard_bytes=shard_bytes) as writer:
        rows: list[Entry] = []
        for entry, image in progress(_loaded(load, found.entries, workers), len(found.entries), "ingest"):
            if isinstance(image, str):
                found.skipped.append(Skipped(entry.name, image))
                continue
            pseudonym = site_key.patient(entry.patient)
            writer.add(image.pixels, patient=pseudonym, low=image.low, high=image.high, content=image.content)
            rows.append(entry)
        if not rows:
            raise DataError(_all_bad(source, found))
        label_columns_read, meta_columns_read = _columns(found, rows)
        sides = _sides(found, rows, writer, label_columns_read, split)
        _warn_of_twins(found, writer.column("content"))
        result = _result(out, key_path, found, writer, sides, label_columns_read)
        _write_private(result, source, rows, writer.column("patient"))
        digest = splits.digest(writer.column("patient"), sides)
        writer.finish(split=sides, split_digest=digest, labels=label_columns_read, meta=meta_columns_read)
    return result


# The steps, in their order.

Labelled = list[tuple[LabelColumn, npt.NDArray[np.int16]]]
Described = list[tuple[MetaColumn, npt.NDArray[Any]]]


def _check_numbers(size: int | None, workers: int) -> None:
    if size is not None and size < _SMALLEST:
        raise UsageError(f"--size {size}: the shorter side needs at least {_SMALLEST} pixels.")
    if workers < 0:
        raise UsageError(f"--workers {workers}: give 0 or more processes.")


def _catalogue(
    source: Path, labels: Path | None, label_columns: Sequence[str], pattern: Any, split: Path | None
) -> Catalogue:
    ignore = [path for path in (labels, split) if path is not None]
    if labels is None:
        return catalogue(source, None, pattern, ignore)
    if not source.exists():
        catalogue(source, None, pattern, ignore)  # says that the source is missing before the CSV is blamed
    table = read_labels(labels, base_folder(source), label_columns, need_patient=pattern is None)
    if not table.labels:
        table.warnings.append(f"{labels.name} has no label column: name them label:NAME, or give --label-columns")
    return catalogue(source, table, pattern, ignore)


def _site_key(path: Path, found: Catalogue) -> SiteKey:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        found.notes.append(f"made the site key {path}: keep it secret and use it (--key) for every store of this site")
    return load_or_make_key(path)


@dataclass(frozen=True)
class _Image:
    pixels: npt.NDArray[Any]
    low: float
    high: float
    content: str


@dataclass(frozen=True)
class _Load:
    """Reads one file into what the store keeps; a string says why it cannot be used."""

    modality: str
    size: int | None
    key: SiteKey

    def __call__(self, path: Path) -> _Image | str:
        policy = named(self.modality)
        try:
            pixels = accept_scan(policy, read(path))
        except DataError as error:
            return str(error).removeprefix(f"{path}: ")
        # Both of the image as it came: stores of other sizes know it again, and predict finds the same range.
        content = self.key.content(pixels)
        low, high = policy.intensity_range(pixels)
        if self.size is not None:
            pixels = shrink(pixels, self.size)
        return _Image(pixels, low, high, content)

    def many(self, paths: Sequence[Path]) -> list[_Image | str]:
        return [self(path) for path in paths]


def _loaded(load: _Load, entries: Sequence[Entry], workers: int) -> Iterator[tuple[Entry, _Image | str]]:
    """Each entry with its image, in order; with workers, a few batches ahead of the writer and no more."""
    if workers == 0:
        for entry in entries:
            yield entry, load(entry.path)
        return
    # Not fork: the parent has threads (BLAS, progress bar) whose locks a forked child would inherit held.
    with ProcessPoolExecutor(workers, get_context("forkserver"), initializer=follow, initargs=(os.getpid(),)) as pool:
        batches = (entries[start : start + _BATCH] for start in range(0, len(entries), _BATCH))
        tasks = ((batch, pool.submit(load.many, [entry.path for entry in batch])) for batch in batches)
        waiting: deque[tuple[Sequence[Entry], Future[list[_Image | str]]]] = deque(islice(tasks, 2 * workers))
        try:
            while waiting:
                batch, task = waiting.popleft()
                yield from zip(batch, task.result(), strict=True)
                waiting.extend(islice(tasks, 1))
        except BrokenProcessPool as error:
            raise TemporaryError(
                "a reading process died: for want of memory, or of `if __name__ == '__main__':` in your script. "
                "Try again with fewer --workers, or with 0."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _all_bad(source: Path, found: Catalogue) -> str:
    tried = {entry.name for entry in found.entries}
    reasons = [f"  {skipped.file}: {skipped.reason}" for skipped in found.skipped if skipped.file in tried]
    more = [f"  and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    return "\n".join([f"none of the {len(found.entries)} images in {source} can be used:", *reasons[:3], *more])


def _columns(found: Catalogue, rows: Sequence[Entry]) -> tuple[Labelled, Described]:
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
    return labels, meta


def _sides(
    found: Catalogue, rows: Sequence[Entry], writer: StoreWriter, labels: Labelled, file: Path | None
) -> npt.NDArray[np.uint8]:
    patients, contents = writer.column("patient"), writer.column("content")
    if file is not None or any(row.split for row in rows):
        sides = given_splits(found, rows, patients, file)
    else:
        sides = splits.assign(patients, contents, labels[0][1] if labels else None)
    splits.check(patients, contents, sides, [row.name for row in rows])
    if missing := [name for name in ("train", "val", "test") if splits.SPLITS.index(name) not in sides]:
        found.warnings.append(f"no image is in {' or '.join(missing)}")
    return sides


def _warn_of_twins(found: Catalogue, contents: npt.NDArray[np.bytes_]) -> None:
    if twins := len(contents) - len(np.unique(contents)):
        found.warnings.append(f"{twins} images are identical to another one; they lie on the same side of the split")


def _result(
    out: Path, key: Path, found: Catalogue, writer: StoreWriter, sides: npt.NDArray[np.uint8], labels: Labelled
) -> IngestResult:
    patients = writer.column("patient")
    by_split = {
        name: {"images": int((sides == side).sum()), "patients": len(np.unique(patients[sides == side]))}
        for side, name in enumerate(splits.SPLITS)
    }
    by_label = {
        column.name: {name: int((numbers == number).sum()) for number, name in enumerate(column.classes)}
        | ({"(blank)": blank} if (blank := int((numbers < 0).sum())) else {})
        for column, numbers in labels
    }
    recipe = f"{writer.modality}/simclr_resnet18"
    return IngestResult(
        path=out,
        private=out.with_name(f"{out.name}.private"),
        key=key,
        images=len(writer),
        patients=len(np.unique(patients)),
        splits={name: count for name, count in by_split.items() if count["images"]},
        labels=by_label,
        skipped=tuple(sorted(found.skipped, key=lambda skipped: skipped.file)),
        notes=tuple(found.notes),
        warnings=tuple(found.warnings),
        next=command("sslmed", "pretrain", recipe, "--data", out, "--out", out.parent / "run"),
    )


def _write_private(result: IngestResult, source: Path, rows: Sequence[Entry], patients: npt.NDArray[np.bytes_]) -> None:
    """What must not be inside the store lies beside it, for its owner alone."""
    with disk_errors(result.private):
        result.private.mkdir(mode=0o700, exist_ok=True)
        result.private.chmod(0o700)
    report = {"source": str(source.absolute()), **result.as_dict()}
    with write_atomically(result.private / "data_report.json") as partial, _private(partial) as file:
        json.dump(report, file, indent=2)
    with write_atomically(result.private / "key_table.csv") as partial, _private(partial) as file:
        table = csv.writer(file)
        table.writerow(["file", "patient", "sample", "patient_key"])
        keys = patients.tolist()
        table.writerows([row.name, row.patient, number, keys[number].decode()] for number, row in enumerate(rows))


def _private(path: Path) -> Any:
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
        "w",
        encoding="utf-8",
        errors="surrogateescape",
        newline="",
    )
