"""How boxes from class labels alone are judged: on the boxes or masks of test images, where the store has some."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from sslmed.config import DataError
from sslmed.data import targets
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.targets import Target
from sslmed.evaluation import detections, protocol
from sslmed.evaluation.detections import Detected, Found
from sslmed.supervised.box_scoring import write_curve
from sslmed.supervised.scoring import REPLICATES, LabelScorer, Tested, images, triples
from sslmed.supervised.weak_boxes import names_of

FOLDER = "weak"  # of the run, for what is kept of the boxes
WEAK = "weak boxes, from class labels alone"


class WeakScorer(LabelScorer):
    """As of any labels; the boxes, which taught nothing, are read once, for the test."""

    def test(self, run: Path) -> Tested:
        """The scores of the labels, and beside them those of the boxes."""
        tested = super().test(run)
        found, said = self._weak()
        notes = (*tested.notes, said)
        if found is None:
            return replace(tested, notes=notes)
        run = run / FOLDER
        run.mkdir(exist_ok=True)
        found.write(run)
        weights = protocol.bootstrap_weights(found.patient, REPLICATES, seed=0)
        values = triples(found, detections.measures(found.classes), weights)
        write_curve(run, found, weights)
        several = len(found.classes) > 1
        others = {WEAK: {name: value for name, value in values.items() if ":" not in name}}
        for name in found.classes if several else ():
            own = {kind.partition(":")[0]: value for kind, value in values.items() if kind.endswith(f":{name}")}
            others[f"{WEAK}: {name}"] = own
        return replace(tested, notes=notes, others=others)

    def _weak(self) -> tuple[Detected | None, str]:
        """What was found on the test images whose boxes are known, and what to tell of it."""
        task, head = self.task, self.applied.head
        located: tuple[int, ...] = head.located  # type: ignore[assignment]  # torch.nn types it as a module
        called = names_of(task.target.classes, task.target.name)
        names = {number: called[number] for number in located}
        try:
            truth = targets.boxes(task.store)
        except DataError:
            return None, f"weak boxes of {_listed(names.values())} could not be scored: the store has no boxes"
        numbers = _numbers(names, truth)
        rows = task.test[truth.known[task.test]]
        if not numbers or not len(rows):
            return None, (
                f"weak boxes of {_listed(names.values())} could not be scored: no test image has {truth.name} of them "
                f"(they are of {_listed(truth.classes)})"
            )
        its = {number: at for at, number in enumerate(numbers.values())}
        own = {label: at for at, label in enumerate(numbers)}
        boxes = [_renumbered(truth.of(row, task.store), its) for row in rows.tolist()]
        answers = replace(self.applied, locating=True)(images(task, rows))
        found = [_found(answer.boxes, own) for answer in answers]
        classes = tuple(names[label] for label in numbers)
        detected = Detected(rows, task.store.patients(rows), tuple(boxes), tuple(found), classes)
        pairs = [f"{truth.classes[number]} ({names[label]})" for label, number in numbers.items()]
        return detected, f"weak boxes are held against {truth.name} of {_listed(pairs)} on {len(rows)} test images"


def _numbers(names: dict[int, str], truth: Target) -> dict[int, int]:
    """From a label's class to the boxes' class of the same name; where there is one of each, they are the same."""
    same = {label: truth.classes.index(name) for label, name in names.items() if name in truth.classes}
    if not same and len(names) == len(truth.classes) == 1:
        return {next(iter(names)): 0}
    return same


def _renumbered(boxes: Boxes, numbers: dict[int, int]) -> Boxes:
    kept = np.isin(boxes.classes, list(numbers))
    classes = np.array([numbers[each] for each in boxes.classes[kept].tolist()], np.int16)
    return Boxes(boxes.xyxy[kept], classes)


def _found(found: Found | None, numbers: dict[int, int]) -> Found:
    assert found is not None  # noqa: S101  # what a head that locates answers
    kept = found.where(np.isin(found.classes, list(numbers)))
    return Found(kept.xyxy, kept.scores, np.array([numbers[each] for each in kept.classes.tolist()], np.int16))


def _listed(names: object) -> str:
    return ", ".join(map(str, names))  # type: ignore[call-overload]
