"""One fine-tuning, from a recipe, a store and a start to a model with its honest score."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sslmed import artifact
from sslmed.config import DataError, UsageError
from sslmed.data import modality
from sslmed.data.loading import ViewDataset
from sslmed.data.modality import Modality
from sslmed.data.raw_batches import RawDataset
from sslmed.data.sampling import Rows
from sslmed.data.store import Store
from sslmed.distributed import agree, together, world_size
from sslmed.evaluation import familiarity
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.image_size import ImageSize, in_words, sides
from sslmed.models.backbones import in_timm
from sslmed.recipe import FinetuneRecipe, changes, dump, load_finetune
from sslmed.run import Run
from sslmed.supervised import measured, self_test
from sslmed.supervised.applying import Applied
from sslmed.supervised.box_scoring import BoxScorer
from sslmed.supervised.scoring import LabelScorer, MaskScorer, Scorer, Tested, images
from sslmed.supervised.starting import Begun, begin
from sslmed.supervised.task import DRAWN, Task, task_of
from sslmed.supervised.weak_scoring import WeakScorer
from sslmed.training.averaging import WeightAverage
from sslmed.training.early_stopping import EarlyStopping
from sslmed.training.fit import fit, seed_everything
from sslmed.training.monitors import MonitorConfig
from sslmed.training.signals import SignalWatch
from sslmed.training.starts import Start
from sslmed.training.trainer import TrainConfig, device, lightning_precision

SCORERS: dict[str, Callable[[Task, Applied], Scorer]] = {
    "class": LabelScorer,
    "findings": LabelScorer,
    "mask": MaskScorer,
    "boxes": BoxScorer,
}
FAMILIAR = 1000  # train images whose features are described, and at most half as many of val


@dataclass(frozen=True)
class Job:
    """A fine-tuning that could begin: everything has been checked, nothing written.

    ``lines`` say what the head starts from, where that is worth saying.
    """

    settings: FinetuneRecipe
    begun: Begun
    task: Task
    head: Head
    scorer: Scorer
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tuned:
    """A finished fine-tuning.

    Attributes:
        best_step: the step of the best check on val.
        tested: the scores.
        seen: how many test patients the start had seen; None when that cannot be told.
    """

    best_step: int
    tested: Tested
    seen: int | None


def prepare(recipe: FinetuneRecipe, store: Store, source: str | Path) -> Job:
    """Everything that a fine-tuning needs, checked.

    Raises:
        UsageError, MissingInputError, DataError: see `starting.begin` and `task.task_of`.
    """
    begun = begin(recipe, store, source)
    settings = begun.settings
    task = task_of(settings, store, begun.backbone.in_chans)
    if settings.data.augment_on == "device" and task.target.kind in DRAWN:
        raise UsageError(
            "data.augment_on is device, but masks and boxes move with their images on the cpu alone; remove it"
        )
    settings = settings.model_copy(update={"train": _at_most(settings.train, len(task.train))})
    settings.train.check(len(task.train))
    seed_everything(settings.train.seed)
    kind = HEADS[settings.head.name]  # type: ignore[attr-defined]
    head = kind(settings.head, begun.start.backbone, len(task.target.classes), task.target.kind)
    head.named(task.target.classes)
    lines = head.start_from(_decoder(begun.start))
    if task.tiles and task.target.kind == "boxes":
        _refuse_small_tiles(head, settings.data.size)
    if head.config.weighted:
        head.balance(_counts(task))
    head.prepare(settings.optim, settings.train.batch_size, settings.train.total_steps(len(task.train)), 0)
    applied = Applied(head, task.policy, settings.data.size, task.channels, task.tiles, task.shrunk_to)
    return Job(settings, begun, task, head, _scorer(task, applied), lines)


def _decoder(start: Start) -> dict[str, torch.Tensor] | None:
    if start.folder is None or start.card is None or start.card.decoder is None:
        return None
    return artifact.read_decoder(start.folder)


def _refuse_small_tiles(head: Any, size: ImageSize) -> None:
    least = 2 * head.stride
    if min(sides(size)) < least:
        raise UsageError(
            f"data.size is {in_words(size)}, but tiles for boxes need at least {least} pixels a side, two strides of "
            f"{in_timm(head.backbone.network)}; give a larger one, or head.input=whole"
        )


def _scorer(task: Task, applied: Applied) -> Scorer:
    return WeakScorer(task, applied) if applied.head.locates else SCORERS[task.target.kind](task, applied)


def open_run(job: Job, out: str | Path, resume: bool) -> Run:
    """A new run folder, or the one that is gone on with.

    Raises:
        OutputExistsError: it is there and ``resume`` is not set.
        UsageError: a resume that would change anything.
    """
    facts = {
        "seed": job.settings.train.seed,
        "data_fingerprint": job.task.store.fingerprint,
        "start_weights": job.begun.start.weights,
        "precision": lightning_precision(job.settings.train),
        "device": device(job.settings.train),
        "processes": world_size(),
    }
    agree({"recipe": dump(job.settings), "out": str(out), "resume": resume, **facts})
    if not resume:
        return Run.start(out, "finetune", dump(job.settings), facts)
    run = Run.resume(out, "finetune")
    with together():
        run.refuse_changes(changes(load_finetune(run.recipe), job.settings), facts)
    return run


def carry_out(job: Job, run: Run) -> Tuned:
    """Train to the end or to the early stop, calibrate on val, score test once, write the artifact.

    Raises:
        TrainingAborted: non-finite loss.
        Interrupted: a signal; the checkpoint is saved.
    """
    return score(job, run, train(job, run))


def train(job: Job, run: Run) -> int:
    """Train to the end or to the early stop; the step of the best check, whose weights the head then has.

    Raises:
        TrainingAborted: non-finite loss.
        Interrupted: a signal; the checkpoint is saved.
    """
    for line in (*job.begun.start.lines, *job.lines, *job.task.skipped):
        run.say(line)
    return _fit(job, run)


def score(job: Job, run: Run, best_step: int) -> Tuned:
    """Calibrate on val, score test once, write the artifact; of several processes, one does it."""
    job.head.to(device(job.settings.train))  # Lightning has brought it back to the CPU
    job.scorer.settle()
    familiar = _spread(job.task.store.rows("train"), FAMILIAR)  # labelled or not
    known = _known(job, familiar)
    tuned = Tuned(best_step, job.scorer.test(run.path), _seen(job))
    _write(job, run, tuned, familiar, known)
    return tuned


# The steps, in their order.


def _fit(job: Job, run: Run) -> int:
    """The step of the best check, whose weights the head then has."""
    settings, head = job.settings, job.head
    average, signals, name = WeightAverage(head.config.ema), SignalWatch(), head.metrics()[0]
    begin = head.config.probe_steps
    stop = EarlyStopping(settings.stop, run, name, job.scorer.val, average, begin=begin, signals=signals)
    fit(
        head,
        _dataset(job),
        job.task.train,
        settings.train,
        settings.optim,
        run,
        monitor=MonitorConfig(knn_every=0, collapse="off"),
        workers=settings.data.workers,
        recipe=settings.model_dump(mode="json"),
        callbacks=[average, stop],
        strata=_strata(job.task) if head.config.drawn_evenly else None,
        signals=signals,
    )
    return stop.best_step


def _dataset(job: Job) -> ViewDataset | RawDataset:
    task, size, seed = job.task, job.settings.data.size, job.settings.train.seed
    common = (task.store, task.policy, (task.policy.view,), size, task.channels, seed, task.target)
    if job.settings.data.augment_on == "device":
        return RawDataset(*common, slices=job.settings.data.slices)
    return ViewDataset(*common, slices=job.settings.data.slices, tile=task.tiles)


def _seen(job: Job) -> int | None:
    """Of test patients; a foreign file says nothing of whom it has seen."""
    begun = job.begun.start
    if begun.folder is not None:
        return artifact.patients_seen(begun.folder, job.task.store, job.task.test)
    return None if begun.kind == "file" else 0


def _write(job: Job, run: Run, tuned: Tuned, familiar: Rows, known: familiarity.Familiarity | None) -> None:
    settings, task, head, begun = job.settings, job.task, job.head, job.begun.start
    read = artifact.fingerprint(task.store, np.unique(np.concatenate([task.train, task.val, familiar])))
    data, read = begun.described(artifact.describe(task.store, task.train), read)
    name, tested = settings.head.name, tuned.tested  # type: ignore[attr-defined]
    card = artifact.Card(
        backbone=job.begun.backbone,
        num_features=head.backbone.num_features,
        size=settings.data.size,
        modality=task.policy.name,
        channels=int(task.store.index.channels.max()),
        windows=settings.data.windows,
        slices=settings.data.slices,
        normalisation=modality.in_words(task.policy),
        method=settings.head.model_dump(mode="json"),
        recipe=settings.model_dump(mode="json"),
        data=data,
        steps=tuned.best_step,
        head=_head_card(job),
        parent=begun.parent,
        parent_licence=begun.licence,
        stated=settings.card,
        measured=measured.of_model(task, tested, str(settings.labels.budget), name, tuned.seen),
    )
    usual = known.tensors() if known else None

    def answers(images: torch.Tensor) -> torch.Tensor:
        return self_test.answers(head, images)

    artifact.write(run.artifact, head.backbone.network, card, read, head.head, usual, answers)


def _head_card(job: Job) -> artifact.HeadCard:
    target, settled = job.task.target, job.scorer.settled
    return artifact.HeadCard(
        name=job.settings.head.name,  # type: ignore[attr-defined]
        target=target.name,
        kind=target.kind,
        classes=target.classes,
        config=job.settings.head.model_dump(mode="json"),
        temperature=job.head.temperature,
        offset=job.head.offset,
        thresholds=settled.thresholds,
        calibration=settled.about,
        values=job.task.store.annotations.mask_values if target.kind == "mask" else (),
        shrunk_to=job.task.shrunk_to if job.task.tiles else None,
        mirrors=_mirrors(job.task.policy),
        weak=job.head.locates,
    )


def _known(job: Job, familiar: Rows) -> familiarity.Familiarity | None:
    """What usual images look like; None where the network's maps cannot be had, or one picture is all there is."""
    if len(familiar) < 2:
        return None
    try:
        train = _appearances(job, familiar)
    except UsageError:
        return None
    if (np.ptp(train, axis=0) == 0).all():  # one picture over and over says nothing of what is usual
        return None
    return familiarity.measure(train, _appearances(job, _spread(job.task.val, FAMILIAR // 2)))


def _appearances(job: Job, rows: Rows) -> Any:
    """What images look like to the model, (N, D)."""
    return np.stack([*job.scorer.applied.appearances(images(job.task, rows))])


def _spread(rows: Rows, most: int) -> Rows:
    return rows[:: -(-len(rows) // most)]


def _mirrors(policy: Modality) -> tuple[str, ...]:
    return tuple(name for name in ("hflip", "vflip", "rot90") if getattr(policy.view, name))


def _at_most(train: TrainConfig, images: int) -> TrainConfig:
    """Smaller steps where there are fewer images than a step takes; each of their parts still has two.

    Raises:
        DataError: there is one image.
    """
    if images < 2:
        raise DataError("one labelled train image is not enough: BatchNorm needs two; give a larger labels.budget")
    if images < 2 * world_size():
        raise DataError(
            f"{images} labelled train images for {world_size()} processes; allowed: at least {2 * world_size()}. "
            "Start fewer processes, or give a larger labels.budget"
        )
    if images >= train.batch_size:
        return train
    parts = max(count for count in range(1, train.accumulate + 1) if count == 1 or images // count // world_size() >= 2)
    whole = images - images % (parts * world_size())
    return train.model_copy(update={"batch_size": whole, "accumulate": parts})


def _counts(task: Task) -> torch.Tensor:
    """How often train images show each class; see `Head.balance`."""
    target = task.target
    if target.kind == "mask":
        pixels = np.zeros(256, np.int64)
        for row in task.train.tolist():
            pixels += np.bincount(target.of(row, task.store).ravel(), minlength=256)
        return torch.from_numpy(pixels[: len(target.classes)])
    values = np.asarray(target.values)[task.train]
    if target.kind == "class":
        return torch.from_numpy(np.bincount(values, minlength=len(target.classes)))
    return torch.from_numpy(np.stack([(values == 0).sum(axis=0), (values == 1).sum(axis=0)], axis=1))


def _strata(task: Task) -> Rows:
    """(train rows,): the class of each, or the rarest of its findings; those without any are a stratum too."""
    presence = task.target.presence()[task.train]
    common = np.where(presence, presence.sum(axis=0), len(presence) + 1)
    return np.asarray(np.where(presence.any(axis=1), common.argmin(axis=1), presence.shape[1]), np.int64)
