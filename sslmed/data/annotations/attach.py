"""Masks and boxes found, read, held against the images of a store, and written into it; what does not fit is listed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.annotations.boxes import Boxes, Drawing, Drawings, fit
from sslmed.data.annotations.label_columns import Described, Labelled
from sslmed.data.annotations.mask_values import MOST_NAMES
from sslmed.data.annotations.masks import SUFFIXES, is_mask, match_masks, onto, shrunk
from sslmed.data.annotations.matching import Finder, files_below
from sslmed.data.annotations.named_images import Images
from sslmed.data.annotations.writer import annotate
from sslmed.data.readers.mask import read_masks
from sslmed.data.readers.refusal import RefusedError
from sslmed.data.store import Store

Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Problem:
    """Something that was left out, or that nothing goes with: the file, what it is in one word, and why."""

    file: str
    code: str
    reason: str


@dataclass
class Report:
    """What `attach` did.

    ``masks``, ``boxes``, ``negatives`` count images that got a mask, that got boxes, and that were said to hold none.
    """

    masks: int = 0
    boxes: int = 0
    negatives: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, file: str, code: str, reason: str) -> None:
        """List a problem."""
        self.problems.append(Problem(file, code, reason))

    def lines(self) -> list[str]:
        """What became of masks and boxes, a line each; of every kind of problem the first."""
        lines = [f"{self.masks} images have a mask now"] if self.masks else []
        if self.boxes or self.negatives:
            lines.append(f"{self.boxes} images have boxes now, {self.negatives} were searched and have none")
        counts = Counter(problem.code for problem in self.problems)
        for code, count in counts.items():
            first = next(problem for problem in self.problems if problem.code == code)
            more = f" (the first of {count})" if count > 1 else ""
            lines.append(f"{code}: {first.file}: {first.reason}{more}")
        return lines + [f"note: {note}" for note in self.notes]


@dataclass(frozen=True)
class Sources:
    """Where masks and boxes come from; nothing is read before `check`, `look` or `attach`.

    Args:
        masks: folder of masks, or None.
        mask_classes: names of the masks' values 0, 1, ...; "" of the numbers themselves.
        boxes: a COCO JSON file or a folder of Pascal VOC XML files, or None.

    Raises:
        MissingInputError: one of them does not exist.
        UsageError: names without masks, blank or repeated names.
    """

    masks: Path | None = None
    mask_classes: tuple[str, ...] = ()
    boxes: Path | None = None

    def __post_init__(self) -> None:
        if self.masks is not None and not self.masks.is_dir():
            raise MissingInputError(f"no folder of masks at {self.masks}.")
        if self.boxes is not None and not self.boxes.exists():
            raise MissingInputError(f"no boxes at {self.boxes}: give a COCO JSON file or a folder of VOC XML files.")
        names = self.mask_classes
        if names and self.masks is None:
            raise UsageError("--mask-classes names the classes of masks: give --masks DIR too.")
        if any(not name.strip() for name in names) or len(set(names)) < len(names) or len(names) > MOST_NAMES:
            raise UsageError(f"--mask-classes {','.join(names)!r}: at most {MOST_NAMES} different names, none blank.")

    def __bool__(self) -> bool:
        return self.masks is not None or self.boxes is not None

    @property
    def paths(self) -> list[Path]:
        """What is no image, though it may lie among the images."""
        return [path for path in (self.masks, self.boxes) if path is not None]

    def check(self) -> None:
        """Read the boxes and list the masks, so that a mistake is told before hours of reading images.

        Raises:
            DataError: the boxes cannot be read; there is no mask.
        """
        if self._drawings is not None and not self._drawings.images:
            raise DataError(f"{self.boxes} says nothing of any image.")
        if self.masks is not None and not any(is_mask(name) for name, _ in files_below(self.masks)[0]):
            raise DataError(f"no mask in {self.masks}: masks are {', '.join(SUFFIXES)} files.")

    def attach(
        self,
        folder: Path,
        files: Sequence[str],
        *,
        labels: Sequence[Labelled] = (),
        meta: Sequence[Described] = (),
        parts: Sequence[str] = (),
        replace: bool = False,
    ) -> Report:
        """Write labels, masks and boxes into the store in ``folder``, all at once.

        Args:
            folder: a whole store; the hidden folder of one that is being made will do.
            files: of every row the file that it was read from, relative to the source.
            labels, meta: see `annotate`.
            parts: of every row which scan of its file it is, see `Scan`; "" of all without it.
            replace: see `annotate`.

        Raises:
            DataError: nothing goes with any image, masks or boxes contradict each other or what the store has.
            TemporaryError, DiskError: see `annotate`.
        """
        report = Report()
        masks, boxes = self._read(Images(Store(folder), files, parts), report)
        annotate(
            folder,
            labels=labels,
            meta=meta,
            masks=masks,
            mask_classes=self.mask_classes,
            boxes=boxes,
            box_classes=self._drawings.classes if self._drawings is not None else (),
            replace=replace,
            names=files,
        )
        return report

    def look(self, store: Store, files: Sequence[str], parts: Sequence[str] = ()) -> Report:
        """What `attach` would report, and raise; everything is read, nothing written.

        Args:
            store: one that is open, or something of the same index, scans and affines.
            files, parts: as for `attach`.
        """
        report = Report()
        masks, _ = self._read(Images(store, files, parts), report)
        for _ in masks or ():
            pass
        return report

    @cached_property
    def _drawings(self) -> Drawings | None:
        return read_boxes(self.boxes) if self.boxes is not None else None

    def _read(
        self, images: Images, report: Report
    ) -> tuple[Iterator[tuple[int, Mask]] | None, dict[int, Boxes] | None]:
        masks = _masks(images, self.masks, report) if self.masks is not None else None
        return masks, _boxes(images, self._drawings, report) if self._drawings is not None else None


# Masks.


def _masks(images: Images, folder: Path, report: Report) -> Iterator[tuple[int, Mask]]:
    """Rows with their masks, as stored; read one file at a time."""
    matches = match_masks(folder, images.targets())
    for name in matches.outside:
        report.add(name, "link_outside", f"is a link that leads out of {folder}")
    for name in matches.strays:
        report.add(name, "mask_without_image", "no image of the store goes by this name")
    if not matches.masks:
        example = f"such as {matches.strays[0]!r}" if matches.strays else f"there is none in {folder}"
        raise DataError(
            f"no mask goes with any image: {example}; images are called such as {images.files[0]!r}.\n"
            "A mask has the path and name of its image, but for the suffix and words like _mask (docs/annotations.md)."
        )
    return _read_masks(images, matches.masks, report)


def _read_masks(images: Images, masks: Mapping[str, Path], report: Report) -> Iterator[tuple[int, Mask]]:
    covered = images.store.annotations.masked()
    given = np.zeros(len(covered), bool)
    for name, path in masks.items():
        try:
            for rows, pixels in _of_file(images, name, path, report):
                if given[rows].any():
                    raise DataError(f"{path} is one mask more of {images.files[int(rows[0])]!r}. Keep one of them.")
                given[rows] = True
                for row, mask in zip(rows.tolist(), pixels, strict=True):
                    yield row, shrunk(mask, images.stored_size(row))
        except RefusedError as refusal:
            report.add(name, "mask_mismatch", f"its mask {path} {refusal}")
        except _UnreadableError as error:
            report.add(name, "mask_unreadable", f"its mask {error}")
    report.masks = int(given.sum())
    if not given.any():
        raise DataError("\n".join(["none of the masks fits its image:", *(p.reason for p in report.problems[-3:])]))
    told = {problem.file for problem in report.problems}
    for scan in np.setdiff1d(images.scan_of, images.scan_of[covered | given]):
        if (name := images.name(int(scan))) not in told:
            report.add(name, "image_without_mask", "has none")


class _UnreadableError(Exception):
    """A mask file is damaged or holds no mask."""


def _of_file(images: Images, name: str, path: Path, report: Report) -> Iterator[tuple[npt.NDArray[np.int64], Mask]]:
    """The rows of each mask in a file, and their masks (rows, H, W) of the size of the images as they were read."""
    groups = images.groups(name)
    found = read_masks(path)
    while True:
        try:
            mask = next(found)
        except StopIteration:
            return
        except DataError as error:
            raise _UnreadableError(str(error)) from None
        part = mask.part or next(iter(groups)) if len(groups) == 1 else mask.part
        if part not in groups:
            which = f"part {mask.part!r} of {path}" if mask.part else f"{path}, which is one mask,"
            report.add(name, "mask_without_image", f"{which} goes with none of its parts in the store")
            continue
        rows = groups[part]
        scan = int(images.scan_of[rows[0]])
        whole = len(rows) == images.depth(scan)
        size, affine = images.source_size(int(rows[0])), images.affine(scan) if whole else None
        if affine is not None and mask.affine is None and len(rows) > 1:
            raise RefusedError(
                "is not placed in the patient, but its image is, so that the order of their slices cannot be compared: "
                "save it as NIfTI, or each slice by itself"
            )
        pixels = onto(mask, len(rows), size, affine)
        if mask.affine is None or affine is None:  # drawn on the pixels of the file
            flips = images.flips(scan)
            pixels = np.flip(pixels, tuple(axis for axis in (1, 2) if flips[axis]))
        yield rows, pixels


# Boxes.


def _boxes(images: Images, drawings: Drawings, report: Report) -> dict[int, Boxes]:
    finder = Finder(images.rows)
    numbers = {name: number for number, name in enumerate(drawings.classes)}
    found: dict[int, Boxes] = {}
    origins: dict[int, str] = {}
    named = images.store.annotations.boxed()
    clipped = 0
    for drawing in drawings.images:
        try:
            row = _row(images, finder, drawing)
            named[row] = True
            size = images.source_size(row)
            boxes, cut = fit(drawing, size, numbers)
            if images.sheared(int(images.scan_of[row])):
                raise RefusedError("is of a slice that was moved (--resample-tilt), and its boxes were not")
            _, down, across = images.flips(int(images.scan_of[row]))
            boxes = boxes.flipped(size, down, across)
        except _MisfitError as misfit:
            report.add(drawing.origin, misfit.code, str(misfit))
            continue
        except RefusedError as refusal:
            report.add(drawing.origin, "boxes_refused", str(refusal))
            continue
        if row in found:
            raise DataError(f"{origins[row]} and {drawing.origin} are both of {images.files[row]!r}. Keep one of them.")
        found[row], origins[row] = boxes.scaled(size, images.stored_size(row)), drawing.origin
        clipped += cut
    if not found:
        first = "\n".join(f"{p.file}: {p.reason}" for p in report.problems[:3])
        raise DataError(f"no boxes go with any image, such as {images.files[0]!r}:\n{first or 'there are none'}")
    report.boxes = sum(len(boxes) > 0 for boxes in found.values())
    report.negatives = len(found) - report.boxes
    if clipped:
        report.notes.append(f"{clipped} boxes reached up to a pixel out of their images and were clipped")
    if drawings.crowds:
        report.notes.append(f"{drawings.crowds} boxes of crowds were left out")
    if drawings.strays:
        report.notes.append(f"{drawings.strays} boxes of images that the file itself does not list were left out")
    for scan in np.setdiff1d(images.scan_of, images.scan_of[named]):
        report.add(images.name(int(scan)), "image_without_boxes", "nothing is said of it: neither boxes nor none")
    return found


class _MisfitError(Exception):
    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _row(images: Images, finder: Finder, drawing: Drawing) -> int:
    """The one row that a drawing is of."""
    meant: list[str] = []
    for name in drawing.names:
        several = finder.find(name)
        if len(several) > 1:
            raise _MisfitError("boxes_ambiguous", f"{name!r} may be {several[0]!r} or {several[1]!r}")
        meant += [image for image in several if image not in meant]
    if not meant:
        raise _MisfitError("boxes_without_image", "no image of the store goes by this name")
    if len(meant) > 1:
        raise _MisfitError(
            "boxes_ambiguous", f"goes by its name with {meant[0]!r}, but names {meant[1]!r} as its image"
        )
    rows = images.rows[meant[0]]
    if len(rows) > 1:
        raise _MisfitError("boxes_ambiguous", f"{meant[0]!r} holds {len(rows)} images: which of them is meant?")
    return int(rows[0])
