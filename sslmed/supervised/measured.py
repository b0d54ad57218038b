"""Scores as a card holds them: of a backbone those of `evaluate`, of a fine-tuned model its own."""

import math

from sslmed import image_size
from sslmed.artifact import OVERALL, Measured, Score
from sslmed.supervised.evaluated import HEADLINE, EvaluateResult
from sslmed.supervised.scoring import REPLICATES, Tested
from sslmed.supervised.task import Task


def of_model(task: Task, tested: Tested, budget: str, by: str, seen: int | None) -> Measured:
    """The test scores of a fine-tuned model; undefined ones are left out.

    Args:
        budget: of labels.
        by: the head's name.
        seen: how many test patients the start had seen; None when that cannot be told.
    """
    patients = task.patients(task.test)
    about = [
        f"'{task.target.name}' on {len(task.test)} test images of {patients} patients, read once; 95 % intervals by "
        f"{REPLICATES} bootstrap replicates of test patients",
        "cannot tell whether pretraining has seen them: other keys, or a start from a foreign file"
        if seen is None
        else f"{seen} of {patients} test patients were seen in pretraining",
        *([f"distances are in {tested.unit}"] if tested.unit else []),
        *task.skipped,
        *tested.notes,
    ]
    scores = [
        Score(start=whose, budget=budget, by=by, metric=metric, value=value[0], low=value[1], high=value[2])
        for whose, each in {OVERALL: tested.overall, **tested.by_class, **tested.others}.items()
        for metric, value in each.items()
        if all(map(math.isfinite, value))
    ]
    return Measured(about=tuple(about), headline=HEADLINE[task.target.kind], scores=tuple(scores))


def of_backbone(result: EvaluateResult) -> Measured:
    """What `evaluate` found of a backbone and of the starts beside it; undefined scores are left out."""
    scores = []
    for row in result.rows:
        value = (row.value.mean, row.value.low, row.value.high)
        if all(map(math.isfinite, value)):
            named = {"start": row.arm, "budget": row.budget, "by": row.probe, "metric": row.metric}
            scores.append(Score(**named, value=value[0], low=value[1], high=value[2]))
    size = image_size.in_words(result.protocol["size"])
    about = (*result.preamble(), *result.conditions(), f"images of {size} pixels")
    return Measured(about=about, headline=HEADLINE[result.kind], scores=tuple(scores))
