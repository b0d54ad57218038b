"""``sslmed finetune``: a backbone and a few labels in, a model and its honest score out."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from sslmed import artifact
from sslmed.config import DataError, UsageError
from sslmed.console import command
from sslmed.data import modality
from sslmed.data.input import check_channels, open_store
from sslmed.data.loading import DataConfig, Rows, ViewDataset, plain_loader, steps_per_epoch
from sslmed.data.modality import Modality
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.evaluation import metrics, predictions, probes, protocol
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.recipe import FinetuneRecipe, changes, dump, load_finetune
from sslmed.run import Run
from sslmed.training.early_stopping import EarlyStopping
from sslmed.training.fit import fit, seed_everything
from sslmed.training.monitors import Monitor, MonitorConfig
from sslmed.training.trainer import TrainConfig, device, lightning_precision

REPLICATES = 1000


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tuning.

    Attributes:
        val_patients: labelled patients that decided when to stop; the budget does not count them.
        seen: how many test patients the start had seen; None when that cannot be told.
        test: (value, low, high) of each metric, 95 % by bootstrap of test patients.
    """

    run: str
    artifact: str
    start: str
    target: str
    classes: tuple[str, ...]
    train_images: int
    train_patients: int
    val_patients: int
    test_images: int
    test_patients: int
    seen: int | None
    best_step: int
    test: dict[str, tuple[float, float, float]]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"  {name} {value:.3f} [{low:.3f}, {high:.3f}]" for name, (value, low, high) in self.test.items()]
        return [
            f"fine-tuned from {self.start} on {self.train_images} images of {self.train_patients} patients, "
            f"stopped on {self.val_patients} val patients at step {self.best_step}",
            f"'{self.target}' on {self.test_images} test images of {self.test_patients} patients, with 95 % intervals; "
            + self._seen(),
            *shown,
            f"model: {self.artifact}",
        ]

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
        test = {name: tuple(math.nan if each is None else each for each in kept["test"][name]) for name in kept["test"]}
        return cls(**(kept | {"classes": tuple(kept["classes"]), "test": test}))


