"""What is learnt from which rows of a store, and how images become input."""

import json
from dataclasses import dataclass

import numpy as np

from sslmed.config import DataError, UsageError
from sslmed.data import targets
from sslmed.data.input import check_channels
from sslmed.data.loading import DataConfig
from sslmed.data.modality import Modality
from sslmed.data.sampling import Rows
from sslmed.data.store import Store
from sslmed.data.targets import Target
from sslmed.evaluation import protocol
from sslmed.heads import HEADS
from sslmed.image_size import sides
from sslmed.recipe import FinetuneRecipe
from sslmed.supervised.starting import policy_of

SHOWN = 3
DRAWN = ("mask", "boxes")  # kinds of targets that are drawn on images, where others are words about them
REMEDY = "Label some with sslmed label, or ingest again with a --split file that gives this side patients who show it"


@dataclass(frozen=True)
class Task:
    """A target, the labelled rows of each side that teach and judge it, and the input.

    Attributes:
        tiles: the network is given windows at the image's own resolution.
        shrunk_to: the shorter side to which ``ingest --size`` has shrunk larger images, in pixels.
        skipped: what is left out, in words.
    """

    store: Store
    policy: Modality
    target: Target
    train: Rows
    val: Rows
    test: Rows
    data: DataConfig
    channels: int
    tiles: bool = False
    shrunk_to: int | None = None
    skipped: tuple[str, ...] = ()

    def patients(self, rows: Rows) -> int:
        """How many patients the rows are of."""
        return len(np.unique(self.store.patients(rows)))


def task_of(settings: FinetuneRecipe, store: Store, channels: int) -> Task:
    """The task of a recipe, with the drawn train patients.

    Raises:
        UsageError: a setting that does not go with fine-tuning, an unknown label, or channels that do not fit.
        DataError: no labels, too few for the budget, none in val or test, a class that training would never see, or no
            image as large as a tile.
    """
    if settings.data.positives != "image":
        raise UsageError(
            f"data.positives is {settings.data.positives}, but fine-tuning compares no views; remove it from the recipe"
        )
    policy = policy_of(settings, store)
    check_channels(channels, store, policy, settings.data.slices)
    target = target_of(settings, store)
    skipped: list[str] = []
    train, val, test = (labelled(settings, store, target, side, skipped) for side in ("train", "val", "test"))
    drawn = draw(store, target, train, settings.labels.budget, settings.labels.seed)
    _check(store, target, drawn, val, test)
    return Task(
        store,
        policy,
        target,
        drawn,
        val,
        test,
        settings.data,
        channels,
        settings.head.tiles,  # type: ignore[attr-defined]
        _shrunk_to(store),
        tuple(skipped),
    )


def target_of(settings: FinetuneRecipe, store: Store) -> Target:
    """What the recipe's head learns of this store.

    Raises:
        UsageError, DataError: as `targets.labels`, `targets.masks` and `targets.boxes`.
    """
    name = settings.head.name  # type: ignore[attr-defined]
    (kind, *_) = HEADS[name].kinds
    if kind in DRAWN:
        what = "masks" if kind == "mask" else "boxes"
        if settings.data.target is not None:
            raise UsageError(
                f"data.target is {json.dumps(settings.data.target)}, which names labels, but {name} learns the "
                f"store's {what}; remove it"
            )
        return targets.masks(store) if kind == "mask" else targets.boxes(store)
    return targets.labels(store, settings.data.target)


def labelled(settings: FinetuneRecipe, store: Store, target: Target, side: str, skipped: list[str]) -> Rows:
    """The labelled rows of a side of the split, in tiles without the images that are too small; ``skipped`` says so.

    Raises:
        DataError: all of them are too small.
    """
    rows = store.rows(side)
    rows = rows[target.known[rows]]
    tiles = settings.head.tiles  # type: ignore[attr-defined]
    return _large(store, rows, settings.data, side, skipped) if tiles else rows


def draw(store: Store, target: Target, train: Rows, budget: str, seed: int) -> Rows:
    """The train rows of a budget.

    Raises:
        DataError: it cannot be drawn.
    """
    drawn, skipped = protocol.draws(
        store.patients(train),
        target.presence()[train],
        protocol.parse(budget),
        [seed],
        stratified=target.kind not in DRAWN,
        classes=target.classes,
    )
    if skipped:
        raise DataError(f"labels.budget={budget}: {skipped[0].why}")
    return train[drawn[0].rows]


def _large(store: Store, rows: Rows, data: DataConfig, side: str, skipped: list[str]) -> Rows:
    """The rows whose images are at least as large as a tile."""
    height, width = sides(data.size)
    small = (store.index.height[rows] < height) | (store.index.width[rows] < width)
    if len(rows) and small.all():
        first = rows[0]
        raise DataError(
            f"all {len(rows)} {side} annotated images of {store.path} are smaller than a tile of {height} x {width} "
            f"pixels (such as {store.index.height[first]} x {store.index.width[first]});\n"
            "give a smaller data.size, or head.input=whole"
        )
    if small.any():
        skipped.append(
            f"{int(small.sum())} {side} images smaller than a tile of {height} x {width} pixels are left out"
        )
    return rows[~small]


def _check(store: Store, target: Target, train: Rows, val: Rows, test: Rows) -> None:
    presence = target.presence()
    for name, rows in (("val", val), ("test", test)):
        if not len(rows) and (name == "test" or target.kind in DRAWN):
            what = {"mask": "a mask", "boxes": "boxes"}.get(target.kind, f"a label '{target.name}'")
            need = {"val": "training needs some to know when to stop", "test": "without them there is no honest score"}
            raise DataError(f"no {name} patient of {store.path} has {what}; {need[name]}.\n{REMEDY}")
    known = presence[train].any(axis=0)
    strange = presence[np.concatenate([val, test])].any(axis=0) & ~known
    if strange.any():
        names = ", ".join(np.array(target.classes)[strange][:SHOWN])
        raise DataError(
            f"the drawn train patients never show {names} of '{target.name}', but val or test patients of {store.path} "
            "do: a model cannot learn it.\nGive a larger labels.budget, or another --split to sslmed ingest"
        )
    if target.kind == "mask":
        if not presence[val][:, 1:].any():
            raise DataError(
                f"the val patients of {store.path} show no class but {target.classes[0]}; early stopping needs some.\n"
                f"{REMEDY}"
            )
    elif target.kind == "boxes":
        for side, judges, what in (("val", val, "early stopping"), ("test", test, "an honest score")):
            if not presence[judges].any():
                raise DataError(f"the {side} patients of {store.path} have no box; {what} needs some.\n{REMEDY}")
    elif not _two_sided(target, val):
        raise DataError(
            f"the val patients of {store.path} show fewer than two classes of '{target.name}'; "
            "early stopping needs both, so give a --split file or more labelled patients"
        )


def _two_sided(target: Target, rows: Rows) -> bool:
    """Whether a score can be made of the rows: two classes, or a finding that is there and not there."""
    if target.values is None:
        return True
    values = target.values[rows]
    if target.kind == "class":
        return len(np.unique(values)) >= 2
    return bool(((values == 1).any(axis=0) & (values == 0).any(axis=0)).any())


def _shrunk_to(store: Store) -> int | None:
    scans, first = store.scans, store.scans.first
    height, width = store.index.height[first], store.index.width[first]
    shrunk = (scans.source_height != height) | (scans.source_width != width)
    return int(np.minimum(height, width)[shrunk].max()) if shrunk.any() else None
