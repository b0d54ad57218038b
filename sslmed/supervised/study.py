"""Fine-tuning from several starts at several budgets, compared: every cell a run, equal in all but its start."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslmed.config import DataError, UsageError
from sslmed.console import say
from sslmed.data.store import Store
from sslmed.evaluation import detections, metrics, overlap, predictions, protocol
from sslmed.evaluation.comparison import Row
from sslmed.evaluation.protocol import Budget, Skipped
from sslmed.recipe import FinetuneRecipe
from sslmed.supervised.arms import Arm
from sslmed.supervised.result import conclude
from sslmed.supervised.starting import RANDOM
from sslmed.supervised.task import DRAWN, labelled, target_of
from sslmed.supervised.tuning import Job, carry_out, open_run, prepare
from sslmed.training.trainer import processes

FINETUNED = "fine-tuned"
RUNS = "runs"


@dataclass(frozen=True)
class Cell:
    """One fine-tuning: a start, a budget, and the seed of label draw, head and training."""

    arm: Arm
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.arm.name}-{self.budget}-{self.seed}"


def drawable(
    recipe: FinetuneRecipe, store: Store, budgets: Sequence[Budget], seeds: int
) -> tuple[list[Budget], list[Skipped]]:
    """The budgets that can be drawn under every seed, and the others with the reason."""
    target = target_of(recipe, store)
    rows = labelled(recipe, store, target, "train", [])
    _, skipped = protocol.draws(
        store.patients(rows),
        target.presence()[rows],
        budgets,
        range(seeds),
        stratified=target.kind not in DRAWN,
        classes=target.classes,
    )
    left = {each.budget for each in skipped}
    return [budget for budget in budgets if budget.text not in left], skipped


def prepared(recipe: FinetuneRecipe, store: Store, cell: Cell) -> Job:
    """A cell that could begin.

    Raises:
        UsageError, MissingInputError, DataError: see `tuning.prepare`.
    """
    if processes(recipe.train) > 1:
        raise UsageError(f"train.devices is {recipe.train.devices}; evaluate fine-tunes in one process: remove it")
    labels = recipe.labels.model_copy(update={"budget": cell.budget, "seed": cell.seed})
    train = recipe.train.model_copy(update={"seed": cell.seed})
    settings = cell.arm.recipe(recipe).model_copy(update={"labels": labels, "train": train})
    return prepare(settings, store, cell.arm.source)


def fine_tune(recipe: FinetuneRecipe, store: Store, cell: Cell, folder: Path) -> Path:
    """Carry out a cell, or go on with it; its run. A finished one is left as it is."""
    out = folder / RUNS / cell.name
    if out.is_dir() and not (out / "run.json").exists():
        shutil.rmtree(out)  # killed while it was being made
    job = prepared(recipe, store, cell)
    run = open_run(job, out, resume=(out / "run.json").exists())
    if run.done:
        run.close()
        return out
    say(f"{cell.name}: fine-tuning on {len(job.task.train)} images")
    with run:
        conclude(job, run, cell.arm.source, carry_out(job, run))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # a hundred runs would be many gigabytes
    return out


def compared(runs: Mapping[str, Sequence[Path]], budget: str, patients: int, replicates: int) -> list[Row]:
    """Every measure of every arm at one budget, a run a seed, beside random weights, paired by test patient.

    Raises:
        DataError: runs that were not tested on the same images.
    """
    kind = _kind(next(iter(runs.values()))[0])
    loaded: dict[str, list[Any]] = {arm: [kind.load(run) for run in each] for arm, each in runs.items()}
    first = loaded[RANDOM][0]
    if not all(each.same_test(first) for loaded_arm in loaded.values() for each in loaded_arm):
        raise DataError("the runs were tested on different images; remove the folder and evaluate again")
    measures = kind.measures(first)
    weights = protocol.bootstrap_weights(first.patient, replicates, seed=0)
    rows = []
    for found in protocol.summarise(loaded, measures, weights, reference=RANDOM):
        said = None
        if found.difference is not None:
            lower = found.metric.partition(":")[0] in kind.lower_is_better
            said = protocol.verdict(found.difference, RANDOM, lower_is_better=lower)
        draws = len(runs[found.arm])
        rows.append(
            Row(
                budget,
                FINETUNED,
                found.arm,
                found.metric,
                found.value,
                patients,
                draws,
                found.draw_sd,
                found.difference,
                said,
            )
        )
    return rows


class _Labels:
    """Runs that learnt classes or findings."""

    lower_is_better = metrics.LOWER_IS_BETTER

    @staticmethod
    def load(run: Path) -> predictions.Predictions:
        return predictions.read(run)

    @staticmethod
    def measures(first: predictions.Predictions) -> dict[str, Any]:
        found = metrics.measures(first.target)
        return {name: (lambda each, weights, of=of: of(each.scored, weights)) for name, of in found.items()}


class _Masks:
    """Runs that learnt masks."""

    lower_is_better = frozenset({"hd95", "asd"})

    @staticmethod
    def load(run: Path) -> overlap.Overlaps:
        return overlap.read(run)

    @staticmethod
    def measures(first: overlap.Overlaps) -> dict[str, Any]:
        return dict(overlap.measures(first.classes))


class _Boxes:
    """Runs that learnt boxes."""

    lower_is_better: frozenset[str] = frozenset()

    @staticmethod
    def load(run: Path) -> detections.Detected:
        return detections.read(run)

    @staticmethod
    def measures(first: detections.Detected) -> dict[str, Any]:
        return dict(detections.measures(first.classes))


def _kind(run: Path) -> type[_Labels] | type[_Masks] | type[_Boxes]:
    if (run / overlap.NAME).is_file():
        return _Masks
    return _Labels if (run / predictions.NAME).is_file() else _Boxes  # weak boxes lie beside predictions
