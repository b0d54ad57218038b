"""What a fine-tuning gives back, kept in its run: who taught, who judged, every score."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sslmed.console import command
from sslmed.durable import write_atomically
from sslmed.run import Run
from sslmed.supervised.report import markdown, text
from sslmed.supervised.scoring import Subgroup, Triple
from sslmed.supervised.tuning import Job, Tuned

SHOWN = (
    "map50",
    "map",
    "froc",
    "sensitivity_at_1",
    "auroc",
    "average_precision",
    "sensitivity_at_90_specificity",
    "balanced_accuracy",
    "f1",
    "ece",
)
REPORT = "test_scores.md"


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tuning.

    Attributes:
        target: the label or labels that were learnt, "masks" or "boxes".
        kind: one class an image, several findings an image, a mask, or boxes.
        val_patients: labelled patients that decided when to stop; the budget does not count them.
        seen: how many test patients the start had seen; None when that cannot be told.
        test: (value, low, high) of each metric, 95 % by bootstrap of test patients.
        by_class: the same of each class or finding; empty with two classes.
        subgroups: the same of each group of each meta column.
        unit: of distances.
        others: what else was measured on the same test images, by title and metric.
        calibration: ECE and Brier score on val, before and after.
        thresholds: from which probability on each class is called; None where the likeliest is.
        notes: what was left out.
    """

    run: str
    artifact: str
    start: str
    target: str
    kind: str
    classes: tuple[str, ...]
    train_images: int
    train_patients: int
    val_patients: int
    test_images: int
    test_patients: int
    seen: int | None
    best_step: int
    test: dict[str, Triple]
    by_class: dict[str, dict[str, Triple]]
    subgroups: tuple[Subgroup, ...]
    unit: str
    others: dict[str, dict[str, Triple]]
    calibration: dict[str, float]
    thresholds: tuple[float, ...] | None
    notes: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        about = [
            f"fine-tuned from {self.start} on {self.train_images} images of {self.train_patients} patients, "
            f"stopped on {self.val_patients} val patients at step {self.best_step}",
            f"'{self.target}' on {self.test_images} test images of {self.test_patients} patients, with 95 % intervals; "
            + self._seen(),
        ]
        for name, scores in {"": self.test, **self.by_class, **self.others}.items():
            shown = {metric: value for metric, value in scores.items() if metric in SHOWN or self.kind == "mask"}
            words = ", ".join(f"{metric} {text(value)}{self._unit(metric)}" for metric, value in shown.items())
            if name:
                about.append(f"  {name}: {words}")
            else:
                about += [f"  {metric} {text(value)}{self._unit(metric)}" for metric, value in shown.items()]
        if "val_ece_before" in self.calibration:
            about.append(
                f"  calibrated on val: ECE {self.calibration['val_ece_before']:.3f} before, "
                f"{self.calibration['val_ece_after']:.3f} after"
            )
        about += [f"note: {note}" for note in self.notes]
        return [*about, f"every metric, class and subgroup: {Path(self.run) / REPORT}", f"model: {self.artifact}"]

    def _unit(self, metric: str) -> str:
        return f" {self.unit}" if metric in ("hd95", "asd") else ""

    def _seen(self) -> str:
        if self.seen is None:
            return "cannot tell whether pretraining has seen them"
        return f"{self.seen} of them were seen in pretraining"

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Self:
        """The result that a finished run has kept."""
        tuples = {name: tuple(kept[name]) for name in ("classes", "notes")}
        return cls(
            **(
                kept
                | tuples
                | {
                    "thresholds": None if kept["thresholds"] is None else tuple(kept["thresholds"]),
                    "test": _triples(kept["test"]),
                    "others": {name: _triples(scores) for name, scores in kept["others"].items()},
                    "by_class": {name: _triples(scores) for name, scores in kept["by_class"].items()},
                    "subgroups": tuple(
                        Subgroup(**(each | {"scores": _triples(each["scores"])})) for each in kept["subgroups"]
                    ),
                }
            )
        )


def conclude(job: Job, run: Run, start: str | Path, tuned: Tuned) -> FinetuneResult:
    """The result of a fine-tuning, kept in its run with a page of all scores.

    Args:
        start: what it was called.
    """
    task, tested, settled = job.task, tuned.tested, job.scorer.settled
    result = FinetuneResult(
        run=str(run.path),
        artifact=str(run.artifact),
        start=str(start),
        target=task.target.name,
        kind=task.target.kind,
        classes=task.target.classes,
        train_images=len(task.train),
        train_patients=task.patients(task.train),
        val_patients=task.patients(task.val),
        test_images=len(task.test),
        test_patients=task.patients(task.test),
        seen=tuned.seen,
        best_step=tuned.best_step,
        test=tested.overall,
        by_class=tested.by_class,
        subgroups=tested.subgroups,
        unit=tested.unit,
        others=tested.others,
        calibration=settled.about,
        thresholds=settled.thresholds,
        notes=(*task.skipped, *tested.notes),
        next=command("sslmed", "predict", run.path, "SOURCE", "--out", "DIR"),
    )
    with write_atomically(run.path / REPORT) as partial:
        partial.write_text(markdown(task, tested, settled), encoding="utf-8")
    run.finish(result.as_dict())
    return result


def _triples(kept: dict[str, Any]) -> dict[str, Triple]:
    """JSON has null for what is undefined."""
    found = {name: [math.nan if each is None else each for each in values] for name, values in kept.items()}
    return {name: (value, low, high) for name, (value, low, high) in found.items()}
