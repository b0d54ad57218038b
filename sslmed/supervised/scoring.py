"""How a head is judged: on val while it is trained, calibrated on val once, and tested once."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sslmed.data.annotations.mask_values import VOID
from sslmed.data.intensity import Intensity
from sslmed.data.sampling import Rows
from sslmed.data.store import Store
from sslmed.data.views import Pixels
from sslmed.evaluation import calibration, metrics, overlap, predictions, protocol, subgroups
from sslmed.evaluation.metrics import Scored
from sslmed.supervised.applying import Applied
from sslmed.supervised.task import Task

REPLICATES = 1000
PLACES = frozenset({"study", "series", "position"})  # meta columns that say where an image lies, not what it is of

Triple = tuple[float, float, float]
Measures = Mapping[str, Callable[[Any, Any], Any]]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Settled:
    """What val patients have decided after training: thresholds, and how probabilities did before and after."""

    thresholds: tuple[float, ...] | None = None
    about: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subgroup:
    """The test scores of one group of a meta column; ``images`` counts volumes where these are what is scored."""

    column: str
    name: str
    patients: int
    images: int
    scores: dict[str, Triple]


@dataclass(frozen=True)
class Tested:
    """Test scores, each (value, low, high), 95 % by bootstrap of test patients.

    Attributes:
        overall: by metric.
        by_class: by class or finding, and within by metric.
        subgroups: of each meta column; ``notes`` tells of groups that are too small.
        unit: of distances, "mm" or "px"; "" without.
        others: what else was measured on the same test images, by title and metric.
        notes: what was left out.
    """

    overall: dict[str, Triple]
    by_class: dict[str, dict[str, Triple]]
    subgroups: tuple[Subgroup, ...]
    unit: str = ""
    notes: tuple[str, ...] = ()
    others: dict[str, dict[str, Triple]] = field(default_factory=dict)


class Scorer(Protocol):
    """One for images' classes and findings, one for masks, one for boxes. ``settled`` counts after ``settle``."""

    applied: Applied
    settled: Settled

    def val(self) -> float:
        """The score that decides early stopping, of the val rows."""

    def settle(self) -> None:
        """Calibrate the head on val."""

    def test(self, run: Path) -> Tested:
        """Score the test rows, once; each image's own result is kept in the run."""


def images(task: Task, rows: Rows) -> Iterator[tuple[Pixels, Intensity]]:
    """Store rows as `Applied` takes them, in their order."""
    store, slices = task.store, task.data.slices
    return ((store.pixels(row, slices), store.intensity(row)) for row in rows.tolist())


