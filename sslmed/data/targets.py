"""What is learnt of each image: its class, its findings, its mask, or its boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.components import boxes_around
from sslmed.data.annotations.mask_values import VOID
from sslmed.data.store import Store

UNKNOWN = -1
PADDING = -1  # the class of rows that stand for no box, where a batch has images of fewer boxes than others
Wanted = str | Sequence[str] | None
_NO_BOXES = Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int16))


@dataclass(frozen=True, eq=False)
class Target:
    """A target of every row of a store. It travels to workers, so it holds arrays, not the store.

    Attributes:
        name: for people: a label, several with commas between, "masks", "boxes" or "boxes around masks".
        kind: one "class" of several, several "findings" of which each is there or not, a "mask", or "boxes".
        classes: names of the classes, of the findings, of the masks' numbers, of which the first is the background, or
            of the boxes' numbers.
        known: (rows,) which rows have a target; of findings, at least one of them; of boxes, those that have been
            searched for some, the negatives among them.
        values: of a class its number (rows,) int64, -1 unknown; of K findings 0 or 1 (rows, K) int8, -1 unknown; of
            masks and boxes None: they stay in the store.
        shown: of masks and boxes (rows, K), the classes that each row's mask or boxes show; otherwise None.
        around: of boxes, whether they are those around what the store's masks show; the store has no others.
    """

    name: str
    kind: Literal["class", "findings", "mask", "boxes"]
    classes: tuple[str, ...]
    known: npt.NDArray[np.bool_]
    values: npt.NDArray[Any] | None
    shown: npt.NDArray[np.bool_] | None = None
    around: bool = False

    def presence(self) -> npt.NDArray[np.bool_]:
        """Which classes each row shows, (rows, K); none where nothing is known."""
        if self.shown is not None:
            return self.shown
        if self.kind == "findings":
            return np.asarray(self._values == 1)
        return np.asarray(self._values[:, None] == np.arange(len(self.classes)))

    def of(self, row: int, store: Store) -> Any:
        """The target of a row before augmentation: a class number (), findings (K,), a mask (H, W) uint8, or `Boxes`.

        What is unknown is -1, in a mask 255; a row without a mask has one of 255 alone. A row without boxes has none,
        whether somebody has looked for some or not: ``known`` tells the two apart.

        Args:
            store: the one that the target is of.

        Raises:
            DataError: a mask that cannot be read.
        """
        if self.kind == "boxes" and not self.around:
            return store.boxes(row) or _NO_BOXES
        if self.kind not in ("mask", "boxes"):
            return np.asarray(self._values[row])
        mask = store.mask(row)
        if mask is None:
            mask = np.full((int(store.index.height[row]), int(store.index.width[row])), VOID, np.uint8)
        return boxes_around(mask) if self.around else mask

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


def boxes(store: Store) -> Target:
    """The target that the store's boxes give, or else the boxes around what its masks show (`boxes_around`).

    Raises:
        DataError: there are neither, or no image has a box.
    """
    annotations = store.annotations
    around = not annotations.boxed().any()
    if around and not annotations.masked().any():
        raise DataError(
            f"the store {store.path} has neither boxes nor masks, around which boxes could be laid; "
            "add some: sslmed label STORE --boxes FILE|DIR"
        )
    if around:
        classes, known, shown = store.mask_classes[1:], annotations.masked(), annotations.mask_presence()[:, 1:]
    else:
        classes, known = store.box_classes, annotations.boxed()
        shown = np.zeros((len(store), len(classes)), bool)
        shown[annotations.every_box()] = True
    if not shown.any():
        none = "mask of {} shows anything to lay a box around" if around else "image of {} has a box"
        raise DataError(f"no {none.format(store.path)}; add some that do: sslmed label STORE --boxes FILE|DIR")
    return Target("boxes around masks" if around else "boxes", "boxes", classes, known, None, shown, around)


def packed(boxes: Boxes) -> npt.NDArray[np.float32]:
    """The boxes as a row of a batch has them: (n, 5), left, top, right, bottom in pixels, and the class number."""
    return np.column_stack([boxes.xyxy, boxes.classes]).astype(np.float32)


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
