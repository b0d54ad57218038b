"""``sslmed predict``: a fine-tuned model and files it has never seen in, a table, masks, boxes and heat maps out."""

import shutil
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.config import DataError, DiskError, MissingInputError, OutputExistsError
from sslmed.console import command, progress
from sslmed.data import readers
from sslmed.data.input import refuse_colour, with_neighbours
from sslmed.data.intensity import Intensity
from sslmed.data.scan import Scan
from sslmed.data.sources.reading import Pool, Read, Refused, units
from sslmed.data.views import Pixels
from sslmed.durable import PARTIAL
from sslmed.supervised import answered as writing
from sslmed.supervised import box_answers
from sslmed.supervised.answered import Answered
from sslmed.supervised.box_answers import BoxFiles
from sslmed.supervised.explained import heat_on
from sslmed.supervised.model import Model, load


@dataclass(frozen=True)
class PredictResult:
    """Finished predictions.

    Attributes:
        out: the table.
        scans: lines of it.
        images: the images, slices and frames that they rest on.
        predicted: how many scans each class, finding or mask's class was called in; of a model that learnt boxes how
            many objects of each class were found.
        unusual: files that look unlike what the model was trained on, or None where it cannot tell.
        skipped: (file, reason).
        masks, heat: folders, "" where there are none.
        boxes: the table of boxes, "" of a model that gives none; ``boxes.json`` lies beside it.
        found: objects of each class in boxes.
        holding: scans with a box.
        weak: boxes come from class labels alone.
    """

    out: str
    scans: int
    images: int
    predicted: dict[str, int]
    unusual: tuple[str, ...] | None
    skipped: tuple[tuple[str, str], ...]
    masks: str
    heat: str
    boxes: str
    found: dict[str, int]
    holding: int
    weak: bool
    next: str

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"  {name}: {reason}" for name, reason in self.skipped[:5]]
        skipped = [f"skipped {len(self.skipped)} files:", *shown] if self.skipped else []
        whole = f"{self.images} images"
        counts = ": " + ", ".join(f"{name} {count}" for name, count in self.predicted.items())
        learnt = bool(self.boxes) and not self.weak
        if self.scans != self.images:
            by = "of" if self.masks or learnt else "by the mean over"
            whole = f"{self.scans} scans {by} their {self.images} images, slices and frames"
        folders = (
            ("masks", self.masks),
            ("boxes", self.boxes),
            ("heat maps" if not self.boxes else "pictures", self.heat),
        )
        where = [f"{name}: {path}" for name, path in folders if path]
        said = [f"predicted {whole}{'' if learnt else counts}", *self._found(), *self._warnings()]
        return [*said, *skipped, f"predictions: {self.out}", *where]

    def _found(self) -> list[str]:
        if not self.boxes:
            return []
        there = ", ".join(f"{count} {name}" for name, count in self.found.items())
        said = f"found {there} in {self.holding} of {self.scans} scans" if there else "found no boxes"
        return [said, *([f"weak: {box_answers.WEAK}; expect rough outlines"] if self.weak else [])]

    def _warnings(self) -> list[str]:
        if not self.unusual:
            return []
        return [
            f"warning: {len(self.unusual)} of {self.scans} scans look unlike the images that this model was trained on "
            f"(such as {self.unusual[0]}): do not believe what it says of them. Column 'unusual' names them"
        ]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def predict(
    model: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    resample_tilt: bool = False,
    tta: bool = False,
    explain: bool = False,
) -> PredictResult:
    """Predict an image, or every image, volume and clip in a folder; ``out/predictions.csv`` gets a line each.

    Of classes and findings a line has calibrated probabilities; those of a volume or clip are the mean over its slices
    or frames. Masks are written to ``out/masks`` under the names of their sources, volumes with the source's own grid.
    Boxes that reach the threshold of their class are written to ``out/boxes.csv`` and, as COCO, ``out/boxes.json``;
    those of neighbouring slices or frames are linked to objects (see `evaluation.linking`), one a line.
    The DICOM files of a series are one volume, where the modality reads volumes, under the name of the first.

    Args:
        model: a fine-tuning run or its artifact.
        source: a file or a folder.
        out: a new folder.
        resample_tilt: read series of a tilted gantry too, as ``ingest`` does with ``--resample-tilt``.
        tta: test-time augmentation: the mean over the mirrorings and turns that training used, else over sizes.
        explain: also write pictures to ``out/heat``: Grad-CAM of the likeliest class or finding, or masks or boxes on
            images; of a volume the slice that shows most.

    Raises:
        MissingInputError: no model or no source.
        DataError: the model has no head, or no file could be read.
        OutputExistsError: ``out`` is there already.
    """
    source, out = Path(source), Path(out)
    loaded = load(model)
    if not source.exists():
        raise MissingInputError(f"there is no file or folder at {source}")
    if out.exists():
        raise OutputExistsError(f"the output {out} exists already; give another --out")
    files = readers.find(source)
    if not files:
        raise DataError(f"{source} holds no image of a format that is read here: {', '.join(sorted(readers.SUFFIXES))}")
    root = source if source.is_dir() else source.parent
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    work = _Prediction(loaded.with_looks() if tta else loaded, root, partial, resample_tilt, explain)
    try:
        work.run(files)
        if not work.lines:
            first, reason = work.skipped[0]
            raise DataError(f"none of the {len(files)} files in {source} could be read; the first: {first}: {reason}")
        partial.mkdir(parents=True, exist_ok=True)
        writing.write_table(partial / writing.TABLE, work.lines)
        if work.boxes.scans:
            work.boxes.write(partial)
        partial.rename(out)  # there whole or not at all
    except OSError as error:
        raise DiskError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return work.result(out)