class LabelScorer:
    """Of classes and findings: AUROC on val, a temperature and thresholds from val, every metric on test."""

    def __init__(self, task: Task, applied: Applied) -> None:
        self.task, self.applied, self.settled = task, applied, Settled()

    def val(self) -> float:
        measure = metrics.METRICS[self.applied.head.metrics()[0]]
        return float(measure(self._truth("val"), self._scores("val")))

    def settle(self) -> None:
        head, truth = self.applied.head, self._truth("val")
        head.temperature = 1.0
        before = self._scores("val")
        logits = np.log(np.clip(before, 1e-30, None))  # softmax forgets what they have in common
        if head.kind == "findings":
            logits -= np.log1p(-np.clip(before, None, 1 - 1e-15))
        head.temperature = calibration.temperature(logits, truth)
        after = _probabilities(logits / head.temperature, head.kind)
        cuts = calibration.thresholds(truth, after)
        about = {f"val_{name}_before": float(metrics.METRICS[name](truth, before)) for name in ("ece", "brier")}
        about |= {f"val_{name}_after": float(metrics.METRICS[name](truth, after)) for name in ("ece", "brier")}
        about = {name: value for name, value in about.items() if np.isfinite(value)}
        self.settled = Settled(None if cuts is None else tuple(cuts.tolist()), about)

    def test(self, run: Path) -> Tested:
        task, target, rows = self.task, self._truth("test"), self._units("test")[0]
        scored = Scored(self._scores("test"), _array(self.settled.thresholds))
        patients = task.store.patients(rows)
        kept = predictions.Predictions(rows, patients, target, scored.scores, task.target.classes, scored.thresholds)
        kept.write(run)
        weights = protocol.bootstrap_weights(patients, REPLICATES, seed=0)
        wanted = self.applied.head.metrics()
        whole = {name: each for name, each in metrics.measures(target).items() if name in wanted}
        by_class = {}
        if len(task.target.classes) > 2 or task.target.kind == "findings":
            for label, name in enumerate(task.target.classes):
                one = {key: each for key, each in metrics.measures(target, label).items() if key in wanted}
                by_class[name] = triples(scored, one, weights)
        groups, notes = groups_of(task.store, rows, scored, whole, weights)
        if len(rows) < len(task.test):
            notes.append(
                f"{len(task.test)} slices and frames are scored as {len(rows)} scans, by their mean probability"
            )
        return Tested(triples(scored, whole, weights), by_class, groups, notes=tuple(notes))

    def _scores(self, side: str) -> Floats:
        """Of each unit the mean over its rows, as `predict` answers."""
        each = np.stack([answer.scores for answer in self.applied(images(self.task, getattr(self.task, side)))])
        first, unit = self._units(side)
        total = np.zeros((len(first), each.shape[1]))
        np.add.at(total, unit, each)
        return np.asarray(total / np.bincount(unit)[:, None])

    def _truth(self, side: str) -> npt.NDArray[Any]:
        return np.asarray(self.task.target.values)[self._units(side)[0]]

    def _units(self, side: str) -> tuple[Rows, Rows]:
        """The first row of each unit, and the unit of each row: a scan whose labelled rows agree, else a row."""
        rows: Rows = getattr(self.task, side)
        values = np.asarray(self.task.target.values)[rows].reshape(len(rows), -1)
        scan = self.task.store.index.scan[rows].astype(np.int64)
        _, first, unit = np.unique(scan, return_index=True, return_inverse=True)
        if not np.array_equal(values, values[first][unit]):
            return rows, np.arange(len(rows))
        return rows[first], unit


