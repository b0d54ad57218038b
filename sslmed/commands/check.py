"""``sslmed ingest --check``: everything is read, nothing is written, and what is odd is told."""

import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.config import DataError, UsageError
from sslmed.console import command, progress
from sslmed.data.annotations.attach import Sources
from sslmed.data.checks.findings import SEVERITIES, Checker, Finding
from sslmed.data.checks.measured import Measure, Measured
from sslmed.data.checks.unwritten import Unwritten, look
from sslmed.data.identity import SiteKey
from sslmed.data.modality import named
from sslmed.data.sources.catalogue import NO_FORMAT, OUTSIDE, Catalogue, Row, base_folder, catalogue, given_splits
from sslmed.data.sources.catalogue import patient_pattern as pattern_of
from sslmed.data.sources.kept import Told
from sslmed.data.sources.known import adopt_labels, other_names, rows_of_scan, warn_of_strangers
from sslmed.data.sources.labels import LabelTable, encode_labels, encode_meta, read_labels
from sslmed.data.sources.reading import Read, Refused, Unit, pool, read_all, units
from sslmed.data.splits import UNLABELLED

SHOWN = 3  # findings of one code and severity in the table, and files of one finding


@dataclass(frozen=True)
class CheckResult:
    """What `check` found. ``remarks`` are what ingest would assume and say."""

    source: str
    modality: str
    files: int
    scans: int
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]
    next: str

    @property
    def errors(self) -> int:
        """How many findings are errors: with any, the command ends with 65."""
        return self.counts["error"]

    @property
    def counts(self) -> dict[str, int]:
        """The number of findings by severity."""
        told = Counter(finding.severity for finding in self.findings)
        return {severity: told[severity] for severity in SEVERITIES}

    def as_dict(self) -> dict[str, Any]:
        """For programs: every finding with all its files."""
        return {**asdict(self), "counts": self.counts}

    def lines(self) -> list[str]:
        """For people: a table, the findings of one code and severity together."""
        counted = ", ".join(f"{count} {severity}{'s' * (count != 1)}" for severity, count in self.counts.items())
        lines = [f"{self.scans} {self.modality} scans in {self.files} files of {self.source}: {counted}"]
        groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
        for finding in self.findings:
            groups[finding.severity, finding.code].append(finding)
        if groups:
            lines.append(f"{'severity':8}  {'code':21}  {'files':>6}  first")
        for (severity, code), found in groups.items():
            files = len({file for finding in found for file in finding.files})
            start = f"{severity:8}  {code:21}  {files:6}  "
            for finding in found[:SHOWN]:
                lines.append(start + _line(finding))
                start = " " * len(start)
            if len(found) > SHOWN:
                lines.append(f"{start}and {len(found) - SHOWN} more")
        return [*lines, *(f"remark: {remark}" for remark in self.remarks)]


def _line(finding: Finding) -> str:
    some = ", ".join(finding.files[:SHOWN])
    more = f" and {len(finding.files) - SHOWN} more" if len(finding.files) > SHOWN else ""
    return f"{some}{more}: {finding.detail}" if some else finding.detail


def check(
    source: Path | str,
    *,
    modality: str,
    labels: Path | str | None = None,
    label_columns: Sequence[str] = (),
    masks: Path | str | None = None,
    mask_classes: Sequence[str] = (),
    boxes: Path | str | None = None,
    patient: str | None = None,
    split: Path | str | None = None,
    resample_tilt: bool = False,
    workers: int = 0,
) -> CheckResult:
    """Read every image under ``source`` as `ingest` would, and tell what is odd about them; write nothing.

    Args:
        source: a folder of images, or one image.
        modality: what kind of image, such as ``xray``.
        labels, label_columns, masks, mask_classes, boxes, patient, split, resample_tilt: as for `ingest`.
        workers: processes that read images beside this one.

    Raises:
        UsageError, MissingInputError: a wrong option, or a file that is not there.
        DataError: there is no image, or a folder cannot be read. Anything else that is wrong is a finding.
        TemporaryError: a worker died.
    """
    source = Path(source)
    labels, split, masks, boxes = (
        Path(given) if given is not None else None for given in (labels, split, masks, boxes)
    )
    sources = Sources(masks, tuple(mask_classes), boxes)
    policy = named(modality)
    if label_columns and labels is None:
        raise UsageError("--label-columns names columns of a CSV: give --labels CSV too.")
    if workers < 0:
        raise UsageError(f"--workers {workers}: give 0 or more processes.")
    checker = Checker(policy.name)
    found = _catalogue(checker, source, labels, label_columns, patient, split, sources.paths)
    key = SiteKey(secrets.token_bytes(32))  # for this process alone: digests are compared here and go nowhere
    read = Read(policy.name, Measure(key), resample_tilt)
    with pool(workers) as processes:
        wanted, bad = units(found.files, policy, processes)
        for path, reason in bad:
            checker.refused(found.name(path), reason)
        made = read_all(read, wanted, processes)
        scans = list(_scans(checker, found, wanted, progress(made, len(wanted), "check")))
    _compare(checker, found, scans, key, split)
    look(checker, found, [Unwritten(scan.unit, scan.told) for scan in scans], sources)
    options = [
        *("--modality", policy.name),
        *(("--labels", labels) if labels else ()),
        *(("--label-columns", ",".join(label_columns)) if label_columns else ()),
        *(("--masks", masks) if masks else ()),
        *(("--mask-classes", ",".join(mask_classes)) if mask_classes else ()),
        *(("--boxes", boxes) if boxes else ()),
        *(("--patient", patient) if patient is not None else ()),
        *(("--split", split) if split else ()),
        *(("--resample-tilt",) if resample_tilt else ()),
    ]
    findings = checker.findings()
    errors = any(finding.severity == "error" for finding in findings)
    again = ("--check",) if errors else ("--out", "STORE")
    return CheckResult(
        source=str(source),
        modality=policy.name,
        files=len(found.files),
        scans=len(scans),
        findings=findings,
        remarks=tuple(found.warnings),
        next=command("sslmed", "ingest", source, *again, *options),
    )


