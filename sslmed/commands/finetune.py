"""``sslmed finetune``: a backbone and a few labels, masks or boxes in, a model and its honest score out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslmed.data.input import open_store
from sslmed.distributed import first, together
from sslmed.recipe import FinetuneRecipe, load_finetune
from sslmed.run import read
from sslmed.supervised.result import FinetuneResult, conclude
from sslmed.supervised.tuning import open_run, prepare, score, train
from sslmed.training.launch import goes_on, joined, launch
from sslmed.training.trainer import device, processes


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
    settings = load_finetune(recipe, overrides)
    count = processes(settings.train)
    if count > 1:
        words = ["finetune", str(recipe), *overrides, "--data", str(data), "--from", str(start), "--out", str(out)]
        launch([*words, "--resume"] if resume else words, count)
        return FinetuneResult.from_dict(read(Path(out))["result"])
    with joined(device(settings.train) == "cuda", settings.train.timeout):
        return _finetune(settings, data, out, start, resume)


def _finetune(
    settings: FinetuneRecipe, data: str | Path, out: str | Path, start: str | Path, resume: bool
) -> FinetuneResult:
    with together():
        job = prepare(settings, open_store(data), start)
    run = open_run(job, out, goes_on(out) or resume)
    if run.done:
        run.close()
        return FinetuneResult.from_dict(run.result)
    with run:
        best_step = train(job, run)

        def conclusion() -> dict[str, Any]:
            conclude(job, run, start, score(job, run, best_step))
            return run.result

        return FinetuneResult.from_dict(first(conclusion))
