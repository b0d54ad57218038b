"""``sslmed evaluate``: what frozen features are worth with few labels, beside the same network from random weights."""

import dataclasses
import math
import shlex
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sslmed import artifact, image_size
from sslmed.artifact import Card
from sslmed.config import DataError, DiskError, OutputExistsError, UsageError
from sslmed.data.input import open_store
from sslmed.data.loading import plain_loader
from sslmed.data.store import Store
from sslmed.durable import PARTIAL, write_json
from sslmed.evaluation import comparison, probes
from sslmed.evaluation.comparison import Features, Row
from sslmed.evaluation.protocol import Skipped, bootstrap_weights, draws, parse
from sslmed.models.backbones import build
from sslmed.shipped import shipped

RANDOM, PRETRAINED = "random", "pretrained"
# The metric of the printed verdict, named beforehand: of four, one would often look better by chance.
HEADLINE = "auroc"
BOOTSTRAP_SEED = 0

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EvaluateResult:
    """What ``evaluate`` found; the same as in ``evaluation.json``.

    Attributes:
        seen: How many of the ``test_patients`` pretraining has read; None when that cannot be told.
        skipped: Budgets that could not be drawn, with the reason.
        protocol: What someone needs to repeat the numbers.
        notes: What a reader must know before believing the numbers.
    """

    model: str
    data: str
    out: str
    target: str
    classes: tuple[str, ...]
    test_patients: int
    test_images: int
    seen: int | None
    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    protocol: dict[str, Any]
    notes: tuple[str, ...]
    next: str

    def as_dict(self) -> dict[str, Any]:
        """The result in JSON's types, nan as null."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def lines(self) -> list[str]:
        """The result for people: AUROC and the verdict of each budget and probe."""
        table = [["budget", "probe", PRETRAINED, RANDOM, "difference", "verdict"]]
        for row in self.rows:
            if row.metric == HEADLINE and row.arm == PRETRAINED:
                random = self.row(row.budget, row.probe, RANDOM, HEADLINE).value
                values = [comparison.text(row.value), comparison.text(random)]
                difference = comparison.text(row.difference, signed=True)
                table.append([row.budget, row.probe, *values, difference, row.verdict or ""])
        every_metric = f"every metric: {Path(self.out) / 'evaluation.md'}"
        return [*self.preamble(), "", *comparison.aligned(table), "", *self.conditions(), every_metric]

    def row(self, budget: str, probe: str, arm: str, metric: str) -> Row:
        """The row of that budget, probe, arm and metric."""
        wanted = (budget, probe, arm, metric)
        return next(row for row in self.rows if (row.budget, row.probe, row.arm, row.metric) == wanted)

    def preamble(self) -> list[str]:
        """What was measured, on whom, and what speaks against it."""
        average = f"positive: {self.classes[1]}" if len(self.classes) == 2 else "mean over classes, each against rest"
        known = f"{self.seen} of {self.test_patients} test patients were seen in pretraining"
        if self.seen is None:
            known = "cannot tell whether pretraining has seen them: other keys, or a start from a foreign file"
        return [
            f"AUROC with 95 % intervals of {self.target}: {', '.join(self.classes)} ({average})",
            f"{self.test_images} test images of {self.test_patients} patients; {known}",
            *self.notes,
        ]

    def conditions(self) -> list[str]:
        """What was left out, and what the numbers rest on."""
        about = self.protocol
        dropped = max(row.value.dropped for row in self.rows)
        return [
            *(f"skipped {part.budget}: {part.why}" for part in self.skipped),
            f"{about['seeds']} nested draws of train patients (at 100 % all draw the same); kNN k={about['k']} "
            f"T={about['temperature']}; logistic regression C={about['C']}",
            f"{about['replicates']} bootstrap replicates of test patients, {dropped} left out for lack of a class",
            "intervals cover the choice of test patients; that of labels and of random starts shows in the sd of draws",
        ]


def evaluate(
    model: Path | str,
    data: Path | str,
    *,
    target: str | None = None,
    budgets: str = "1%,10%,100%",
    seeds: int = 5,
    replicates: int = 1000,
    size: image_size.ImageSize | None = None,
    out: Path | str | None = None,
    strict: bool = False,
    workers: int = 0,
) -> EvaluateResult:
    """Probe a pretrained backbone and the same network from random weights on the same few labels, and compare them.

    Probes train on draws of train patients; the test patients are scored once; no test label picks anything. Writes
    ``evaluation.json`` and ``evaluation.md``.

    Args:
        model: A run or an artifact.
        data: A store with labels.
        target: The label column; the store's first by default.
        budgets: Shares of the labelled train patients, or ``k=N`` patients of each class, parted by commas.
        seeds: Label draws a budget, at least 1.
        replicates: Patient bootstrap replicates, at least 100.
        size: Of the network input in pixels, the side of a square or height and width; the card's by default.
        out: Folder to write; by default ``evaluation`` in the run, or ``NAME-evaluation`` beside the artifact.
        strict: Refuse when a test patient was seen in pretraining, or when that cannot be told.
        workers: Processes that read images.

    Raises:
        UsageError: a budget, number or target that is not allowed.
        MissingInputError: no model or store there.
        DataError: damaged input, a store that does not fit the backbone, too few labels; leakage when ``strict``.
        OutputExistsError: ``out`` exists.
        DiskError: the result cannot be written.
    """
    wanted = parse(budgets)
    _check_numbers(seeds, replicates, size, workers)
    card, store = artifact.read_card(model), open_store(data)
    _check_fits(card, store)
    folder = _free_folder(artifact.resolve(model), out)
    target = _target(store, target)
    labels, classes = store.target(target), store.classes(target)
    train, test = (rows[labels[rows] >= 0] for rows in (store.rows("train"), store.rows("test")))
    notes = _check_labels(classes, labels[train], labels[test])
    known = artifact.patients_seen(model, store, test)
    if strict:
        _refuse_leakage(known)
    drawn, skipped = draws(store.patients(train), labels[train], wanted, range(seeds))
    if not drawn:
        raise DataError("no budget can be drawn\n" + "\n".join(f"{part.budget}: {part.why}" for part in skipped[:4]))

    features = _embed_arms(model, card, store, (train, test), size or card.size, workers, seeds)
    weights = bootstrap_weights(store.patients(test), replicates, BOOTSTRAP_SEED)
    rows = comparison.compare(features, labels[train], labels[test], len(classes), drawn, weights, reference=RANDOM)
    result = EvaluateResult(
        model=str(model),
        data=str(data),
        out=str(folder),
        target=target,
        classes=classes,
        test_patients=len(np.unique(store.patients(test))),
        test_images=len(test),
        seen=known,
        rows=tuple(rows),
        skipped=tuple(skipped),
        protocol=_protocol(card, store, size or card.size, seeds, replicates),
        notes=tuple(notes),
        next=_next(card, model, data),
    )
    _write(folder, result)
    return result


def _check_numbers(seeds: int, replicates: int, size: image_size.ImageSize | None, workers: int) -> None:
    least = {"seeds": (seeds, 1), "replicates": (replicates, 100), "workers": (workers, 0)}
    if size is not None:
        least["size"] = (min(image_size.sides(size)), 16)
    for name, (given, allowed) in least.items():
        if given < allowed:
            raise UsageError(f"--{name} is {given}; it must be at least {allowed}")


def _check_fits(card: Card, store: Store) -> None:
    artifact.check_fits(card, store.modality, int(store.index.channels.max()))
    if card.head is not None:
        raise DataError(
            "this backbone was fine-tuned with labels, so that no probe of it has few labels.\n"
            "Evaluate the pretrained artifact that it started from; the fine-tuning run holds its own test score."
        )


def _free_folder(found: Path, out: Path | str | None) -> Path:
    if out is not None:
        folder = Path(out)
    elif (found.parent / "run.json").is_file():
        folder = found.parent / "evaluation"
    else:
        folder = found.with_name(f"{found.name}-evaluation")
    if folder.exists() or folder.is_symlink():
        raise OutputExistsError(f"the output {folder} exists already; remove it, or give another --out")
    return folder


def _target(store: Store, name: str | None) -> str:
    name = name or store.default_target()
    if name is None:
        raise DataError(
            f"the store {store.path} has no labels, and probes need some; add them: "
            f"sslmed label {shlex.quote(str(store.path))} --labels CSV"
        )
    return name


def _check_labels(classes: tuple[str, ...], train: Rows, test: Rows) -> list[str]:
    """Refuse labels that no score can be made of; name the classes that a score leaves out."""
    notes = []
    for side, labels in (("train", train), ("test", test)):
        present = np.unique(labels)
        if len(present) < 2:
            found = ", ".join(classes[label] for label in present) or "no label"
            raise DataError(f"the {side} patients have {found}; probes need at least two classes in train and in test")
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing:
            notes.append(f"note: no {side} patient is {', '.join(missing)}")
    return notes


def _refuse_leakage(known: int | None) -> None:
    if known is None:
        raise DataError(
            "cannot tell whether test patients were seen in pretraining: their keys were made at another site, or it "
            "started from a foreign weight file.\n"
            "Ingest both stores with one --key, or leave --strict out."
        )
    if known:
        raise DataError(
            f"{known} test patients were seen in pretraining, so that their scores would flatter it.\n"
            "Pretrain without them, evaluate other patients, or leave --strict out."
        )


def _embed_arms(
    model: Path | str,
    card: Card,
    store: Store,
    sides: tuple[Rows, Rows],
    size: image_size.ImageSize,
    workers: int,
    seeds: int,
) -> dict[str, list[Features]]:
    """Features of the train and test images by the pretrained start, and by as many random ones as there are draws.

    One random start would not do: they differ (docs/label_efficiency.md, sd at 100 %), and no bootstrap knows of it.
    """
    starts = [(PRETRAINED, artifact.load_backbone(model))]
    starts += [(RANDOM, build(card.backbone, size, seed).network) for seed in range(seeds)]
    features: dict[str, list[Features]] = {PRETRAINED: [], RANDOM: []}
    for number, (arm, network) in enumerate(starts, start=1):
        label = f"features of start {number}/{len(starts)} ({arm}), batch"
        try:
            features[arm].append(_embed(network, card, store, sides, size, workers, label))
        except (AssertionError, RuntimeError) as error:  # a network of one input size
            if size == card.size:
                raise
            raise UsageError(
                f"{card.backbone.name} takes images of {image_size.in_words(card.size)} pixels; "
                f"--size {image_size.in_words(size)}: {error}"
            ) from error
    return features


def _embed(
    network: torch.nn.Module,
    card: Card,
    store: Store,
    sides: tuple[Rows, Rows],
    size: image_size.ImageSize,
    workers: int,
    label: str,
) -> Features:
    policy, channels = artifact.policy(card), card.backbone.in_chans
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster layout for convolutions
    loaders = (
        plain_loader(store, rows, size, policy, channels=channels, slices=card.slices, workers=workers)
        for rows in sides
    )
    return Features(*(probes.embed(network, loader, label) for loader in loaders))


def _protocol(card: Card, store: Store, size: image_size.ImageSize, seeds: int, replicates: int) -> dict[str, Any]:
    return {
        "k": probes.K,
        "temperature": probes.TEMPERATURE,
        "C": probes.C,
        "seeds": seeds,
        "replicates": replicates,
        "interval": "95 % percentile over replicates of the test patients of the mean over draws; differences paired",
        "draws": "by patient, stratified by class, nested; at 100 % all draw the same patients",
        "size": size,
        "random_starts": "one a draw, of the same seed",
        "backbone": card.backbone.model_dump(mode="json"),
        "pretrained_on": card.data.fingerprint,
        "store": store.fingerprint,
        "split_digest": store.split_digest,
    }


def _next(card: Card, model: Path | str, data: Path | str) -> str:
    fitting = [each.name for each in shipped() if each.name.startswith(f"{card.modality}/classification")]
    recipe = fitting[0] if fitting else "RECIPE"
    return f"sslmed finetune {recipe} --data {shlex.quote(str(data))} --from {shlex.quote(str(model))} --out finetuned"


def _write(folder: Path, result: EvaluateResult) -> None:
    """Both files in one new folder, there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    head = "\n".join(f"- {line}" for line in [*result.preamble(), *result.conditions()])
    try:
        partial.mkdir(parents=True)
        write_json(partial / "evaluation.json", result.as_dict())
        text = f"# Evaluation of {result.model}\n\n{head}\n\n{comparison.markdown(result.rows)}"
        (partial / "evaluation.md").write_text(text, encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        raise DiskError(f"cannot write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
