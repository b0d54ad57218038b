"""Positives from metadata: another image that may stand in for an image, for methods that compare two views.

``patient``    another image of the patient (MICLe: Azizi et al., arXiv 2101.05224)
``study``      another image of the patient and study (MedAug: Vu et al., arXiv 2102.10663)
``neighbour``  an image of the patient and series at another place, no farther than so many millimetres
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.store import Store

Kind = Literal["patient", "study", "neighbour"]
Codes = npt.NDArray[np.int32]

DECIMALS = 3  # of a place in mm: 15.3 and 10.3 are 5 mm apart, and a slice kept twice is no neighbour of itself
_MEANING = {
    "study": "a number or name that tells a patient's studies apart",
    "series": "a number or name that tells a patient's series apart",
    "position": "the slice's place along the normal, mm",
}


class Positives:
    """Who stands in for whom.

    An image is in one set (its patient, study or series) or in none, and has a place there. Its partners are the
    images of the set that lie at another place within reach. Some 24 bytes an image, for every worker to have.

    Args:
        rows: the training rows, among which the partners are.
        neighbour_mm: how far a ``neighbour`` may lie.

    Attributes:
        groups: a number for each patient, (len(store),): images of one patient must not repel each other.

    Raises:
        UsageError: the store lacks a meta column that ``kind`` needs.
        DataError: no image has a partner.
    """

    def __init__(self, kind: Kind, store: Store, rows: npt.NDArray[np.int64], neighbour_mm: float) -> None:
        self.groups = _numbered(store.index.patient)
        sets, places, self._reach = self.groups, np.arange(len(store), dtype=np.float64), np.inf
        self._what = f"another image of the same {kind}"
        if kind == "study":
            sets = _within(sets, _names(store, "study", kind))
        if kind == "neighbour":
            sets, places = _within(sets, _names(store, "series", kind)), _millimetres(store, "position", kind)
            sets = np.where(np.isfinite(places), sets, np.int32(-1))
            self._reach = neighbour_mm + 0.5 * 10**-DECIMALS
            self._what = f"a neighbour within {neighbour_mm:g} mm in their series"
        known = rows[sets[rows] >= 0]
        order = known[np.lexsort((places[known], sets[known]))]  # set by set, each in the order of its places
        self._rows, self._sets, self._places = order.astype(np.int32), sets[order], places[order]
        self._found = np.full(len(store), -1, np.int32)  # of a store row in the three
        self._found[order] = np.arange(len(order), dtype=np.int32)
        self._images, self._with_partner = len(rows), self._count()
        self._patients = len(np.unique(self.groups[rows]))
        if not self._with_partner:
            raise DataError(
                f"none of the {len(rows):,} training images has {self._what}: data.positives={kind} would do nothing; "
                "use data.positives=image"
            )

    def partner(self, row: int, stream: np.random.Generator) -> int:
        """One of the row's partners, each as likely as the others; the row itself where it has none."""
        at = self._found[row]
        if at < 0:
            return row
        start, end = np.searchsorted(self._sets, (self._sets[at], self._sets[at] + 1))
        places, place = self._places[start:end], self._places[at]
        low, same = start + np.searchsorted(places, (place - self._reach, place), "left")
        other, high = start + np.searchsorted(places, (place, place + self._reach), "right")
        partners = (same - low) + (high - other)  # those before it and those after it
        if not partners:
            return row
        drawn = low + stream.integers(partners)
        return int(self._rows[drawn if drawn < same else drawn + other - same])

    def note(self) -> str:
        """How many images have a partner, for the user."""
        found = f"positives: {self._with_partner:,} of {self._images:,} images have {self._what}"
        if self._patients == 1:
            found += "; all are of one patient, so that none repels another: a contrastive loss is 0"
        return found

    def _count(self) -> int:
        """How many images have a partner."""
        if not len(self._sets):
            return 0
        moved = (np.diff(self._sets) != 0) | (np.diff(self._places) != 0)
        first = np.flatnonzero(np.concatenate(([True], moved)))  # of the images at one place
        images = np.diff(first, append=len(self._sets))
        near = (np.diff(self._sets[first]) == 0) & (np.diff(self._places[first]) <= self._reach)
        return int(images[np.append(near, False) | np.append(False, near)].sum())


def _numbered(values: npt.NDArray[Any]) -> Codes:
    """Each value's number among the different ones."""
    return np.unique(values, return_inverse=True)[1].astype(np.int32)


def _within(patients: Codes, names: Codes) -> Codes:
    """A number for each pair of patient and name, -1 where the name is blank."""
    pairs = patients.astype(np.int64) * (int(names.max(initial=0)) + 1) + names
    return np.where(names < 0, np.int32(-1), _numbered(pairs))


def _names(store: Store, column: str, kind: Kind) -> Codes:
    """A number for each value of a meta column, -1 where it is blank."""
    values = _column(store, column, kind)
    blank = np.isnan(values) if values.dtype.kind == "f" else values < 0
    return np.where(blank, np.int32(-1), _numbered(values))


def _millimetres(store: Store, column: str, kind: Kind) -> npt.NDArray[np.float64]:
    values = _column(store, column, kind)
    if values.dtype.kind != "f":
        raise UsageError(
            f"data.positives={kind} needs numbers in the meta column '{column}', but {store.path} has text there; "
            f"give {_MEANING[column]}, as meta:{column} of the labels CSV, and ingest again"
        )
    return np.round(values, DECIMALS)


def _column(store: Store, column: str, kind: Kind) -> npt.NDArray[Any]:
    if column not in store.meta_columns:
        raise UsageError(
            f"data.positives={kind} needs the meta column '{column}', but {store.path} has "
            f"{', '.join(store.meta_columns) or 'no meta column'}; "
            f"add meta:{column}, {_MEANING[column]}, to the labels CSV and ingest again"
        )
    return store.meta(column)
