"""What a model has said of one scan, and how it is written down: a line of a table, a mask, a heat map."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.intensity import Intensity
from sslmed.data.readers import SUFFIXES
from sslmed.data.scan import Scan
from sslmed.data.views import Pixels
from sslmed.data.writers import write_image, write_nifti
from sslmed.durable import write_atomically
from sslmed.evaluation.detected_boxes import Found
from sslmed.evaluation.explain import overlay_labels
from sslmed.supervised.applying import Answer
from sslmed.supervised.model import Model

MASKS, HEAT, TABLE = "masks", "heat", "predictions.csv"

Labels = npt.NDArray[np.uint8]


@dataclass
class Answered:
    """A scan, and the answers to its images as they come in.

    Attributes:
        name: of its file, relative to the source.
        scan: as read, without its pixels' use: its geometry.
        images: how many there will be.
        place: where its pictures go, without a suffix.
        scores, labels, found: of each image, what the model gives of the three.
        distances: how unlike the model's own images each image is, as a multiple of what is usual.
    """

    name: str
    scan: Scan
    images: int
    place: PurePosixPath
    scores: list[npt.NDArray[np.float64]] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    def add(self, answer: Answer, distance: float) -> None:
        """Take the next image's answer."""
        self.distances.append(distance)
        if answer.labels is None:
            self.scores.append(answer.scores)
        else:
            self.labels.append(answer.labels)
        if answer.boxes is not None:
            self.found.append(answer.boxes)

    @property
    def complete(self) -> bool:
        """Whether every image has its answer."""
        return len(self.distances) == self.images

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Probabilities of the scan: the mean over its images."""
        return np.asarray(np.mean(self.scores, axis=0))

    @property
    def unusual(self) -> float:
        """The median over its images of how unlike the model's own they are; above 1 is a warning."""
        return float(np.median(self.distances))


def place(name: str, part: str, taken: set[str]) -> PurePosixPath:
    """Where the pictures of a scan go, without a suffix; several scans of a file lie in a folder of its name.

    Args:
        taken: what was given before, to which this is added: ``a.jpg`` beside ``a.png`` keeps its suffix.
    """
    path = PurePosixPath(name)
    suffix = next((each for each in sorted(SUFFIXES, key=len, reverse=True) if path.name.lower().endswith(each)), "")
    stem = path.name[: len(path.name) - len(suffix)] or path.name
    several = [part.replace("/", "-")] if part else []
    found = path.parent.joinpath(stem, *several)
    if str(found).lower() in taken:
        found = path.parent.joinpath(path.name, *several)
    taken.add(str(found).lower())
    return found


def line(answered: Answered, model: Model, of_boxes: Mapping[str, Any]) -> dict[str, Any]:
    """The scan's line in ``predictions.csv``, with the cells ``of_boxes``."""
    about = model.about
    found: dict[str, Any] = {"file": answered.name, "part": answered.scan.part, "images": answered.images}
    if about.kind == "mask":
        sizes, unit = _sizes(answered, len(about.classes))
        found["unit"] = unit
        found |= {f"size:{name}": f"{size:.6g}" for name, size in zip(about.classes[1:], sizes[1:], strict=True)}
    elif about.kind != "boxes":
        found["predicted"] = "; ".join(model.called(answered.mean))
        found |= {
            f"probability:{name}": f"{value:.6f}" for name, value in zip(about.classes, answered.mean, strict=True)
        }
    found |= of_boxes
    if model.familiarity is not None:
        found |= {"unlikeness": f"{answered.unusual:.2f}", "unusual": "yes" if answered.unusual > 1 else "no"}
    return found


def write_table(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All lines, whole or not at all."""
    with write_atomically(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def write_mask(folder: Path, answered: Answered, values: Sequence[int]) -> Path:
    """The mask where its source lies: a volume as NIfTI with the source's grid, an image as PNG, turned as its file is.

    A clip, or a volume that is not placed in the patient, becomes a folder of PNG files.

    Args:
        values: of each class in the files that the model was trained on.
    """
    scan = answered.scan
    masks = np.array(values, np.uint8)[np.stack(answered.labels)]
    base = folder / MASKS / answered.place
    base.parent.mkdir(parents=True, exist_ok=True)
    if scan.kind == "volume" and (scan.grid is not None or scan.affine is not None):
        path = base.with_name(f"{base.name}.nii.gz")
        write_nifti(path, masks, scan.grid, None if scan.grid is not None else scan.affine)
        return path
    masks = as_filed(scan, masks)
    if scan.kind == "image":
        path = base.with_name(f"{base.name}.png")
        write_image(path, np.ascontiguousarray(masks[0]))
        return path
    base.mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks, start=1):
        write_image(base / f"{number:04d}.png", np.ascontiguousarray(mask))
    return base


def write_overlay(folder: Path, answered: Answered, picture: Pixels) -> Path:
    """An overlay (H, W, 3) uint8, to be seen as it is, as PNG."""
    base = folder / HEAT / answered.place
    base.parent.mkdir(parents=True, exist_ok=True)
    path = base.with_name(f"{base.name}.png")
    write_image(path, np.ascontiguousarray(picture))
    return path


def as_shown(scan: Scan, image: Pixels) -> Pixels:
    """An image (H, W, ...) of a scan for the eye: a slice of a volume as viewers show it, else as its file lies."""
    return image if scan.kind == "volume" else as_filed(scan, image[None])[0]


def as_filed(scan: Scan, images: Pixels) -> Pixels:
    """Images (D, H, W, ...) of a scan, turned back to lie as its file has them; see `sources.facing`."""
    return np.flip(images, tuple(axis for axis in (1, 2) if scan.flipped[axis]))


def labels_on(pixels: Pixels, intensity: Intensity, slices: int, labels: Labels) -> Pixels:
    """The image with its labels drawn on it, (H, W, 3) uint8."""
    return overlay_labels(unit(pixels, intensity, slices), labels)


def unit(pixels: Pixels, intensity: Intensity, slices: int) -> Pixels:
    """The image for the eye: (H, W), or (H, W, 3) in colour, in [0, 1]; of neighbouring ``slices`` the middle one."""
    shown = pixels[..., slices // 2] if slices > 1 else pixels
    span = intensity.high - intensity.low
    return np.asarray(np.clip((shown.astype(np.float32) - intensity.low) / span, 0, 1), np.float32)


def _sizes(answered: Answered, classes: int) -> tuple[npt.NDArray[np.float64], str]:
    """Of each class the pixels, or mm² of an image and mm³ of a volume whose spacing is known."""
    counts = np.bincount(np.concatenate([each.ravel() for each in answered.labels]), minlength=classes)
    spacing = answered.scan.spacing
    if spacing is None or answered.scan.kind == "clip":
        return counts.astype(np.float64), "px"
    return np.asarray(counts * float(np.prod(spacing)), np.float64), "mm3" if len(spacing) == 3 else "mm2"