@dataclass(frozen=True)
class _Scan:
    name: str
    unit: Unit
    rows: list[Row]
    told: Measured


def _catalogue(
    checker: Checker,
    source: Path,
    labels: Path | None,
    label_columns: Sequence[str],
    patient: str | None,
    split: Path | None,
    apart: Sequence[Path],
) -> Catalogue:
    """The files, and what the catalogue itself finds: a CSV that is wrong, files without a row in it, other files."""
    pattern = pattern_of(patient)
    table: LabelTable | None = None
    if labels is not None and source.exists():
        try:
            table = read_labels(labels, base_folder(source), label_columns, need_patient=pattern is None)
        except DataError as error:
            checker.tell("label-mismatch", "error", (), f"{error}".replace("\n", " "))
    found = catalogue(source, table, pattern, [*(path for path in (labels, split) if path is not None), *apart])
    left_out: dict[str, list[str]] = defaultdict(list)
    for skipped in found.skipped:
        left_out[skipped.reason].append(skipped.file)
    for reason, files in left_out.items():
        if reason == NO_FORMAT:
            checker.tell("not-read", "note", files, reason)
        elif reason == OUTSIDE:
            checker.tell("not-read", "warning", files, reason)
        else:
            checker.tell("label-mismatch", "warning", files, reason)
    return found


def _scans(
    checker: Checker, found: Catalogue, wanted: Sequence[Unit], made: Iterator[tuple[int, Iterable[Measured | Refused]]]
) -> Iterator[_Scan]:
    """The scans that could be read, each with what is known of it; the others are told as refused."""
    read: list[tuple[Told, Measured]] = []
    for number, told in ((number, one) for number, each in made for one in each):
        unit = wanted[number]
        if isinstance(told, Refused):
            slices = len(unit.paths) if len(unit.paths) > 1 else 0
            checker.refused(found.name(unit.paths[told.at]), told.reason, by_modality=told.by_modality, slices=slices)
            continue
        note = Told(number, told.slices, told.patient, told.study, told.part, told.split, told.labels)
        read.append((note, told))
    notes = [note for note, _ in read]
    adopt_labels(found, notes)
    others, instead = other_names(found, notes, wanted), []
    for note, told in read:
        unit = wanted[note.unit]
        name = found.name(unit.paths[0])
        try:
            rows, stood_in = rows_of_scan(found, note, told.depth, wanted, others)
        except DataError as error:
            checker.tell("label-mismatch", "error", (name,), _nameless(str(error)))
            continue
        instead.append(stood_in)
        yield _Scan(f"{name}#{told.part}" if told.part else name, unit, rows, told)
    warn_of_strangers(found, instead)


def _compare(checker: Checker, found: Catalogue, scans: Sequence[_Scan], key: SiteKey, split: Path | None) -> None:
    """Hand the scans over, each with its patient and its side of the split that was given, if any."""
    rows = [row for scan in scans for row in scan.rows]
    sides: list[int] | list[None] = [None] * len(rows)
    if rows and (split is not None or any(row.split for row in rows)):
        try:
            keys = np.array([key.patient(row.patient) for row in rows], "S32")
            sides = given_splits(found, rows, keys, split).tolist()
        except DataError as error:
            checker.tell("label-mismatch", "error", (), _nameless(str(error)))
    first = 0
    for scan in scans:
        own = set(sides[first : first + len(scan.rows)])
        first += len(scan.rows)
        if len({0 if side == UNLABELLED else side for side in own}) > 1:
            checker.tell("leakage", "error", (scan.name,), "its slices lie on several sides of the split")
        checker.add(scan.name, scan.told, key.patient(scan.rows[0].patient), next(iter(own)))
    cells = list(zip(*(row.values for row in rows if row.values), strict=True))
    try:
        for name, values in zip(found.labels, cells, strict=False):
            encode_labels(name, values)
        for name, values in zip(found.meta, cells[len(found.labels) :], strict=False):
            encode_meta(name, values)
    except DataError as error:
        checker.tell("label-mismatch", "error", (), str(error).replace("\n", " "))


def _nameless(text: str) -> str:
    """A message without the patient that it may quote."""
    return re.sub(r"patient ('[^']*'|\"[^\"]*\")", "a patient", text).replace("\n", " ")
