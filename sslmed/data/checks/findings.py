"""What is odd about a set of scans, told before a store is made of it: a code, a severity and the files.

`measured.Measure` runs where a scan is read and leaves a few numbers; `Checker` keeps those and compares the scans with
each other. No value of an identity attribute is in a finding, only the attribute's name. docs/checks.md explains codes.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from sslmed.data.checks.likeness import BITS, survey
from sslmed.data.checks.measured import Measured
from sslmed.data.checks.outliers import astray
from sslmed.data.splits import SPLITS, TRAIN, UNLABELLED

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
CODES = (  # in the order of a table
    "unreadable",
    "truncated",
    "nan",
    "not-for-this-modality",
    "leakage",
    "label-mismatch",
    "constant",
    "saturated",
    "tiny",
    "duplicate",
    "near-duplicate",
    "spacing-outlier",
    "orientation-flip",
    "burned-in",
    "identity",
    "not-read",
)
SATURATED = {"grey": 0.05, "colour": 0.5}  # share of pixels; in colour, glass and paper are white by nature
SMALLEST = 16  # pixels of the shorter side
SHOWN = 20  # near-duplicate pairs
OVERLAID = frozenset({"US", "IVUS", "SC", "OT", "ES", "XC", "GM", "OP"})  # DICOM's words where text is usual

# Words of the readers -> code; what none of them fits is "unreadable". A zip archive's index stands at its end.
READERS_WORDS = (
    (re.compile(r"\bNaN\b|\binfinite\b|not finite"), "nan"),
    (
        re.compile(
            r"\btruncated\b|^is empty$|can hold$|bytes are there$|ended before the end|EOFError|unexpected end|"
            r"not a zip file",
            re.IGNORECASE,
        ),
        "truncated",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One thing that is odd.

    Attributes:
        code: one of `CODES`.
        severity: an "error" is left out of a store or stops it from being made, a "warning" gets in and is probably
            not what is wanted, a "note" is good to know.
        files: names of scans, relative to the source; of a series its first file.
        detail: in a sentence, with the numbers.
    """

    code: str
    severity: Severity
    files: tuple[str, ...]
    detail: str


def refusal_code(reason: str) -> str:
    """The code of what a reader said of a file."""
    return next((code for words, code in READERS_WORDS if words.search(reason)), "unreadable")


@dataclass(frozen=True, slots=True)
class _Seen:
    name: str
    patient: str
    side: int | None
    told: Measured


class Checker:
    """Told of scans one by one, then asked for the findings; keeps a small record of each.

    Args:
        modality: the name of the modality that the store would have.
    """

    def __init__(self, modality: str) -> None:
        self._modality = modality
        self._scans: list[_Seen] = []
        self._told: list[Finding] = []

    def __len__(self) -> int:
        return len(self._scans)

    def add(self, name: str, measured: Measured, patient: str, side: int | None = None) -> None:
        """A scan that can be used.

        Args:
            name: what to call it; no two scans have one name.
            patient: equal for scans of one patient; kept, never told.
            side: position in `SPLITS`, None where the user gave no split.
        """
        self._scans.append(_Seen(name, patient, side, measured))

    def refused(self, name: str, reason: str, *, by_modality: bool = False, slices: int = 0) -> None:
        """A scan that cannot be used: its file is bad, or it is good and the modality does not take such scans.

        ``slices`` of its series are left out with it.
        """
        code = "not-for-this-modality" if by_modality else refusal_code(reason)
        others = f" (one of {slices} slices)" if slices else ""
        self._told.append(Finding(code, "error", (name,), reason + others))

    def tell(self, code: str, severity: Severity, files: Sequence[str], detail: str) -> None:
        """Something that was found elsewhere, such as a label without an image."""
        if code not in CODES or severity not in SEVERITIES:
            raise ValueError(f"{code} {severity}")
        self._told.append(Finding(code, severity, tuple(files), detail))

    def findings(self) -> tuple[Finding, ...]:
        """All findings: errors first, then by code in the order of `CODES`, then as they were found."""
        found = [*self._told]
        texts = partial(_texts, self._modality)
        for look in (_each, _leaks, _duplicates, _look_alikes, _spacings, _orientations, texts, _identities):
            found += look(self._scans)
        return tuple(sorted(found, key=lambda one: (SEVERITIES.index(one.severity), CODES.index(one.code))))


def _each(scans: Sequence[_Seen]) -> Iterator[Finding]:
    for scan in scans:
        told, files = scan.told, (scan.name,)
        if told.low == told.high:
            yield Finding("constant", "warning", files, f"every pixel is {told.low:g}")
        if told.saturated > SATURATED["colour" if told.colour else "grey"]:
            detail = f"{told.saturated:.0%} of its pixels have the greatest value, {told.high:g}: clipped, or no image"
            yield Finding("saturated", "warning", files, detail)
        if min(told.sides) < SMALLEST:
            yield Finding("tiny", "warning", files, f"has {told.sides[0]} x {told.sides[1]} pixels")


