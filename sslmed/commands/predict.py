"""``sslmed predict``: a fine-tuned model and files it has never seen in, a CSV out."""

import csv
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sslmed import artifact
from sslmed.artifact import HeadCard
from sslmed.config import DataError, MissingInputError, OutputExistsError
from sslmed.console import command, progress
from sslmed.data import modality, readers
from sslmed.data.loading import network_input
from sslmed.durable import write_atomically
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models.backbones import Backbone

BATCH = 32


@dataclass(frozen=True)
class PredictResult:
    """Finished predictions. ``skipped`` are (file, reason)."""

    out: str
    images: int
    predicted: dict[str, int]
    skipped: tuple[tuple[str, str], ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{name} {count}" for name, count in self.predicted.items())
        shown = [f"  {name}: {reason}" for name, reason in self.skipped[:5]]
        skipped = [f"skipped {len(self.skipped)} files:", *shown] if self.skipped else []
        return [f"predicted {self.images} images: {counts}", *skipped, f"predictions: {self.out}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def predict(model: str | Path, source: str | Path, out: str | Path) -> PredictResult:
    """Classify an image, or every image in a folder; ``out/predictions.csv`` gets a line each with all probabilities.

    Args:
        model: a fine-tuning run or its artifact.
        source: a file or a folder.
        out: a new folder.

    Raises:
        MissingInputError: no model or no source.
        DataError: the model has no head, or no file could be read.
        OutputExistsError: ``out`` is there already.
    """
    source, out = Path(source), Path(out)
    card = artifact.read_card(model)
    if card.head is None:
        raise DataError(f"{model} is a backbone without a head; run `sslmed finetune` on it first")
    if not source.exists():
        raise MissingInputError(f"there is no file or folder at {source}")
    if out.exists():
        raise OutputExistsError(f"the output {out} exists already; give another --out")
    head = _head(model, card.head)
    files = readers.find(source)
    if not files:
        raise DataError(f"{source} holds no image of a format that is read here: {', '.join(sorted(readers.SUFFIXES))}")
    predicted, skipped = _run(head, card, files, source if source.is_dir() else source.parent)
    if not predicted:
        raise DataError(
            f"none of the {len(files)} files in {source} could be read; the first: {skipped[0][0]}: {skipped[0][1]}"
        )
    out.mkdir(parents=True)
    _write(out / "predictions.csv", card.head.classes, predicted)
    counts = Counter(card.head.classes[max(range(len(row)), key=row.__getitem__)] for _, row in predicted)
    path = str(out / "predictions.csv")
    return PredictResult(path, len(predicted), dict(counts), tuple(skipped), command("head", path))


def _head(model: str | Path, about: HeadCard) -> Head:
    try:
        kind = HEADS[about.name]
        config = kind.Config.model_validate(about.config)
    except (KeyError, ValidationError) as error:
        raise DataError(f"{model} has a head '{about.name}' that this sslmed does not know; use a newer one") from error
    head = kind(config, Backbone(artifact.load_backbone(model)), len(about.classes))
    artifact.load_head(model, head.head)
    return head.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _run(
    head: Head, card: artifact.Card, files: list[Path], root: Path
) -> tuple[list[tuple[str, list[float]]], list[tuple[str, str]]]:
    """Probabilities by file, relative to ``root``, and the files that could not be read."""
    policy = modality.named(card.modality)
    predicted: list[tuple[str, list[float]]] = []
    skipped: list[tuple[str, str]] = []
    names: list[str] = []
    images: list[torch.Tensor] = []
    for number, path in enumerate(progress(files, len(files), "predict"), start=1):
        name = path.relative_to(root).as_posix()
        try:
            pixels = modality.accept_scan(policy, readers.read(path))
            if pixels.ndim == 3 and card.backbone.in_chans < 3:
                raise DataError(f"is in colour, but the model was trained on {card.backbone.in_chans}-channel images")
            low, high = policy.intensity_range(pixels)
            images.append(network_input(pixels, low, high, policy, card.size, card.backbone.in_chans))
            names.append(name)
        except DataError as error:
            skipped.append((name, str(error).removeprefix(f"{path}: ")))
        if images and (len(images) == BATCH or number == len(files)):
            with torch.inference_mode():
                scores = head(torch.stack(images).to(next(head.parameters()).device))
            predicted += zip(names, scores.tolist(), strict=True)
            names, images = [], []
    return predicted, skipped


def _write(path: Path, classes: tuple[str, ...], predicted: list[tuple[str, list[float]]]) -> None:
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "predicted", *(f"probability:{name}" for name in classes)])
        for name, row in predicted:
            best = max(range(len(row)), key=row.__getitem__)
            writer.writerow([name, classes[best], *(f"{value:.6f}" for value in row)])
