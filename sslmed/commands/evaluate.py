"""``sslmed evaluate``: what a pretrained backbone is worth with few labels, beside random weights and other starts."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sslmed import artifact, image_size
from sslmed.artifact import Card
from sslmed.config import DataError, OutputExistsError, UsageError
from sslmed.data import targets
from sslmed.data.input import open_store
from sslmed.data.loading import plain_loader
from sslmed.data.store import Store
from sslmed.data.targets import Target
from sslmed.evaluation import comparison, probes, protocol
from sslmed.evaluation.comparison import Features, Row
from sslmed.evaluation.protocol import Skipped, bootstrap_weights, draws, parse
from sslmed.recipe import FinetuneRecipe, load_finetune
from sslmed.shipped import shipped
from sslmed.supervised import study
from sslmed.supervised.arms import Arm, arms, refuse_labels
from sslmed.supervised.evaluated import EvaluateResult, usual_folder, write
from sslmed.supervised.starting import RANDOM
from sslmed.supervised.study import Cell
from sslmed.supervised.task import DRAWN, target_of

BOOTSTRAP_SEED = 0
SEEDS, FINETUNED_SEEDS = 5, 3

Rows = npt.NDArray[np.int64]


def evaluate(
    model: Path | str,
    data: Path | str,
    *,
    beside: Sequence[str | Path] = (),
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: str | None = None,
    budgets: str | None = None,
    seeds: int | None = None,
    replicates: int = 1000,
    size: image_size.ImageSize | None = None,
    out: Path | str | None = None,
    strict: bool = False,
    workers: int = 0,
    resume: bool = False,
) -> EvaluateResult:
    """Compare a pretrained backbone with the same network from random weights, and other starts, on the same labels.

    Frozen features are probed (kNN and a linear classifier); with ``recipe`` every start is fine-tuned by it instead,
    for the same steps, which also goes for masks. Both train on draws of train patients; the test patients are scored
    once by each; no test label picks anything. Writes ``evaluation.json`` and ``evaluation.md``.

    Args:
        model: A run or an artifact.
        data: A store with labels, or masks.
        beside: More starts: ``imagenet``, a weight file of the model's network, a run or an artifact.
        recipe: For fine-tuning: a shipped name, such as ``xray/classification``, or a file.
        overrides: ``section.key=value`` settings on top of the recipe.
        target: The label that probes learn; by default what `targets.labels` takes. A recipe has ``data.target``.
        budgets: Shares of the labelled train patients, or ``k=N`` patients of each class (of masks: in all), parted by
            commas. By default ``k`` for stores of under 200 labelled train patients, else shares.
        seeds: Label draws a budget, at least 1; by default 5, of fine-tunings 3.
        replicates: Patient bootstrap replicates, at least 100.
        size: Of the probes' input in pixels, the side of a square or height and width; the card's by default.
        out: Folder to write; by default ``evaluation`` in the run, or ``NAME-evaluation`` beside the artifact.
        strict: Refuse when a test patient was seen in pretraining, or when that cannot be told.
        workers: Processes that read images for probes.
        resume: Go on with fine-tunings that were interrupted; finished ones are taken as they are.

    Raises:
        UsageError: a budget, number, target or recipe that is not allowed.
        MissingInputError: no model or store there.
        DataError: damaged input, a store that does not fit the backbone, too few labels; leakage when ``strict``.
        OutputExistsError: ``out`` exists.
        DiskError: the result cannot be written.
    """
    settings = None if recipe is None else _settings(recipe, overrides, target, size, workers)
    if settings is None and (overrides or resume):
        raise UsageError("settings and --resume are for fine-tuning; give --recipe too, or leave them out")
    if seeds is None:
        seeds = SEEDS if settings is None else FINETUNED_SEEDS
    _check_numbers(seeds, replicates, size, workers)
    card, store = artifact.read_card(model), open_store(data)
    artifact.check_fits(card, store.modality, int(store.index.channels.max()))
    refuse_labels(card, model)
    starts = arms(model, card, beside)
    folder = _free_folder(artifact.resolve(model), out, resume)
    learnt = _labels(store, target) if settings is None else target_of(settings, store)
    train, test = (rows[learnt.known[rows]] for rows in (store.rows("train"), store.rows("test")))
    notes = _check_labels(store, learnt, train, test)
    known = {arm.name: _seen(arm, store, test) for arm in starts}
    if strict:
        _refuse_leakage(known)
    patients = len(np.unique(store.patients(train)))
    wanted = parse(budgets or protocol.default_budgets(patients, drawn=learnt.kind in DRAWN))
    shape = size or (card.size if settings is None else starts[0].recipe(settings).data.size)
    about = _protocol(card, store, shape, seeds, replicates) | {"weights": artifact.weights(model)}
    if settings is None:
        rows, skipped = _probed(starts, store, learnt, (train, test), wanted, seeds, replicates, shape, workers)
        about |= {"k": probes.K, "temperature": probes.TEMPERATURE, "C": probes.C}
    else:
        rows, skipped = _fine_tuned(starts, store, settings, wanted, seeds, replicates, folder)
        about |= {"recipe": settings.model_dump(mode="json")}
    result = EvaluateResult(
        model=str(model),
        data=str(data),
        out=str(folder),
        target=learnt.name,
        kind=learnt.kind,
        classes=learnt.classes,
        test_patients=len(np.unique(store.patients(test))),
        test_images=len(test),
        seen=known["pretrained"],
        seen_by=known,
        rows=tuple(rows),
        skipped=tuple(skipped),
        protocol=about,
        notes=tuple(notes),
        next=_next(card, learnt, model, data),
    )
    write(folder, result)
    return result


# The two ways to compare.


def _probed(
    starts: Sequence[Arm],
    store: Store,
    learnt: Target,
    sides: tuple[Rows, Rows],
    wanted: Sequence[protocol.Budget],
    seeds: int,
    replicates: int,
    size: image_size.ImageSize,
    workers: int,
) -> tuple[list[Row], list[Skipped]]:
    """Probes on frozen features.

    Of random weights there is one network a draw: one alone would not do, as they differ (docs/label_efficiency.md, sd
    at 100 %), and no bootstrap knows of it.
    """
    train, test = sides
    labels = np.asarray(learnt.values)
    drawn, skipped = draws(store.patients(train), labels[train], wanted, range(seeds), classes=learnt.classes)
    if not drawn:
        raise _nothing_drawn(skipped)
    features: dict[str, list[Features]] = {}
    for arm in starts:
        for seed in range(seeds if arm.name == RANDOM else 1):
            label = f"features of {arm.name}{f' {seed + 1}/{seeds}' if arm.name == RANDOM else ''}, batch"
            features.setdefault(arm.name, []).append(_embed(arm, seed, store, sides, size, workers, label))
    weights = bootstrap_weights(store.patients(test), replicates, BOOTSTRAP_SEED)
    rows = comparison.compare(
        features, labels[train], labels[test], len(learnt.classes), drawn, weights, reference=RANDOM
    )
    return rows, skipped


def _fine_tuned(
    starts: Sequence[Arm],
    store: Store,
    settings: FinetuneRecipe,
    wanted: Sequence[protocol.Budget],
    seeds: int,
    replicates: int,
    folder: Path,
) -> tuple[list[Row], list[Skipped]]:
    budgets, skipped = study.drawable(starts[0].recipe(settings), store, wanted, seeds)
    if not budgets:
        raise _nothing_drawn(skipped)
    for arm in starts:  # a start that cannot work is refused before hours go into the others
        study.prepared(settings, store, Cell(arm, budgets[0].text, 0))
    rows: list[Row] = []
    for budget in budgets:
        runs = {
            arm.name: [study.fine_tune(settings, store, Cell(arm, budget.text, seed), folder) for seed in range(seeds)]
            for arm in starts
        }
        patients = artifact.read_card(runs[RANDOM][0]).data.patients
        rows += study.compared(runs, budget.text, patients, replicates)
    return rows, skipped


def _embed(
    arm: Arm, seed: int, store: Store, sides: tuple[Rows, Rows], size: image_size.ImageSize, workers: int, label: str
) -> Features:
    card = arm.card
    policy, channels = artifact.policy(card), card.backbone.in_chans
    try:
        network = arm.network(size, seed)
        network.to("cuda" if torch.cuda.is_available() else "cpu")
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout
        loaders = (
            plain_loader(store, rows, size, policy, channels=channels, slices=card.slices, workers=workers)
            for rows in sides
        )
        return Features(*(probes.embed(network, loader, label) for loader in loaders))
    except (AssertionError, RuntimeError) as error:  # a network of one input size
        if size == card.size:
            raise
        raise UsageError(
            f"{card.backbone.name} takes images of {image_size.in_words(card.size)} pixels; "
            f"--size {image_size.in_words(size)}: {error}"
        ) from error


# What is checked.


def _settings(
    recipe: str | Path, overrides: Sequence[str], target: str | None, size: image_size.ImageSize | None, workers: int
) -> FinetuneRecipe:
    for name, given in (("--target", target), ("--size", size), ("--workers", workers or None)):
        if given is not None:
            raise UsageError(f"{name} is for probes; a recipe has data.{name[2:]}={given}")
    return load_finetune(recipe, overrides)


def _labels(store: Store, target: str | None) -> Target:
    drawn = "masks" if store.mask_classes else "boxes" if store.box_classes else ""
    if drawn and not store.labels:
        task = "segmentation" if drawn == "masks" else "localization"
        raise DataError(
            f"the store {store.path} has {drawn} but no labels, and probes need labels; compare the starts by "
            f"fine-tuning: --recipe {store.modality}/{task}"
        )
    return targets.labels(store, target)


def _check_numbers(seeds: int, replicates: int, size: image_size.ImageSize | None, workers: int) -> None:
    least = {"seeds": (seeds, 1), "replicates": (replicates, 100), "workers": (workers, 0)}
    if size is not None:
        least["size"] = (min(image_size.sides(size)), 16)
    for name, (given, allowed) in least.items():
        if given < allowed:
            raise UsageError(f"--{name} is {given}; it must be at least {allowed}")


def _free_folder(found: Path, out: Path | str | None, resume: bool) -> Path:
    folder = usual_folder(found) if out is None else Path(out)
    if folder.exists() or folder.is_symlink():
        unfinished = folder.is_dir() and (folder / study.RUNS).is_dir()
        if not (resume and unfinished):
            hint = ", go on with it by --resume" if unfinished else ""
            raise OutputExistsError(f"the output {folder} exists already; remove it{hint}, or give another --out")
    return folder


def _check_labels(store: Store, learnt: Target, train: Rows, test: Rows) -> list[str]:
    """Refuse labels that no score can be made of; name the classes that a score leaves out."""
    presence, notes = learnt.presence(), []
    least = 2 if learnt.kind == "class" else 1
    for side, rows in (("train", train), ("test", test)):
        present = np.asarray(presence[rows].any(axis=0))
        if present.sum() < least:
            found = ", ".join(np.array(learnt.classes)[present]) or f"nothing of {learnt.name}"
            count = "two classes" if least == 2 else "something"
            raise DataError(
                f"the {side} patients have {found}; {store.path} needs at least {count} in train and in test"
            )
        if missing := [name for name, there in zip(learnt.classes, present, strict=True) if not there]:
            notes.append(f"note: no {side} patient is {', '.join(missing)}")
    return notes


def _seen(arm: Arm, store: Store, test: Rows) -> int | None:
    if arm.artifact:
        return artifact.patients_seen(arm.source, store, test)
    return None if Path(arm.source).is_file() else 0


def _refuse_leakage(known: dict[str, int | None]) -> None:
    for name, seen in known.items():
        if seen is None:
            raise DataError(
                f"cannot tell whether test patients were seen in pretraining ({name}): their keys were made at another "
                "site, or it started from a foreign weight file.\n"
                "Ingest both stores with one --key, or leave --strict out."
            )
        if seen:
            raise DataError(
                f"{seen} test patients were seen in pretraining ({name}), so that their scores would flatter it.\n"
                "Pretrain without them, evaluate other patients, or leave --strict out."
            )


def _nothing_drawn(skipped: Sequence[Skipped]) -> DataError:
    return DataError("no budget can be drawn\n" + "\n".join(f"{part.budget}: {part.why}" for part in skipped[:4]))


# What is told.


def _protocol(card: Card, store: Store, size: image_size.ImageSize, seeds: int, replicates: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "replicates": replicates,
        "interval": "95 % percentile over replicates of the test patients of the mean over draws; differences paired",
        "draws": "by patient, nested; of labels stratified by class; at 100 % all draw the same patients",
        "size": size,
        "random_starts": "one a draw, of the same seed",
        "backbone": card.backbone.model_dump(mode="json"),
        "pretrained_on": card.data.fingerprint,
        "store": store.fingerprint,
        "split_digest": store.split_digest,
    }


def _next(card: Card, learnt: Target, model: Path | str, data: Path | str) -> str:
    task = {"mask": "segmentation", "boxes": "localization"}.get(learnt.kind, "classification")
    fitting = [each.name for each in shipped() if each.name.startswith(f"{card.modality}/{task}")]
    recipe = fitting[0] if fitting else "RECIPE"
    return f"sslmed finetune {recipe} --data {shlex.quote(str(data))} --from {shlex.quote(str(model))} --out finetuned"