class _Prediction:
    """Scans on their way through the model. Images of several scans share a batch, so answers come in later."""

    def __init__(self, model: Model, root: Path, out: Path, resample_tilt: bool, explain: bool) -> None:
        self.model, self.root, self.out, self.explain = model, root, out, explain
        self.resample_tilt = resample_tilt
        self.lines: list[dict[str, Any]] = []
        self.skipped: list[tuple[str, str]] = []
        self.predicted: Counter[str] = Counter()
        self.unusual: list[str] = []
        self.boxes = BoxFiles(model)
        self.images = 0
        self._places: set[str] = set()
        self._waiting: deque[tuple[Answered, Pixels, Intensity]] = deque()
        self._shown: list[tuple[Pixels, Intensity]] = []  # of the scan whose answers come in, for its picture

    def run(self, files: list[Path]) -> None:
        """Every scan of the files; those that cannot be used are in ``skipped``."""
        known = self.model.familiarity
        for answer in self.model.applied(self._images(files)):
            scan, pixels, intensity = self._waiting.popleft()
            distance = 0.0 if known is None else float(known.distance(answer.appearance[None])[0]) / known.limit
            scan.add(answer, distance)
            if self.explain:
                self._shown.append((pixels, intensity))
            if scan.complete:
                self._finish(scan)
                self._shown.clear()
        self.skipped.sort()

    def result(self, out: Path) -> PredictResult:
        """What it came to, now that it lies in ``out``."""
        masks, heat, table = out / writing.MASKS, out / writing.HEAT, str(out / writing.TABLE)
        classes = self.model.about.classes
        return PredictResult(
            table,
            len(self.lines),
            self.images,
            {name: self.predicted[name] for name in classes if self.predicted[name]},
            None if self.model.familiarity is None else tuple(self.unusual),
            tuple(self.skipped),
            str(masks) if masks.is_dir() else "",
            str(heat) if heat.is_dir() else "",
            str(out / box_answers.BOXES) if self.boxes.scans else "",
            {name: self.boxes.counts[name] for name in classes if self.boxes.counts[name]},
            self.boxes.holding,
            self.model.about.weak,
            command("head", table),
        )

    def _images(self, files: list[Path]) -> Iterator[tuple[Pixels, Intensity]]:
        policy = self.model.applied.policy
        read = Read(policy.name, self._accepted, self.resample_tilt)
        wanted, bad = units(files, policy, Pool(None, 0))
        self.skipped += [(self._name(path), reason) for path, reason in bad]
        for unit in progress(wanted, len(wanted), "predict"):
            for seen in read(unit):
                if isinstance(seen, Refused):
                    self.skipped.append((self._name(unit.paths[seen.at]), seen.reason))
                    continue
                scan, whole, images = seen
                intensity = policy.intensity(whole)
                depth = 1 if scan.kind == "image" else len(whole)
                name = self._name(unit.paths[0])
                line = Answered(name, scan, depth, writing.place(name, scan.part, self._places))
                for image in images:
                    self._waiting.append((line, image, intensity))
                    yield image, intensity

    def _accepted(self, scan: Scan, pixels: Pixels) -> tuple[Scan, Pixels, Iterator[Pixels]]:
        """The scan as the modality accepts it, and the images that the network sees of it."""
        card, applied = self.model.card, self.model.applied
        refuse_colour(scan, pixels, card.backbone.in_chans)
        applied.check_covers(pixels.shape[:2] if scan.kind == "image" else pixels.shape[1:3])
        return scan, pixels, with_neighbours(scan, pixels, card.slices)

    def _finish(self, scan: Answered) -> None:
        about = self.model.about
        there = box_answers.objects(scan, self.model) if scan.found else ()
        cells = box_answers.cells(scan, self.model, there) if scan.found else {}
        self.lines.append(writing.line(scan, self.model, cells))
        self.images += scan.images
        if scan.unusual > 1:
            self.unusual.append(scan.name)
        if scan.found:
            self.boxes.add(scan, there)
        if about.kind == "mask":
            writing.write_mask(self.out, scan, about.values)
            shown = np.unique(np.concatenate([labels.ravel() for labels in scan.labels]))
            self.predicted.update(about.classes[label] for label in shown if label)
        elif about.kind == "boxes":
            self.predicted.update(about.classes[each.label] for each in there)
        else:
            self.predicted.update(self.model.called(scan.mean))
        if self.explain:
            writing.write_overlay(self.out, scan, self._picture(scan))

    def _picture(self, scan: Answered) -> Pixels:
        if scan.found:
            return box_answers.boxes_on(scan, self.model, self._shown)
        if self.model.about.kind == "mask":
            most = int(np.argmax([(labels > 0).sum() for labels in scan.labels]))
            picture = writing.labels_on(*self._shown[most], self.model.card.slices, scan.labels[most])
        else:
            label = self.model.foremost(scan.mean)
            most = int(np.argmax([scores[label] for scores in scan.scores]))
            picture = heat_on(self.model, *self._shown[most], label)
        return writing.as_shown(scan.scan, picture)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()
