"""``sslmed pretrain``: unlabelled images in, a backbone out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sslmed import artifact
from sslmed.config import DataError, UsageError
from sslmed.console import command
from sslmed.data import modality
from sslmed.data.input import check_channels, open_store
from sslmed.data.loading import ViewDataset, plain_loader
from sslmed.data.modality import Modality
from sslmed.data.positives import Positives
from sslmed.data.raw_batches import RawDataset
from sslmed.data.sampling import Rows, steps_per_epoch
from sslmed.data.store import Store
from sslmed.data.targets import one_label
from sslmed.distributed import agree, first, together, world_size
from sslmed.evaluation import metrics, probes
from sslmed.image_size import sides
from sslmed.methods import METHODS
from sslmed.methods.method import Course, Method
from sslmed.recipe import PretrainRecipe, changes, dump, load_pretrain
from sslmed.run import Run, read, read_metrics
from sslmed.training.fit import Fitted, fit, seed_everything
from sslmed.training.launch import goes_on, joined, launch
from sslmed.training.pictures import Pictures
from sslmed.training.starts import Kind, Start, start, worded
from sslmed.training.trainer import device, lightning_precision, processes

PROBE_IMAGES = 1000  # at most, of train and of val: the probe while training is a thermometer, not a result
BYTES_A_PARAMETER = 4 * (1 + 2)  # of a checkpoint: the weight and two moments


@dataclass(frozen=True)
class PretrainResult:
    """A finished pretraining. ``metrics`` are the last ones logged."""

    run: str
    artifact: str
    steps: int
    seconds: float
    metrics: dict[str, float]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return [f"pretrained {self.steps} steps in {self.seconds:.0f} s: {shown}", f"backbone: {self.artifact}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class PretrainPlan:
    """What a pretraining would do.

    ``start`` says what became of the weights that it starts from, ``notes`` what else it would say at its beginning.
    """

    parameters: int
    backbone_parameters: int
    images: int
    patients: int
    steps: int
    steps_per_epoch: int
    disk_bytes: int
    start: tuple[str, ...]
    notes: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.images} images of {self.patients} patients (train and unlabelled)",
            f"{self.parameters:,} parameters, {self.backbone_parameters:,} of them in the backbone",
            f"{self.steps} optimizer steps, {self.steps_per_epoch} an epoch",
            f"about {self.disk_bytes / 1e6:.0f} MB on disk",
            *self.start,
            *self.notes,
        ]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def pretrain(
    recipe: str | Path, data: str | Path, out: str | Path, *, overrides: Sequence[str] = (), resume: bool = False
) -> PretrainResult:
    """Pretrain a backbone on the train and unlabelled patients of a store.

    Args:
        recipe: a shipped name, such as ``xray/simclr_resnet18``, or a file.
        data: the store.
        out: the run folder.
        overrides: ``section.key=value`` settings on top of the recipe.
        resume: go on with an interrupted run; everything else must be as it was.

    Raises:
        UsageError: a wrong recipe, or a resume that would change recipe, data or start weights.
        MissingInputError: there is no store, or there are no weights where ``backbone.init`` points.
        DataError: weights that are damaged, do not fill the network, or have learnt from labels.
        OutputExistsError: ``out`` is there and ``resume`` is not set.
        TrainingAborted: non-finite loss or collapsed embeddings.
        Interrupted: a signal; the checkpoint is saved.
    """
    settings = load_pretrain(recipe, overrides)
    count = processes(settings.train)
    if count > 1:
        words = ["pretrain", str(recipe), *overrides, "--data", str(data), "--out", str(out)]
        launch([*words, "--resume"] if resume else words, count)
        return PretrainResult(**read(Path(out))["result"])
    with joined(device(settings.train) == "cuda", settings.train.timeout):
        return _pretrain(settings, data, out, resume)


def _pretrain(settings: PretrainRecipe, data: str | Path, out: str | Path, resume: bool) -> PretrainResult:
    with together():
        store = open_store(data)
        rows = _training_rows(store)
        settings.train.check(len(rows))
        method, dataset, begun, notes = _assemble(settings, store)
    probe = _probe(method.exported, settings, store)
    run = _open(settings, store, begun, out, goes_on(out) or resume)
    if run.done:
        run.close()
        return PretrainResult(**run.result)
    with run:
        run.say(f"pretraining {settings.backbone.name} with {settings.method.name} on {len(rows)} images")  # type: ignore[attr-defined]
        for line in () if resume else (*begun.lines, *notes):
            run.say(line)
        epoch_steps = steps_per_epoch(len(rows), settings.train.batch_size)
        fitted = fit(
            method,
            dataset,
            rows,
            settings.train,
            settings.optim,
            run,
            monitor=settings.monitor,
            workers=settings.data.workers,
            recipe=settings.model_dump(mode="json"),
            probe=probe,
            callbacks=[Pictures(run, settings.monitor.pictures_every * epoch_steps)],
        )
        return PretrainResult(**first(lambda: _conclude(settings, store, begun, method, fitted, run, rows)))


def _conclude(
    settings: PretrainRecipe, store: Store, begun: Start, method: Method, fitted: Fitted, run: Run, rows: Rows
) -> dict[str, Any]:
    """Write the artifact, and what the run returns."""
    data_card, seen = begun.described(artifact.describe(store, rows), artifact.fingerprint(store, rows))
    card = _card(settings, store, data_card, begun, method, fitted.steps, _last(run.path))
    artifact.write(run.artifact, method.exported, card, seen, decoder=method.exported_decoder)
    result = PretrainResult(
        str(run.path),
        str(run.artifact),
        fitted.steps,
        fitted.seconds,
        card.monitors,
        _next(run.path, store),
    )
    run.finish(result.as_dict())
    return result.as_dict()


def _next(run: Path, store: Store) -> str:
    if store.default_target() is None and store.mask_classes:
        recipe = f"{store.modality}/segmentation"
        return command("sslmed", "finetune", recipe, "--data", store.path, "--from", run, "--out", "finetuned")
    if store.default_target() is None:  # nothing to evaluate with
        return command("sslmed", "verify", run)
    return command("sslmed", "evaluate", run, "--data", store.path)


def plan(recipe: str | Path, data: str | Path, *, overrides: Sequence[str] = ()) -> PretrainPlan:
    """What ``pretrain`` would do, from the recipe and the store's index alone."""
    settings = load_pretrain(recipe, overrides)
    store = open_store(data)
    rows = _training_rows(store)
    method, _, begun, notes = _assemble(settings, store)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    return PretrainPlan(
        parameters,
        sum(parameter.numel() for parameter in method.exported.parameters()),
        len(rows),
        len(set(store.patients(rows))),
        settings.train.total_steps(len(rows)),
        steps_per_epoch(len(rows), settings.train.batch_size),
        # those kept, the one that is being written, and the artifact
        parameters * (BYTES_A_PARAMETER * (settings.train.keep_checkpoints + 1) + 4),
        begun.lines,
        notes,
        command("sslmed", "pretrain", recipe, "--data", data, "--out", "RUN", *overrides),
    )