def _leaks(scans: Sequence[_Seen]) -> Iterator[Finding]:
    keys: tuple[tuple[str, Callable[[_Seen], str]], ...] = (
        ("one patient", lambda scan: scan.patient),
        ("one and the same image", lambda scan: scan.told.content),
    )
    for what, key in keys:
        for same in _groups(scans, key):
            sides: dict[int, _Seen] = {}
            for scan in same:
                if scan.side is not None:  # pretraining reads train and unlabelled alike: no leak between these two
                    sides.setdefault(TRAIN if scan.side == UNLABELLED else scan.side, scan)
            if len(sides) > 1:
                where = " and ".join(SPLITS[side] for side in sorted(sides))
                yield Finding("leakage", "error", tuple(scan.name for scan in sides.values()), f"{what} in {where}")


def _duplicates(scans: Sequence[_Seen]) -> Iterator[Finding]:
    for same in _groups(scans, lambda scan: scan.told.content):
        if len(same) > 1:
            patients = len({scan.patient for scan in same})
            detail = f"{len(same)} scans have equal pixels"
            if patients > 1:
                detail += f", of {patients} patients: they will lie on one side of the split"
            files = tuple(scan.name for scan in same)
            yield Finding("duplicate", "warning" if patients > 1 else "note", files, detail)


def _look_alikes(scans: Sequence[_Seen]) -> Iterator[Finding]:
    once = list({scan.told.content: scan for scan in reversed(scans)}.values())[::-1]  # equal ones are told already
    if not once:
        return
    patients = np.unique([scan.patient for scan in once], return_inverse=True)[1]
    found = survey(np.array([scan.told.likeness for scan in once], np.uint64), patients, show=SHOWN)
    for (one, other), bits in zip(found.closest.tolist(), found.distances.tolist(), strict=True):
        detail = f"of different patients, but they look alike: their hashes differ in {bits} of {BITS} bits"
        yield Finding("near-duplicate", "warning", (once[one].name, once[other].name), detail)
    if found.pairs > SHOWN:
        detail = (
            f"{found.pairs} pairs in all look alike: {found.images} scans in {found.groups} groups, the largest of "
            f"{found.largest}; only the nearest {SHOWN} are listed"
        )
        yield Finding("near-duplicate", "warning", (), detail)


def _spacings(scans: Sequence[_Seen]) -> Iterator[Finding]:
    for names in (("down", "across"), ("slice to slice", "down", "across")):
        placed = [scan for scan in scans if (scan.told.kind == "volume") == (len(names) == 3)]
        known = [scan for scan in placed if scan.told.spacing is not None]
        odd: dict[int, list[str]] = defaultdict(list)
        for axis, name in enumerate(names):
            values = np.array([scan.told.spacing[axis] for scan in known if scan.told.spacing is not None])
            for place, usual in astray(values):
                odd[place].append(f"{name} {values[place]:.4g} mm, where {usual:.4g} is usual")
        for place, why in sorted(odd.items()):
            yield Finding("spacing-outlier", "warning", (known[place].name,), "; ".join(why))
        if 2 * len(known) > len(placed) > len(known):
            without = tuple(scan.name for scan in placed if scan.told.spacing is None)
            yield Finding("spacing-outlier", "warning", without, f"no spacing, where {len(known)} others have one")


def _orientations(scans: Sequence[_Seen]) -> Iterator[Finding]:
    flipped: dict[str, list[str]] = defaultdict(list)
    told = Counter(scan.told.orientation for scan in scans if scan.told.orientation)
    for usual, many in told.most_common(1) if len(told) > 1 else ():
        for scan in scans:
            axes = scan.told.orientation
            if axes and axes != usual:
                flipped[scan.name].append(f"axes point {axes}, in {many} of {told.total()} scans {usual}")
    for name, why in flipped.items():
        yield Finding("orientation-flip", "warning", (name,), "; ".join(why))


def _texts(modality: str, scans: Sequence[_Seen]) -> Iterator[Finding]:
    burned = tuple(scan.name for scan in scans if scan.told.annotated)
    if burned:
        detail = f"{len(burned)} files say that text is burned into their pixels: it may name the patient, and it leaks"
        yield Finding("burned-in", "warning", burned, detail)
    silent = tuple(
        scan.name
        for scan in scans
        if scan.told.annotated is None and (scan.told.modality in OVERLAID or modality == "ultrasound")
    )
    if silent:
        detail = f"{len(silent)} files of a kind that often has text in its pixels do not say whether it has: look"
        yield Finding("burned-in", "note", silent, detail)


def _identities(scans: Sequence[_Seen]) -> Iterator[Finding]:
    holders = tuple(scan.name for scan in scans if scan.told.identity)
    if holders:
        names = Counter(name for scan in scans for name in scan.told.identity)
        told = ", ".join(f"{name} in {count}" for name, count in names.most_common())
        yield Finding("identity", "note", holders, f"attributes that identify a patient are filled: {told} scans")


def _groups(scans: Sequence[_Seen], key: Callable[[_Seen], Hashable]) -> list[list[_Seen]]:
    """Scans of one key together, in the order in which the keys first appear."""
    found: dict[Hashable, list[_Seen]] = defaultdict(list)
    for scan in scans:
        found[key(scan)].append(scan)
    return list(found.values())