class MaskScorer:
    """Of masks: mean Dice on val, Dice, IoU and distances on test; a volume is one unit, put together from slices."""

    def __init__(self, task: Task, applied: Applied) -> None:
        self.task, self.applied, self.settled = task, applied, Settled()

    def val(self) -> float:
        """The mean over foreground classes of the mean Dice of val units that show or predict the class."""
        dice = [overlap.dice(overlap.counts(true, found, self._classes)) for _, true, found in self._units("val")]
        foreground = np.stack(dice)[:, 1:]
        shown = ~np.isnan(foreground)
        means = np.nansum(foreground, axis=0)[shown.any(axis=0)] / shown.sum(axis=0)[shown.any(axis=0)]
        return float(means.mean())

    def settle(self) -> None:
        """Nothing: masks take the likeliest class, which no temperature changes."""

    def test(self, run: Path) -> Tested:
        store, classes = self.task.store, self.task.target.classes
        first = self.task.test[np.unique(self._scan_of("test"), return_index=True)[1]]
        spacing = self._spacing(first)
        unit = "px" if any(np.isnan(each).any() for each in spacing) else "mm"
        units = [
            overlap.judge(
                number,
                bytes(store.patients(first[[at]])[0]),
                true,
                found,
                self._classes,
                spacing[at] if unit == "mm" else 1.0,
            )
            for at, (number, true, found) in enumerate(self._units("test"))
        ]
        overlaps = overlap.Overlaps.of(units, unit, classes)
        overlaps.write(run)
        weights = protocol.bootstrap_weights(overlaps.patient, REPLICATES, seed=0)
        measures = overlap.measures(classes)
        found = triples(overlaps, measures, weights)
        overall = {name: value for name, value in found.items() if ":" not in name}
        by_class = {name: {kind: found[f"{kind}:{name}"] for kind in overlap.KINDS} for name in classes[1:]}
        groups, notes = groups_of(store, first, overlaps, {kind: measures[kind] for kind in overlap.KINDS}, weights)
        left = {name: int(count) for name, count in zip(classes, overlaps.left_out, strict=True) if count}
        notes += [f"{count} test units neither show nor predict {name}" for name, count in left.items()]
        return Tested(overall, by_class, groups, unit, tuple(notes))

    def _units(self, side: str) -> Iterator[tuple[int, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """The scan's number, true and predicted labels: (H, W) of an image, (D, H, W) of a volume.

        A volume reaches from its first slice with a mask to its last; what has none between them counts for nothing.
        """
        rows, scans = getattr(self.task, side), self._scan_of(side)
        found = self.applied(images(self.task, rows))
        for number in np.unique(scans):
            own = rows[scans == number]
            true = np.stack([self.task.target.of(row, self.task.store) for row in own.tolist()])
            predicted = np.stack([np.asarray(next(found).labels) for _ in own])
            if int(self.task.store.scans.depth[number]) == 1:
                yield int(number), true[0], predicted[0]
            else:
                depth = self.task.store.index.slice[own].astype(np.int64)
                yield int(number), _at(depth, true, VOID), _at(depth, predicted, 0)

    def _scan_of(self, side: str) -> npt.NDArray[np.int64]:
        return np.asarray(self.task.store.index.scan[getattr(self.task, side)].astype(np.int64))

    def _spacing(self, first: Rows) -> Sequence[Any]:
        """Of each unit, mm: (down, across), or (slice to slice, down, across); nan where the file does not say."""
        store = self.task.store
        scans = store.index.scan[first].astype(np.int64)
        depth = store.scans.depth[scans]
        all_ = store.scans.spacing[scans]
        return [sides if deep > 1 else sides[1:] for sides, deep in zip(all_, depth, strict=True)]

    @property
    def _classes(self) -> int:
        return len(self.task.target.classes)


def _at(depth: Rows, slices: npt.NDArray[np.uint8], otherwise: int) -> npt.NDArray[np.uint8]:
    """The slices at their own depth, so that distances between them are true."""
    whole = np.full((int(depth.max() - depth.min()) + 1, *slices.shape[1:]), otherwise, np.uint8)
    whole[depth - depth.min()] = slices
    return whole


def _probabilities(logits: Floats, kind: str) -> Floats:
    """As `Head.predict` has them."""
    if kind == "findings":
        return np.asarray(1 / (1 + np.exp(-logits)))
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def triples(scored: Any, measures: Measures, weights: Any) -> dict[str, Triple]:
    """Each measure with its interval."""
    return _triple_of(protocol.summarise({"model": [scored]}, measures, weights))


def _triple_of(estimates: Iterable[protocol.Estimate]) -> dict[str, Triple]:
    return {each.metric: (each.value.mean, each.value.low, each.value.high) for each in estimates}


def _array(values: Sequence[float] | None) -> Floats | None:
    return None if values is None else np.array(values)


def groups_of(
    store: Store, rows: Rows, scored: Any, measures: Measures, weights: Any
) -> tuple[tuple[Subgroup, ...], list[str]]:
    """The scores within each group of each meta column, and what is said of groups that are too small."""
    found: list[Subgroup] = []
    notes: list[str] = []
    patients = store.patients(rows)
    for column, about in store.meta_columns.items():
        if column in PLACES:
            continue
        members = subgroups.groups(store.meta(column)[rows], about.categories)
        measured, small = subgroups.table(members, patients, {"model": [scored]}, measures, weights)
        found += [
            Subgroup(column, each.name, each.patients, each.images, _triple_of(each.estimates)) for each in measured
        ]
        if small:
            notes.append(f"{column}: not scored, for want of patients: {', '.join(each.name for each in small[:5])}")
    return tuple(found), notes
