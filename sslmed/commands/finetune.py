"""``sslmed finetune``: a backbone and a few labels or masks in, a model and its honest score out."""

from collections.abc import Sequence
from pathlib import Path

from sslmed.data.input import open_store
from sslmed.recipe import load_finetune
from sslmed.supervised.result import FinetuneResult, conclude
from sslmed.supervised.tuning import carry_out, open_run, prepare


def finetune(
    recipe: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    start: str | Path = "random",
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> FinetuneResult:
    """Fine-tune a head, and the backbone unless it is frozen, on labelled train patients.

    Val patients decide when to stop, the temperature and the thresholds; test patients are read once, for the score
    that is returned.

    Args:
        recipe: a shipped name, such as ``xray/classification`` or ``ultrasound/segmentation``, or a file.
        data: the store.
        out: the run folder.
        start: a run or artifact, a weight file, ``imagenet`` or ``random``.
        overrides: ``section.key=value`` settings on top of the recipe.
        resume: go on with an interrupted run; everything else must be as it was.

    Raises:
        UsageError: a wrong recipe, a backbone in it that is not the artifact's, or a resume that would change anything.
        MissingInputError: the start is not there.
        DataError: the artifact does not fit the store, or there are too few labels.
        OutputExistsError: ``out`` is there and ``resume`` is not set.
        TrainingAborted: non-finite loss.
        Interrupted: a signal; the checkpoint is saved.
    """
    job = prepare(load_finetune(recipe, overrides), open_store(data), start)
    run = open_run(job, out, resume)
    if run.done:
        run.close()
        return FinetuneResult.from_dict(run.result)
    with run:
        return conclude(job, run, start, carry_out(job, run))