def _training_rows(store: Store) -> Rows:
    rows = store.rows("train", "unlabelled")
    if not len(rows):
        raise DataError(f"the store {store.path} has no train or unlabelled patients to pretrain on")
    return rows


def _assemble(
    settings: PretrainRecipe, store: Store
) -> tuple[Method, ViewDataset | RawDataset, Start, tuple[str, ...]]:
    """Method, data and start weights, and what the user should know of method and data."""
    policy = modality.with_views(_policy(settings, store), settings.views)
    seed_everything(settings.train.seed)
    begun = start(settings.backbone, settings.data.size, policy, settings.train.seed)
    if begun.card is not None and begun.card.head is not None:
        raise DataError(
            f"{settings.backbone.init} was fine-tuned with labels, so that no later probe would have few labels.\n"
            "Start from the pretrained artifact that it came from"
        )
    channels, slices = settings.backbone.in_chans, settings.data.slices
    check_channels(channels, store, policy, slices)
    method = METHODS[settings.method.name](settings.method, begun.backbone)  # type: ignore[attr-defined]
    course = _course(settings, store)
    method.check(course)
    positives = _positives(settings, method, store)
    notes = [positives.note()] if positives else []
    notes += method.notes(policy, course)
    views, size, seed = method.views(policy), settings.data.size, settings.train.seed
    kind = RawDataset if settings.data.augment_on == "device" else ViewDataset
    dataset = kind(store, policy, views, size, channels, seed, None, positives, slices)
    return method, dataset, begun, tuple(notes)


def _course(settings: PretrainRecipe, store: Store) -> Course:
    train, images = settings.train, len(_training_rows(store))
    return Course(
        train.batch_size,
        (settings.backbone.in_chans, *sides(settings.data.size)),
        train.total_steps(images),
        steps_per_epoch(images, train.batch_size),
        train.accumulate,
        max(processes(train), world_size()),
    )


