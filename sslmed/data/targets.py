"""What is learnt of each image: its class, its findings, or its mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.annotations.mask_values import VOID
from sslmed.data.store import Store

UNKNOWN = -1
Wanted = str | Sequence[str] | None


@dataclass(frozen=True, eq=False)
class Target:
    """A target of every row of a store. It travels to workers, so it holds arrays, not the store.

    Attributes:
        name: for people: a label, several with commas between, or "masks".
        kind: one "class" of several, several "findings" of which each is there or not, or a "mask".
        classes: names of the classes, of the findings, or of the masks' numbers, of which the first is the background.
        known: (rows,) which rows have a target; of findings, at least one of them.
        values: of a class its number (rows,) int64, -1 unknown; of K findings 0 or 1 (rows, K) int8, -1 unknown; of
            masks None: they stay in the store.
        shown: of masks (rows, K), the classes that each row's mask shows; otherwise None.
    """

    name: str
    kind: Literal["class", "findings", "mask"]
    classes: tuple[str, ...]
    known: npt.NDArray[np.bool_]
    values: npt.NDArray[Any] | None
    shown: npt.NDArray[np.bool_] | None = None

    def presence(self) -> npt.NDArray[np.bool_]:
        """Which classes each row shows, (rows, K); none where nothing is known."""
        if self.shown is not None:
            return self.shown
        if self.kind == "findings":
            return np.asarray(self._values == 1)
        return np.asarray(self._values[:, None] == np.arange(len(self.classes)))

    def of(self, row: int, store: Store) -> npt.NDArray[Any]:
        """The target of a row before augmentation: a class number (), findings (K,), or a mask (H, W) uint8.

        What is unknown is -1, in a mask 255; a row without a mask has one of 255 alone.

        Args:
            store: the one that the target is of.

        Raises:
            DataError: a mask that cannot be read.
        """
        if self.kind != "mask":
            return np.asarray(self._values[row])
        mask = store.mask(row)
        if mask is None:
            return np.full((int(store.index.height[row]), int(store.index.width[row])), VOID, np.uint8)
        return mask

    @property
    def _values(self) -> npt.NDArray[Any]:
        if self.values is None:
            raise ValueError(f"a target of kind {self.kind} has no values: they are read row by row")
        return self.values


def labels(store: Store, wanted: Wanted) -> Target:
    """The target that label columns give.

    Args:
        wanted: one name for a class; several of 0/1 columns for findings; None for the store's first label, or for all
            0/1 columns where that is one of several.

    Raises:
        DataError: no labels, or one that has fewer than two classes.
        UsageError: a label that the store does not have, one named twice, or none named, and a finding that is not 0/1.
    """
    if not store.labels:
        raise DataError(f"the store {store.path} has no labels; add some: sslmed label STORE --labels CSV")
    names = _default(store) if wanted is None else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"data.target is {_listed(names)}; allowed: each once of {', '.join(store.labels)}")
    return _class(store, names[0]) if len(names) == 1 else _findings(store, names)


def masks(store: Store) -> Target:
    """The target that the store's masks give.

    Raises:
        DataError: there are none, or all of them show one class only.
    """
    classes = store.mask_classes
    if not classes:
        raise DataError(f"the store {store.path} has no masks; add some: sslmed label STORE --masks DIR")
    if len(classes) < 2:
        raise DataError(
            f"the masks of {store.path} have one class, {classes[0]}, and nothing to tell it from; "
            "add masks that show another: sslmed label STORE --masks DIR"
        )
    annotations = store.annotations
    return Target("masks", "mask", classes, annotations.masked(), None, annotations.mask_presence())


def one_label(store: Store, wanted: Wanted, reader: str) -> str | None:
    """The label that is wanted, or the store's first; None when it has none.

    Args:
        reader: what reads one label only, such as "the probe".

    Raises:
        UsageError: several are wanted.
    """
    if wanted is None:
        return store.default_target()
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if len(names) != 1:
        first = (*names, *store.labels, "NAME")[0]
        raise UsageError(f"data.target is {_listed(names)}, but {reader} reads one label; give data.target={first}")
    return names[0]


def _default(store: Store) -> tuple[str, ...]:
    first, *_ = store.labels.values()
    if first.kind != "binary":
        return (first.name,)
    return tuple(name for name, column in store.labels.items() if column.kind == "binary")


def _class(store: Store, name: str) -> Target:
    classes = store.classes(name)
    if len(classes) < 2:
        raise DataError(
            f"the label '{name}' of {store.path} has one class, {', '.join(classes)}, and nothing to tell it from; "
            "label images of another: sslmed label STORE --labels CSV"
        )
    values = store.target(name)
    return Target(name, "class", classes, values >= 0, values)


def _findings(store: Store, names: Sequence[str]) -> Target:
    for name in names:
        column = store.annotations.label(name)
        if column.kind != "binary":
            raise UsageError(
                f"data.target is {_listed(names)}, but '{name}' has the classes {', '.join(column.classes)}; "
                f"several targets must be 0/1 columns each. Give data.target={name} alone, or leave it out"
            )
    values = np.stack([store.target(name) for name in names], axis=1).astype(np.int8)
    return Target(", ".join(names), "findings", tuple(names), np.any(values >= 0, axis=1), values)


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"
