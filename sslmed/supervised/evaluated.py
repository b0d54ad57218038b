"""What a comparison of starts found: for people, for programs, and as files."""

import dataclasses
import json
import math
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sslmed.config import DataError, DiskError, MissingInputError
from sslmed.durable import PARTIAL, write_json
from sslmed.evaluation import comparison
from sslmed.evaluation.comparison import Row
from sslmed.evaluation.protocol import Interval, Skipped
from sslmed.supervised.starting import RANDOM

# The metric of the printed verdict, named beforehand: of many, one would often look better by chance.
HEADLINE = {"class": "auroc", "findings": "auroc", "mask": "dice", "boxes": "map50"}
NAME = "evaluation.json"
TITLE = {"auroc": "AUROC", "dice": "Dice", "map50": "mAP at IoU 0.5"}


@dataclass(frozen=True)
class EvaluateResult:
    """What ``evaluate`` found; the same as in ``evaluation.json``.

    Attributes:
        kind: of the target: class, findings, mask or boxes.
        seen: How many of the ``test_patients`` the model's pretraining has read; None when that cannot be told.
        seen_by: The same by start.
        skipped: Budgets that could not be drawn, with the reason.
        protocol: What someone needs to repeat the numbers.
        notes: What a reader must know before believing the numbers.
    """

    model: str
    data: str
    out: str
    target: str
    kind: str
    classes: tuple[str, ...]
    test_patients: int
    test_images: int
    seen: int | None
    seen_by: dict[str, int | None]
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    protocol: dict[str, Any]
    notes: tuple[str, ...]
    next: str

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Self:
        """What ``as_dict`` gave."""
        rows, skipped = (_row(each) for each in kept["rows"]), (Skipped(**each) for each in kept["skipped"])
        tuples = {name: tuple(kept[name]) for name in ("classes", "notes")}
        return cls(**(kept | tuples | {"rows": tuple(rows), "skipped": tuple(skipped)}))

    def as_dict(self) -> dict[str, Any]:
        """The result in JSON's types, nan as null."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def lines(self) -> list[str]:
        """The result for people: the headline and the verdict of each budget, probe and start."""
        table = [["budget", "by", "start", self._headline, RANDOM, "difference", "verdict"]]
        for row in self.rows:
            if row.metric == HEADLINE[self.kind] and row.arm != RANDOM:
                random = self.row(row.budget, row.probe, RANDOM, row.metric).value
                values = [comparison.text(row.value), comparison.text(random)]
                difference = comparison.text(row.difference, signed=True)
                table.append([row.budget, row.probe, row.arm, *values, difference, row.verdict or ""])
        every_metric = f"every metric: {Path(self.out) / 'evaluation.md'}"
        return [*self.preamble(), "", *comparison.aligned(table), "", *self.conditions(), every_metric]

    def row(self, budget: str, probe: str, arm: str, metric: str) -> Row:
        """The row of that budget, probe, arm and metric."""
        wanted = (budget, probe, arm, metric)
        return next(row for row in self.rows if (row.budget, row.probe, row.arm, row.metric) == wanted)

    def preamble(self) -> list[str]:
        """What was measured, on whom, and what speaks against it."""
        average = "mean over classes, each against rest"
        if self.kind == "class" and len(self.classes) == 2:
            average = f"positive: {self.classes[1]}"
        elif self.kind != "class":
            averaged = self.classes[1:] if self.kind == "mask" else self.classes
            average = "mean over findings" if self.kind == "findings" else f"mean over {', '.join(averaged)}"
        return [
            f"{self._headline} with 95 % intervals of {self.target}: {', '.join(self.classes)} ({average})",
            f"{self.test_images} test images of {self.test_patients} patients; {self._known(self.seen)}",
            *(
                f"{name}: {self._known(seen)}"
                for name, seen in self.seen_by.items()
                if seen != self.seen and name != RANDOM
            ),
            *self.notes,
        ]

    def conditions(self) -> list[str]:
        """What was left out, and what the numbers rest on."""
        about = self.protocol
        dropped = max(row.value.dropped for row in self.rows)
        draws = f"{about['seeds']} nested draws of train patients (at 100 % all draw the same)"
        how = "each fine-tuned by the same recipe for at most the same steps, stopped on all labelled val patients"
        if "C" in about:
            how = f"kNN k={about['k']} T={about['temperature']}; logistic regression C={about['C']}"
        return [
            *(f"skipped {part.budget}: {part.why}" for part in self.skipped),
            f"{draws}; {how}",
            f"{about['replicates']} bootstrap replicates of test patients, {dropped} left out for lack of a class",
            "intervals cover the choice of test patients; that of labels and of random starts shows in the sd of draws",
        ]

    @property
    def _headline(self) -> str:
        return TITLE[HEADLINE[self.kind]]

    def _known(self, seen: int | None) -> str:
        if seen is None:
            return "cannot tell whether pretraining has seen them: other keys, or a start from a foreign file"
        return f"{seen} of {self.test_patients} test patients were seen in pretraining"


def write(folder: Path, result: EvaluateResult) -> None:
    """Both files, whole or not at all; in a new folder unless runs lie there already.

    Raises:
        DiskError: they cannot be written.
    """
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    head = "\n".join(f"- {line}" for line in [*result.preamble(), *result.conditions()])
    try:
        partial.mkdir(parents=True)
        write_json(partial / NAME, result.as_dict())
        text = f"# Evaluation of {result.model}\n\n{head}\n\n{comparison.markdown(result.rows)}"
        (partial / "evaluation.md").write_text(text, encoding="utf-8")
        if folder.is_dir():
            for file in partial.iterdir():
                file.rename(folder / file.name)
        else:
            partial.rename(folder)
    except OSError as error:
        raise DiskError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def usual_folder(found: Path) -> Path:
    """Where an evaluation of the artifact in the folder ``found`` lies if nobody says otherwise: in its run, if any."""
    if (found.parent / "run.json").is_file():
        return found.parent / "evaluation"
    return found.with_name(f"{found.name}-evaluation")


def read(folder: Path) -> EvaluateResult:
    """What ``write`` has written.

    Raises:
        MissingInputError: there is no evaluation.
        DataError: it is not readable.
    """
    try:
        return EvaluateResult.from_dict(json.loads((folder / NAME).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise MissingInputError(f"there is no evaluation in {folder}; `sslmed evaluate` makes one") from error
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{folder / NAME} is not readable ({error}); evaluate again") from error


def _row(kept: dict[str, Any]) -> Row:
    difference = kept["difference"]
    own = {"value": _interval(kept["value"]), "difference": None if difference is None else _interval(difference)}
    spread = kept["draw_sd"]
    return Row(**(kept | own | {"draw_sd": math.nan if spread is None else spread}))


def _interval(kept: dict[str, Any]) -> Interval:
    mean, low, high = (math.nan if kept[name] is None else float(kept[name]) for name in ("mean", "low", "high"))
    return Interval(mean, low, high, int(kept["dropped"]))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
