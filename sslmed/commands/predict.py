"""``sslmed predict``: a fine-tuned model and files it has never seen in, a CSV out."""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from sslmed import artifact
from sslmed.artifact import HeadCard
from sslmed.config import DataError, MissingInputError, OutputExistsError
from sslmed.console import command, progress
from sslmed.data import readers
from sslmed.data.input import network_input
from sslmed.data.scan import Scan
from sslmed.data.sources.reading import Pool, Read, Refused, units
from sslmed.data.views import Pixels
from sslmed.durable import write_atomically
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models.backbones import Backbone

BATCH = 32


@dataclass(frozen=True)
class PredictResult:
    """Finished predictions: lines written, the images, slices and frames that they rest on, (file, reason) skipped."""

    out: str
    scans: int
    images: int
    predicted: dict[str, int]
    skipped: tuple[tuple[str, str], ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{name} {count}" for name, count in self.predicted.items())
        shown = [f"  {name}: {reason}" for name, reason in self.skipped[:5]]
        skipped = [f"skipped {len(self.skipped)} files:", *shown] if self.skipped else []
        whole = f"{self.images} images"
        if self.scans != self.images:
            whole = f"{self.scans} scans by the mean over their {self.images} images, slices and frames"
        return [f"predicted {whole}: {counts}", *skipped, f"predictions: {self.out}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """A scan as the modality accepts it, and the images that the network sees of it."""

    part: str
    whole: Pixels
    images: Iterator[Pixels]


@dataclass
class _Line:
    """A line of the table: a scan, and the probabilities of its images, added up."""

    file: str
    part: str
    images: int = 0
    scores: Pixels = field(default_factory=lambda: np.zeros(()))

    @property
    def mean(self) -> Pixels:
        return np.asarray(self.scores / self.images)


def predict(model: str | Path, source: str | Path, out: str | Path, *, resample_tilt: bool = False) -> PredictResult:
    """Classify an image, or every image, volume and clip in a folder; ``out/predictions.csv`` gets a line each.

    A line has all probabilities; those of a volume or clip are the mean over its slices or frames. The DICOM files of a
    series are one volume, where the modality reads volumes, under the name of the first.

    Args:
        model: a fine-tuning run or its artifact.
        source: a file or a folder.
        out: a new folder.
        resample_tilt: read series of a tilted gantry too, as ``ingest`` does with ``--resample-tilt``.

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
    lines, skipped = _run(head, card, files, source if source.is_dir() else source.parent, resample_tilt)
    if not lines:
        raise DataError(
            f"none of the {len(files)} files in {source} could be read; the first: {skipped[0][0]}: {skipped[0][1]}"
        )
    out.mkdir(parents=True)
    _write(out / "predictions.csv", card.head.classes, lines)
    counts = Counter(card.head.classes[int(line.mean.argmax())] for line in lines)
    path, images = str(out / "predictions.csv"), sum(line.images for line in lines)
    return PredictResult(path, len(lines), images, dict(counts), tuple(skipped), command("head", path))


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
    head: Head, card: artifact.Card, files: list[Path], root: Path, resample_tilt: bool
) -> tuple[list[_Line], list[tuple[str, str]]]:
    """The scans, with files relative to ``root``, and the files that could not be read."""
    policy = artifact.policy(card)

    def seen_of(scan: Scan, pixels: Pixels) -> _Seen:
        return _Seen(scan.part, pixels, _images(scan, pixels, card))

    read = Read(policy.name, seen_of, resample_tilt)
    wanted, bad = units(files, policy, Pool(None, 0))
    skipped = [(_name(path, root), reason) for path, reason in bad]
    lines: list[_Line] = []
    waiting: list[tuple[_Line, torch.Tensor]] = []
    for unit in progress(wanted, len(wanted), "predict"):
        for seen in read(unit):
            name = _name(unit.paths[0], root)
            if isinstance(seen, Refused):
                skipped.append((_name(unit.paths[seen.at], root), seen.reason))
                continue
            intensity = policy.intensity(seen.whole)
            lines.append(_Line(name, seen.part))
            for image in seen.images:
                tensor = network_input(image, intensity, policy, card.size, card.backbone.in_chans)
                waiting.append((lines[-1], tensor))
                if len(waiting) == BATCH:
                    _score(head, waiting)
    _score(head, waiting)
    return lines, sorted(skipped)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _images(scan: Scan, pixels: Pixels, card: artifact.Card) -> Iterator[Pixels]:
    """What the network sees of a scan, one after another: an image, or each slice or frame with its neighbours."""
    in_colour = pixels.ndim == (3 if scan.kind == "image" else 4)
    if in_colour and card.backbone.in_chans < 3:
        raise DataError(f"is in colour, but the model was trained on {card.backbone.in_chans}-channel images")
    if scan.kind == "image":
        return iter([pixels if card.slices == 1 else np.repeat(pixels[..., None], card.slices, axis=2)])
    around = np.arange(card.slices) - card.slices // 2
    places = (np.clip(number + around, 0, len(pixels) - 1) for number in range(len(pixels)))
    return (pixels[place[0]] if card.slices == 1 else np.moveaxis(pixels[place], 0, -1) for place in places)


def _score(head: Head, waiting: list[tuple[_Line, torch.Tensor]]) -> None:
    """Add the probabilities of the images that wait to their lines."""
    if not waiting:
        return
    with torch.inference_mode():
        scores = head(torch.stack([image for _, image in waiting]).to(next(head.parameters()).device))
    for (line, _), each in zip(waiting, scores.double().cpu().numpy(), strict=True):
        line.scores, line.images = line.scores + each, line.images + 1
    waiting.clear()


def _write(path: Path, classes: tuple[str, ...], lines: list[_Line]) -> None:
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "part", "images", "predicted", *(f"probability:{name}" for name in classes)])
        for line in lines:
            values = [f"{value:.6f}" for value in line.mean]
            writer.writerow([line.file, line.part, line.images, classes[int(line.mean.argmax())], *values])
