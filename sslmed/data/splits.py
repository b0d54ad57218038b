"""Train, val and test by patient: made once, frozen with a digest, checked for leakage.

Patients that share an identical image are one group, and a group lies on one side. Groups are ordered by a keyed hash
of their patient, not by their place in the input, so the order of files does not matter and one more patient moves few.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.keyed_rng import key

SPLITS = ("train", "val", "test", "unlabelled")
TRAIN, VAL, TEST, UNLABELLED = range(4)
VAL_SHARE, TEST_SHARE = 0.1, 0.2
_SIDE = np.array([0, 1, 2, 0], np.uint8)  # pretraining reads train and unlabelled alike: no leak between these two

Keys = npt.NDArray[np.bytes_]


def assign(
    patients: Keys, contents: Keys, classes: npt.NDArray[np.integer[Any]] | None = None, seed: int = 0
) -> npt.NDArray[np.uint8]:
    """A split for each image: 70 % train, 10 % val, 20 % test of the patients, the same shares in every class.

    A group's class is the rarest that one of its images has. A class of one group goes to train, of two to train and
    test, of three or more to all three. Groups without any label are "unlabelled"; when no image has a label they are
    split as well, so that labels which come later find test patients that pretraining has not seen.

    Args:
        patients: (N,) keyed patients.
        contents: (N,) keyed digests of the images.
        classes: (N,) class index, -1 for no label; None when there are no labels.

    Returns:
        (N,) uint8 positions in `SPLITS`.
    """
    if not len(patients):
        return np.empty(0, np.uint8)
    group = _groups(patients, contents)
    count = int(group.max()) + 1
    group_class = _rarest_class(group, count, classes)
    order = _hash_order(patients, group, count, seed)
    split_of_group = np.full(count, UNLABELLED, np.uint8)
    for label in np.unique(group_class[group_class >= 0]):
        members = order[group_class[order] == label]
        val, test = _counts(len(members))
        split_of_group[members] = TRAIN
        split_of_group[members[:test]] = TEST
        split_of_group[members[test : test + val]] = VAL
    return split_of_group[group]


def check(patients: Keys, contents: Keys, splits: npt.NDArray[np.uint8], names: Sequence[str] | None = None) -> None:
    """Refuse a split that puts one patient, or one identical image, on two sides (train and unlabelled are one side).

    Args:
        patients: (N,) keyed patients.
        contents: (N,) keyed digests of the images.
        splits: (N,) positions in `SPLITS`.
        names: what to call the images in the message, such as file names; row numbers when None.

    Raises:
        DataError: names up to three pairs of images.
    """
    for what, keys in (("patient", patients), ("identical image", contents)):
        pairs = _across(keys, _SIDE[splits])
        if len(pairs):
            shown = [" and ".join(_named(row, splits, names) for row in pair) for pair in pairs[:3]]
            raise DataError(
                f"{len(pairs)} {what}{'s' if len(pairs) > 1 else ''} on two sides of the split:\n  "
                + "\n  ".join(shown)
                + f"\nGive every image of a{'n' if what[0] == 'i' else ''} {what} the same split, or let ingest split."
            )


def digest(patients: Keys, splits: npt.NDArray[np.uint8]) -> str:
    """The SHA-256 of which patient is where: 64 hexadecimal characters, the same in any order of the images."""
    rows = np.empty((len(patients), 33), np.uint8)
    rows[:, :32] = np.ascontiguousarray(patients, "S32").view(np.uint8).reshape(-1, 32)
    rows[:, 32] = splits
    return hashlib.sha256(np.unique(rows.view("V33")).tobytes()).hexdigest()


def _groups(patients: Keys, contents: Keys) -> npt.NDArray[np.int64]:
    """The group of each image: connected components of the graph of patients and images."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    patient_names, patient = np.unique(patients, return_inverse=True)
    content_names, content = np.unique(contents, return_inverse=True)
    size = len(patient_names) + len(content_names)
    edges = coo_array((np.ones(len(patient), np.int8), (patient, content + len(patient_names))), shape=(size, size))
    _, component = connected_components(edges, directed=False)
    return np.asarray(np.unique(component[patient], return_inverse=True)[1], np.int64)


def _rarest_class(
    group: npt.NDArray[np.int64], count: int, classes: npt.NDArray[np.integer[Any]] | None
) -> npt.NDArray[np.int64]:
    """(G,) the class of each group, -1 without one; one class for all when nothing is labelled."""
    if classes is None or not (classes >= 0).any():
        return np.zeros(count, np.int64)
    labelled = classes >= 0
    pairs = np.unique(np.stack([classes[labelled].astype(np.int64), group[labelled]]), axis=1)
    groups_of_class = np.bincount(pairs[0])
    group_class = np.full(count, -1, np.int64)
    for label in np.argsort(-groups_of_class, kind="stable"):  # the rarest last, so that it stands
        group_class[pairs[1][pairs[0] == label]] = label
    return group_class


def _hash_order(patients: Keys, group: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.int64]:
    """(G,) the groups by the least hash of their patients."""
    names, first = np.unique(patients, return_index=True)
    hashes = np.array([key(seed, "split", name.decode("ascii"))[0] for name in names], np.uint64)
    least = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, group[first], hashes)
    return np.argsort(least, kind="stable")


def _counts(groups: int) -> tuple[int, int]:
    """How many of ``groups`` go to val and test."""
    if groups < 3:
        return 0, groups - 1
    return max(1, round(VAL_SHARE * groups)), max(1, round(TEST_SHARE * groups))


def _named(row: int, splits: npt.NDArray[np.uint8], names: Sequence[str] | None) -> str:
    return f"{names[row] if names is not None else f'row {row}'} ({SPLITS[splits[row]]})"


def _across(keys: Keys, side: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """(P, 2) rows: for each key that is on two sides, its first row and its first row on another side."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    strays = np.flatnonzero(side != side[first[inverse]])
    _, once = np.unique(inverse[strays], return_index=True)
    rows = np.sort(strays[once])
    return np.stack([first[inverse[rows]], rows], axis=1)
