"""``sslmed ingest``: a folder of images becomes a checked, patient-aware store."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed import __version__
from sslmed.config import DataError, UsageError
from sslmed.console import command, progress
from sslmed.data import splits
from sslmed.data.annotations.attach import Problem, Report, Sources
from sslmed.data.identity import SiteKey, load_or_make_key
from sslmed.data.modality import Modality, named, policy_record
from sslmed.data.shards.tables import NewScan
from sslmed.data.shards.writer import SHARD_BYTES, StoreWriter, disk_errors, refuse_existing
from sslmed.data.sources import private
from sslmed.data.sources.catalogue import Catalogue, Row, Skipped, base_folder, catalogue, given_splits, patient_pattern
from sslmed.data.sources.kept import SMALLEST, Keep, Told
from sslmed.data.sources.known import Labelled, columns, rows_of
from sslmed.data.sources.labels import read_labels, read_split_file
from sslmed.data.sources.reading import Pool, Read, Refused, Unit, pool, read_all, units


@dataclass(frozen=True)
class IngestResult:
    """What `ingest` made.

    ``scans`` are images, volumes and clips, ``images`` counts every slice and frame. ``splits`` counts images and
    patients by split, ``labels`` images by label and class; ``masks`` and ``boxes`` are images that have some,
    ``problems`` what of them was left out, ``attached`` the same in words. ``skipped`` has every file that is not in
    the store, with the reason; ``next`` is the command to go on with.
    """

    path: Path
    private: Path
    key: Path
    scans: int
    images: int
    patients: int
    splits: dict[str, dict[str, int]]
    labels: dict[str, dict[str, int]]
    masks: int
    boxes: int
    problems: tuple[Problem, ...]
    attached: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    next: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """The same for people, a line each."""
        scans = f" ({self.scans} scans)" if self.scans < self.images else ""
        lines = [f"{self.images} images{scans} of {self.patients} patients in {self.path}"]
        lines += [f"  {split}: {n['images']} images, {n['patients']} patients" for split, n in self.splits.items()]
        for label, classes in self.labels.items():
            lines.append(f"  label {label}: " + ", ".join(f"{name} {count}" for name, count in classes.items()))
        lines += [f"  {line}" for line in self.attached]
        reasons = Counter[str]()
        for skipped in self.skipped:
            reasons[skipped.reason] += skipped.files
        if self.skipped:
            files = sum({skipped.file: skipped.files for skipped in self.skipped}.values())  # a file has many parts
            lines.append(f"skipped {files} files; all are listed in {self.private / 'data_report.json'}")
            for skipped in self.skipped[:5] if len(reasons) > 3 or len(self.skipped) <= 5 else ():
                whole = f" (one of {skipped.files} slices)" if skipped.files > 1 else ""
                lines.append(f"  {skipped.file}: {skipped.reason}{whole}")
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
    masks: Path | str | None = None,
    mask_classes: Sequence[str] = (),
    boxes: Path | str | None = None,
    patient: str | None = None,
    split: Path | str | None = None,
    key: Path | str | None = None,
    size: int | None = None,
    resample_tilt: bool = False,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> IngestResult:
    """Read every image under ``source`` and write the store ``out``; report and key table go to ``OUT.private``.

    The store is the same whatever ``workers`` is; it appears whole at the end or not at all. An ingest that was killed
    goes on where it stopped when it is given again, with other labels if need be.

    Args:
        source: a folder of images, or one image.
        out: the store's folder, which must not exist.
        modality: what kind of image, such as ``xray``.
        labels: CSV with ``file``, ``patient`` and perhaps ``split``, ``label:NAME``, ``meta:NAME``; else class folders.
        label_columns: the label columns of a CSV that does not use the prefix.
        masks: folder of masks that are called like their images.
        mask_classes: names of the values 0, 1, ... of the masks.
        boxes: COCO JSON, or a folder of Pascal VOC XML files.
        patient: regular expression for the patient in a path relative to ``source``: first group, or whole match.
        split: CSV with ``split`` and ``file`` or ``patient``; else the ``split`` column, else 70/10/20 by patient.
        key: the site key that hides the patients; by default ``site.key`` beside the store, made when absent.
        size: shrink images whose shorter side is longer than this many pixels; by default they stay as they are.
        resample_tilt: read CT with a tilted gantry, its slices sheared back by interpolation.
        workers: processes that read images beside this one.
        shard_bytes: greatest size of one shard file, before compression.

    Raises:
        UsageError, MissingInputError, DataError, OutputExistsError, DiskError, TemporaryError.
    """
    source, out = Path(source), Path(out)
    labels, split, masks, boxes = (
        Path(given) if given is not None else None for given in (labels, split, masks, boxes)
    )
    policy, pattern = named(modality), patient_pattern(patient)
    _check_numbers(size, workers)
    if label_columns and labels is None:
        raise UsageError("--label-columns names columns of a CSV: give --labels CSV too.")
    refuse_existing(out)
    if out.absolute().is_relative_to(source.absolute()):
        raise UsageError(f"--out {out} lies inside {source}, among the images. Give a folder outside of it.")
    if split is not None:
        read_split_file(split)  # a mistake in it is told before hours of reading
    drawn = Sources(masks, tuple(mask_classes), boxes)
    drawn.check()  # likewise
    found = _catalogue(source, labels, label_columns, pattern, [split] if split else [], drawn.paths)
    key_path = Path(key) if key is not None else out.parent / "site.key"
    site_key = _site_key(key_path, found)
    beside = private.folder_of(out)
    read = Read(policy.name, Keep(policy.name, size, site_key), resample_tilt)
    with pool(workers) as processes:
        wanted = _units(found, policy, processes)
        writer = StoreWriter(
            out,
            modality=policy.name,
            key_id=site_key.id,
            policy=policy_record(policy),
            shard_bytes=shard_bytes,
            progress=beside / private.PROGRESS,
            plan=_plan(wanted, found, read, shard_bytes),
        )
        with writer:
            _fill(writer, read, wanted, processes, found)
            if not len(writer):
                raise DataError(_all_bad(source, found))
            with _pixels_are_kept(writer, beside):
                told = [Told.from_list(note) for note in writer.notes]
                rows = list(chain(*rows_of(found, told, writer.scans("depth").tolist(), wanted)))
                patients = np.array([site_key.patient(row.patient).encode() for row in rows], "S32")
                labelled, described = columns(found, rows, told, writer)
                sides = _sides(found, rows, patients, writer.column("content"), labelled, split)
                _warn_of_twins(found, writer.column("content")[writer.scans("first")])
                digest = splits.digest(patients, sides)
                with writer.finish(patients=patients, split=sides, split_digest=digest) as folder:
                    names, parts = [row.name for row in rows], [row.part for row in rows]
                    report = drawn.attach(folder, names, parts=parts, labels=labelled, meta=described)
                    result = _result(out, key_path, found, writer, patients, sides, labelled, report)
                    private.make(beside)
                    private.write_report(beside, {"source": str(source.absolute()), **result.as_dict()})
                    private.write_key_table(beside, rows, patients, writer.column("slice"))
    return result


# The steps, in their order.


@contextmanager
def _pixels_are_kept(writer: StoreWriter, beside: Path) -> Iterator[None]:
    """An error in labels, splits, masks or boxes says that nothing has to be read again."""
    try:
        yield
    except DataError as error:
        kept = f"What was read is kept: mend it and give the same command; or remove {writer.partial} and {beside}."
        raise DataError("\n".join([*str(error).splitlines()[:5], kept])) from error


def _check_numbers(size: int | None, workers: int) -> None:
    if size is not None and size < SMALLEST:
        raise UsageError(f"--size {size}: the shorter side needs at least {SMALLEST} pixels.")
    if workers < 0:
        raise UsageError(f"--workers {workers}: give 0 or more processes.")


def _catalogue(
    source: Path, labels: Path | None, label_columns: Sequence[str], pattern: Any, *others: Sequence[Path]
) -> Catalogue:
    """``others`` are files and folders that hold no images."""
    ignore = [*chain(*others), *([labels] if labels is not None else [])]
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


def _units(found: Catalogue, policy: Modality, processes: Pool) -> list[Unit]:
    wanted, bad = units(found.files, policy, processes)
    found.skipped += [Skipped(found.name(path), reason) for path, reason in bad]
    return wanted


def _plan(wanted: Sequence[Unit], found: Catalogue, read: Read[NewScan], shard_bytes: int) -> str:
    """The digest of everything that decides which pixels are added, and in which order."""
    keep = read.make
    about = [__version__, policy_record(named(read.modality)), keep.size, keep.key.id, read.resample_tilt, shard_bytes]  # type: ignore[attr-defined]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for unit in wanted:
        for path in unit.paths:
            try:
                facts = path.stat()
            except OSError as error:
                raise DataError(f"{path} was there a moment ago: {error.strerror}. Give the command again.") from error
            digest.update(
                f"{found.name(path)}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
        digest.update(b"\n")
    return digest.hexdigest()


def _fill(writer: StoreWriter, read: Read[NewScan], wanted: Sequence[Unit], processes: Pool, found: Catalogue) -> None:
    """Add every scan, after those that an interrupted ingest had added."""
    start, ahead = 0, 0
    if writer.notes:
        units_added = [note[0] for note in writer.notes]
        start = units_added[-1]
        ahead = units_added.count(start)  # scans of that unit that are there already
        writer.skips[:] = [skip for skip in writer.skips if skip[0] < start]
        found.notes.append(f"went on after {start} of {len(wanted)} files or series that were read before")
    made = read_all(read, wanted, processes, start)
    for number, scan in _each(progress(made, len(wanted) - start, "ingest")):
        if isinstance(scan, Refused):
            writer.skip([number, scan.reason, scan.at])
        elif number == start and ahead:
            ahead -= 1
        else:
            writer.add(replace(scan, note=[number, *scan.note[1:]]))
    writer.complete()
    found.skipped += [
        Skipped(found.name(wanted[number].paths[at]), reason, len(wanted[number].paths))
        for number, reason, at in writer.skips
    ]


def _each(made: Iterable[tuple[int, Iterable[NewScan | Refused]]]) -> Iterator[tuple[int, NewScan | Refused]]:
    return ((number, one) for number, scans in made for one in scans)


def _all_bad(source: Path, found: Catalogue) -> str:
    tried = {found.name(path) for path in found.files}
    reasons = [f"  {skipped.file}: {skipped.reason}" for skipped in found.skipped if skipped.file in tried]
    more = [f"  and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    return "\n".join([f"none of the {len(found.files)} images in {source} can be used:", *reasons[:3], *more])


def _sides(
    found: Catalogue,
    rows: Sequence[Row],
    patients: npt.NDArray[np.bytes_],
    contents: npt.NDArray[np.bytes_],
    labels: Labelled,
    file: Path | None,
) -> npt.NDArray[np.uint8]:
    if file is not None or any(row.split for row in rows):
        sides = given_splits(found, rows, patients, file)
    else:
        sides = splits.assign(patients, contents, labels[0][1] if labels else None)
    splits.check(patients, contents, sides, [row.name for row in rows])
    if missing := [name for name in ("train", "val", "test") if splits.SPLITS.index(name) not in sides]:
        found.warnings.append(f"no image is in {' or '.join(missing)}")
    return sides


def _warn_of_twins(found: Catalogue, contents: npt.NDArray[np.bytes_]) -> None:
    """``contents`` of each scan."""
    if twins := len(contents) - len(np.unique(contents)):
        found.warnings.append(f"{twins} scans are identical to another one; they lie on the same side of the split")


def _result(
    out: Path,
    key: Path,
    found: Catalogue,
    writer: StoreWriter,
    patients: npt.NDArray[np.bytes_],
    sides: npt.NDArray[np.uint8],
    labels: Labelled,
    report: Report,
) -> IngestResult:
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
        private=private.folder_of(out),
        key=key,
        scans=len(writer.notes),
        images=len(writer),
        patients=len(np.unique(patients)),
        splits={name: count for name, count in by_split.items() if count["images"]},
        labels=by_label,
        masks=report.masks,
        boxes=report.boxes + report.negatives,
        problems=tuple(report.problems),
        attached=tuple(report.lines()),
        skipped=tuple(sorted(found.skipped, key=lambda skipped: skipped.file)),
        notes=tuple(found.notes),
        warnings=tuple(found.warnings),
        next=command("sslmed", "pretrain", recipe, "--data", out, "--out", out.parent / "run"),
    )