def _policy(settings: PretrainRecipe, store: Store) -> Modality:
    return modality.with_windows(modality.named(store.modality), settings.data.windows)


def _positives(settings: PretrainRecipe, method: Method, store: Store) -> Positives | None:
    kind = settings.data.positives
    if kind == "image":
        return None
    if not method.compares_views:
        comparing = ", ".join(name for name, each in METHODS.items() if each.compares_views)
        raise UsageError(
            f"data.positives is {kind}, but {settings.method.name} sees one image at a time; "  # type: ignore[attr-defined]
            f"it is for {comparing}. Use data.positives=image"
        )
    return Positives(kind, store, _training_rows(store), settings.data.neighbour_mm)


def _open(settings: PretrainRecipe, store: Store, begun: Start, out: str | Path, resume: bool) -> Run:
    facts = {
        "seed": settings.train.seed,
        "data_fingerprint": store.fingerprint,
        "start_weights": begun.weights,
        "precision": lightning_precision(settings.train),
        "device": device(settings.train),
        "processes": world_size(),
    }
    agree({"recipe": dump(settings), "out": str(out), "resume": resume, **facts})
    if not resume:
        return Run.start(out, "pretrain", dump(settings), facts)
    run = Run.resume(out, "pretrain")
    before = load_pretrain(run.recipe)
    with together():
        run.refuse_changes(changes(_without_path(before), _without_path(settings)), facts)
    return run


def _without_path(settings: PretrainRecipe) -> PretrainRecipe:
    """Weights may have moved: whether they are the same their digest tells."""
    if settings.backbone.init in ("random", "imagenet"):
        return settings
    return _worded(settings, "file")


def _worded(settings: PretrainRecipe, kind: Kind) -> PretrainRecipe:
    return settings.model_copy(update={"backbone": worded(settings.backbone, kind)})


def _probe(network: nn.Module, settings: PretrainRecipe, store: Store) -> Callable[[], dict[str, float]] | None:
    """A nearest-neighbour score on val patients, or nothing when there are no labels."""
    name = one_label(store, settings.data.target, "the probe of pretraining")
    if name is None or not settings.monitor.knn_every:
        return None
    target, policy = store.target(name), _policy(settings, store)
    bank, queries = (_spread(rows[target[rows] >= 0]) for rows in (store.rows("train"), store.rows("val")))
    classes = len(store.classes(name))
    if not len(bank) or len(set(target[queries])) < 2:
        return None

    def score() -> dict[str, float]:
        size, channels, slices = settings.data.size, settings.backbone.in_chans, settings.data.slices
        loaders = (
            plain_loader(store, rows, size, policy, channels=channels, slices=slices) for rows in (bank, queries)
        )
        features = [probes.embed(network, loader) for loader in loaders]
        scores = probes.knn_scores(features[0], target[bank], features[1], classes)
        return {"knn_val_auroc": float(metrics.auroc(target[queries], scores))}

    return score


def _spread(rows: Rows) -> Rows:
    return rows[:: -(-len(rows) // PROBE_IMAGES)] if len(rows) else rows


def _card(
    settings: PretrainRecipe,
    store: Store,
    data: artifact.DataCard,
    begun: Start,
    method: Method,
    steps: int,
    monitors: dict[str, float],
) -> artifact.Card:
    policy, settings = _policy(settings, store), _worded(settings, begun.kind)
    return artifact.Card(
        backbone=settings.backbone,
        num_features=method.backbone.num_features,
        size=settings.data.size,
        modality=policy.name,
        channels=int(store.index.channels.max()),
        windows=settings.data.windows,
        slices=settings.data.slices,
        normalisation=modality.in_words(policy),
        method=settings.method.model_dump(mode="json"),
        recipe=settings.model_dump(mode="json"),
        data=data,
        steps=steps,
        decoder=None if method.exported_decoder is None else "unet",
        parent=begun.parent,
        parent_licence=begun.licence,
        stated=settings.card,
        monitors=monitors,
    )


def _last(run: Path) -> dict[str, float]:
    wanted = ("loss", "embedding_std", "rankme", "knn_val_auroc")
    last: dict[str, float] = {}
    for line in read_metrics(run):
        last |= {name: float(line[name]) for name in wanted if name in line}
    return {name: value for name, value in last.items() if math.isfinite(value)}