@dataclass(frozen=True)
class _Task:
    """What is learnt from which rows, and how images become input."""

    store: Store
    policy: Modality
    name: str
    target: Rows
    train: Rows
    val: Rows
    test: Rows
    data: DataConfig
    channels: int

    def scores(self, head: Head, rows: Rows) -> probes.Floats:
        data, channels = self.data, self.channels
        loader = plain_loader(self.store, rows, data.size, self.policy, channels=channels, slices=data.slices)
        return probes.embed(head, loader).astype(np.float64)


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

    Val patients decide when to stop; test patients are read once, for the score that is returned.

    Args:
        recipe: a shipped name, such as ``xray/classification``, or a file.
        data: the store.
        out: the run folder.
        start: a run or artifact, or ``random``.
        overrides: ``section.key=value`` settings on top of the recipe.
        resume: go on with an interrupted run; everything else must be as it was.

    Raises:
        UsageError: a wrong recipe, a backbone in it that is not the artifact's, or a resume that would change anything.
        DataError: the artifact does not fit the store, or there are too few labels.
        OutputExistsError: ``out`` is there and ``resume`` is not set.
        Interrupted: a signal; the checkpoint is saved.
    """
    settings = load_finetune(recipe, overrides)
    store = open_store(data)
    backbone, config, settings = _backbone(settings, start, store)
    task = _task(settings, store, config.in_chans)
    settings = settings.model_copy(update={"train": _at_most(settings.train, len(task.train))})
    seed_everything(settings.train.seed)
    head = HEADS[settings.head.name](settings.head, backbone, len(store.classes(task.name)))  # type: ignore[attr-defined]
    score = _val_score(head, task)
    run = _open(settings, store, start, out, resume)
    if run.done:
        run.close()
        return FinetuneResult.from_dict(run.result)
    with run:
        best_step = _fit(head, task, settings, run, score)
        test = _test(head.to(device(settings.train)), task, run)  # Lightning has brought it back to the CPU
        _write(run, settings, head, task, config, start, best_step)
        result = _result(run, task, start, best_step, test)
        run.finish(result.as_dict())
    return result


# The steps, in their order.


def _fit(head: Head, task: _Task, settings: FinetuneRecipe, run: Run, score: Callable[[], float]) -> int:
    """Train to the end or to the early stop; the step of the best check, whose weights ``head`` then has."""
    train, seed = settings.train, settings.train.seed
    views, data = (task.policy.view,), task.data
    dataset = ViewDataset(task.store, task.policy, views, data.size, task.channels, seed, task.name, slices=data.slices)
    steps = steps_per_epoch(len(task.train), train.batch_size)
    monitor = Monitor(MonitorConfig(knn_every=0, collapse="off"), run, train.batch_size, steps)
    stop = EarlyStopping(settings.stop, run, head.metrics()[0], score)
    workers = settings.data.worker_count()
    fit(head, dataset, task.train, train, settings.optim, run, monitor, workers=workers, callbacks=[stop])
    return stop.best_step


def _result(
    run: Run, task: _Task, start: str | Path, best_step: int, test: dict[str, tuple[float, float, float]]
) -> FinetuneResult:
    return FinetuneResult(
        run=str(run.path),
        artifact=str(run.artifact),
        start=str(start),
        target=task.name,
        classes=task.store.classes(task.name),
        train_images=len(task.train),
        train_patients=_patients(task, task.train),
        val_patients=_patients(task, task.val),
        test_images=len(task.test),
        test_patients=_patients(task, task.test),
        seen=0 if str(start) == "random" else artifact.patients_seen(start, task.store, task.test),
        best_step=best_step,
        test=test,
        next=command("sslmed", "predict", run.path, "SOURCE", "--out", "DIR"),
    )


def _backbone(
    settings: FinetuneRecipe, start: str | Path, store: Store
) -> tuple[Backbone, BackboneConfig, FinetuneRecipe]:
    """What is trained, and the recipe with what a card decides filled in: what runs is what is recorded."""
    if settings.backbone is not None and settings.backbone.init != "random":
        raise UsageError(
            f"backbone.init is {settings.backbone.init}, but fine-tuning starts from what --from names; remove "
            "backbone.init, or continue pretraining with it first"
        )
    if str(start) == "random":
        if settings.backbone is None:
            raise UsageError("--from random needs a backbone in the recipe; add backbone.name=resnet18")
        return build(settings.backbone, settings.data.size, settings.train.seed), settings.backbone, settings
    card = artifact.read_card(start)
    if settings.backbone is not None and settings.backbone.name != card.backbone.name:
        raise UsageError(
            f"the recipe names backbone {settings.backbone.name}, but {start} holds {card.backbone.name}; "
            "remove backbone from the recipe, or use --from random"
        )
    artifact.check_fits(card, store.modality, int(store.index.channels.max()))
    artifact.policy(card)  # refuses one that normalises otherwise
    data = settings.data
    for key, given, held in (("windows", data.windows, card.windows), ("slices", data.slices, card.slices)):
        if key in data.model_fields_set and given != held:
            raise UsageError(
                f"data.{key} is {json.dumps(given)}, but {start} was trained with {json.dumps(held)}; remove data.{key}"
            )
    size = data.size if "size" in data.model_fields_set else card.size
    data = data.model_copy(update={"size": size, "windows": card.windows, "slices": card.slices})
    return Backbone(artifact.load_backbone(start)), card.backbone, settings.model_copy(update={"data": data})


def _task(settings: FinetuneRecipe, store: Store, channels: int) -> _Task:
    if settings.data.positives != "image":
        raise UsageError(
            f"data.positives is {settings.data.positives}, but fine-tuning compares no views; remove it from the recipe"
        )
    policy = modality.with_windows(modality.named(store.modality), settings.data.windows)
    policy = modality.with_views(policy, settings.views)
    check_channels(channels, store, policy, settings.data.slices)
    name = settings.data.target or store.default_target()
    if name is None:
        raise DataError(f"the store {store.path} has no labels; add some: sslmed label STORE --labels CSV")
    target = store.target(name)
    train, val, test = (rows[target[rows] >= 0] for rows in (store.rows(split) for split in ("train", "val", "test")))
    (budget,) = protocol.parse(settings.labels.budget)
    drawn, skipped = protocol.draws(store.patients(train), target[train], [budget], [settings.labels.seed])
    if skipped:
        raise DataError(f"labels.budget={settings.labels.budget}: {skipped[0].why}")
    if not len(test):
        raise DataError(f"no test patient of {store.path} has a label '{name}'; without them there is no honest score")
    return _Task(store, policy, name, target, train[drawn[0].rows], val, test, settings.data, channels)


def _at_most(train: TrainConfig, images: int) -> TrainConfig:
    """Smaller steps where there are fewer images than a step takes."""
    if images >= train.batch_size:
        return train
    whole = images - images % train.accumulate
    smaller = {"batch_size": whole} if whole else {"batch_size": images, "accumulate": 1}
    return train.model_copy(update=smaller)


def _val_score(head: Head, task: _Task) -> Callable[[], float]:
    measure = metrics.METRICS[head.metrics()[0]]
    if len(np.unique(task.target[task.val])) < 2:
        raise DataError(
            f"the val patients of {task.store.path} show fewer than two classes of '{task.name}'; "
            "early stopping needs both, so give a --split file or more labelled patients"
        )
    return lambda: float(measure(task.target[task.val], task.scores(head, task.val)))


def _test(head: Head, task: _Task, run: Run) -> dict[str, tuple[float, float, float]]:
    patients, target, scores = task.store.patients(task.test), task.target[task.test], task.scores(head, task.test)
    predictions.Predictions(task.test, patients, target, scores, task.store.classes(task.name)).write(run.path)
    weights = protocol.bootstrap_weights(patients, REPLICATES, seed=0)
    estimates = protocol.summarise({"model": [scores]}, target, weights)
    return {each.metric: (each.value.mean, each.value.low, each.value.high) for each in estimates}


def _open(settings: FinetuneRecipe, store: Store, start: str | Path, out: str | Path, resume: bool) -> Run:
    facts = {
        "seed": settings.train.seed,
        "data_fingerprint": store.fingerprint,
        "start_weights": "random" if str(start) == "random" else _weights_digest(start),
        "precision": lightning_precision(settings.train),
    }
    if not resume:
        return Run.start(out, "finetune", dump(settings), facts)
    run = Run.resume(out, "finetune")
    run.refuse_changes(changes(load_finetune(run.recipe), settings), facts)
    return run


def _weights_digest(start: str | Path) -> str:
    return sha256(artifact.resolve(start) / "model.safetensors")


def _write(
    run: Run, settings: FinetuneRecipe, head: Head, task: _Task, backbone: BackboneConfig, start: str | Path, steps: int
) -> None:
    data = artifact.describe(task.store, task.train)
    seen = artifact.fingerprint(task.store, np.concatenate([task.train, task.val]))
    parent = None
    if str(start) != "random":
        parent = _weights_digest(start)
        data, seen = artifact.inherit(data, seen, start)
    card = artifact.Card(
        backbone=backbone,
        num_features=head.backbone.num_features,
        size=task.data.size,
        modality=task.policy.name,
        windows=task.data.windows,
        slices=task.data.slices,
        normalisation=modality.in_words(task.policy),
        method=settings.head.model_dump(mode="json"),
        recipe=settings.model_dump(mode="json"),
        data=data,
        steps=steps,
        head=artifact.HeadCard(
            name=settings.head.name,  # type: ignore[attr-defined]
            target=task.name,
            classes=task.store.classes(task.name),
            config=settings.head.model_dump(mode="json"),
        ),
        parent=parent,
    )
    artifact.write(run.artifact, head.backbone.network, card, seen, head.head)


def _patients(task: _Task, rows: Rows) -> int:
    return len(np.unique(task.store.patients(rows)))
