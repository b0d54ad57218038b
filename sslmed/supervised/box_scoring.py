"""How a detector is judged: mAP on val while it is trained, calibrated on val once, and tested once."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.data.annotations.boxes import Boxes
from sslmed.durable import write_atomically
from sslmed.evaluation import box_calibration, curves, detections, froc, protocol
from sslmed.evaluation.detections import Detected, Found
from sslmed.supervised.applying import Applied
from sslmed.supervised.scoring import REPLICATES, Settled, Tested, Triple, groups_of, images, triples
from sslmed.supervised.task import Task

RATES = tuple(np.geomspace(0.125, 8.0, 49).tolist())  # false positives an image at which the curve is written down
CURVE, PICTURE = "test_froc.csv", "froc.png"
WITHOUT, EFFECT = "without the reducer", "gained by the reducer"


class BoxScorer:
    """Of boxes: mAP on val, a temperature, an offset and thresholds from val, mAP and FROC on test."""

    def __init__(self, task: Task, applied: Applied) -> None:
        self.task, self.applied, self.settled = task, applied, Settled()

    def val(self) -> float:
        """mAP at an IoU of 0.5."""
        measure = detections.measures(self.task.target.classes)[self.applied.head.metrics()[0]]
        return float(measure(self._detected("val")))

    def settle(self) -> None:
        """Temperature, offset and the threshold of each class."""
        head = self.applied.head
        head.temperature, head.offset = 1.0, 0.0
        found = self._detected("val")
        scores = np.concatenate([each.scores for each in found.found])
        hit = np.concatenate(box_calibration.hits(found))
        head.temperature, head.offset = box_calibration.fit(scores, hit)
        after = box_calibration.calibrated(scores, head.temperature, head.offset)
        about = {"val_ece_before": box_calibration.ece(scores, hit), "val_ece_after": box_calibration.ece(after, hit)}
        about = {name: value for name, value in about.items() if np.isfinite(value)}
        self.settled = Settled(box_calibration.thresholds(self._detected("val")), about)

    def test(self, run: Path) -> Tested:
        """Scores of the test images, ``test_boxes.csv``, and the FROC curve as a table and a picture."""
        task, found = self.task, self._detected("test")
        found.write(run)
        weights = protocol.bootstrap_weights(found.patient, REPLICATES, seed=0)
        measures = detections.measures(task.target.classes)
        values = triples(found, measures, weights)
        overall, by_class = split(values, task.target.classes)
        plain = {kind: measures[kind] for kind in overall}
        groups, notes = groups_of(task.store, task.test, found, plain, weights)
        empty = int(sum(not len(each) for each in found.truth))
        if empty:
            notes.append(f"{empty} of {len(found.row)} test images have no box: what is found there is false")
        write_curve(run, found, weights)
        others = self._without_reducer(found, plain, weights)
        return Tested(overall, by_class, groups, notes=tuple(notes), others=others)

    def _without_reducer(self, found: Detected, measures: Any, weights: Any) -> dict[str, dict[str, Triple]]:
        head: Any = self.applied.head
        if not getattr(head, "reducing", False):
            return {}
        head.reducing = False
        try:
            arms = {"with": [found], "without": [self._detected("test")]}
        finally:
            head.reducing = True
        compared = protocol.summarise(arms, measures, weights, reference="without")
        alone = {each.metric: each.value for each in compared if each.arm == "without"}
        gained = {each.metric: each.difference for each in compared if each.difference is not None}
        return {
            title: {name: (value.mean, value.low, value.high) for name, value in row.items()}
            for title, row in ((WITHOUT, alone), (EFFECT, gained))
        }

    def _detected(self, side: str) -> Detected:
        task, rows = self.task, getattr(self.task, side)
        found: list[Found] = []
        for answer in self.applied(images(task, rows)):
            assert answer.boxes is not None  # noqa: S101  # what a head of boxes answers
            found.append(answer.boxes)
        truth: list[Boxes] = [task.target.of(row, task.store) for row in rows.tolist()]
        return Detected(rows, task.store.patients(rows), tuple(truth), tuple(found), task.target.classes)


def split(values: dict[str, Triple], classes: Sequence[str]) -> tuple[dict[str, Triple], dict[str, dict[str, Triple]]]:
    """The measures of all classes together, and those of each class where there are several."""
    overall = {name: value for name, value in values.items() if ":" not in name}
    if len(classes) < 2:
        return overall, {}
    return overall, {name: {kind: values[f"{kind}:{name}"] for kind in overall} for name in classes}


def write_curve(run: Path, found: Detected, weights: Any) -> None:
    """``test_froc.csv``: the mean sensitivity over classes at each rate with its band; and the curve as a picture."""
    low, high = froc.bands(found, weights, RATES)
    rates, mean = froc.curve(found, None)
    at = np.searchsorted(rates, np.array(RATES) + 1e-9, side="right") - 1
    with write_atomically(run / CURVE) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("false_positives_an_image", "sensitivity", "low", "high"))
        writer.writerows([f"{each:.6g}" for each in line] for line in zip(RATES, mean[at], low, high, strict=True))
    by_class = {name: froc.curve(found, number) for number, name in enumerate(found.classes)}
    plots = run / "plots"
    plots.mkdir(exist_ok=True)
    picture = curves.free_response(by_class, (np.array(RATES), mean[at], low, high))
    with write_atomically(plots / PICTURE) as partial:
        partial.write_bytes(picture)
