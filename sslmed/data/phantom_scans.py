"""Synthetic CT and MR volumes, ultrasound pictures and tissue tiles drawn by code, for tests and for trying recipes.

They show no person and say nothing of any. They have what a modality's policy is about: Hounsfield units with padding
around the field of view, MR values of an arbitrary scale in noisy air, a sector with text beside it, stains.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sslmed.config import OutputExistsError, UsageError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.coco import write_coco
from sslmed.data.annotations.components import boxes_around
from sslmed.data.stain import RGB_FROM_HED
from sslmed.data.writers import write_image, write_nifti
from sslmed.durable import write_atomically
from sslmed.keyed_rng import rng

CLASSES = ("clear", "lesion")
SHAPE = (12, 64, 64)  # of a volume: slices, rows, columns
SPACING = (5.0, 4.0, 4.0)  # mm between slices, down and across
PICTURE = (96, 112)  # rows and columns of an ultrasound
TILE = 64  # pixels of a tissue tile's side
REACH, CROWD = 8.0, 0.16  # of crowded tissue: pixels around, and their share of nuclei (clear tiles: 5 % of the area)
PICTURES = 4  # of a patient; of volumes there is one
_FIGURES = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)  # 3 x 5 pixels

Pixels = npt.NDArray[Any]


class Drawn(NamedTuple):
    """A picture (H, W) or (H, W, 3), or a volume (D, H, W); ``lesion`` is where it has one, (H, W) or (D, H, W)."""

    pixels: Pixels
    lesion: npt.NDArray[np.bool_]


Draw = Callable[[np.random.Generator, bool], Drawn]


@dataclass(frozen=True)
class PhantomScans:
    """What `write_scans` wrote.

    Attributes:
        folder: holds ``scans/``, the table and, where they were asked for, ``masks/``.
        labels: a CSV file with file, patient and label:finding.
        scans: files of ``patients``.
        masks: the folder with a mask for each scan, called like it, 1 inside a lesion and 0 elsewhere: PNG of a
            picture, NIfTI on the grid of a volume. None where no masks were asked for.
        boxes: the COCO file of the pictures, with a box of the class lesion around each piece of one. None where no
            boxes were asked for.
    """

    folder: Path
    labels: Path
    scans: int
    patients: int
    masks: Path | None = None
    boxes: Path | None = None


def write_scans(
    folder: Path, modality: str, patients: int = 16, seed: int = 0, masks: bool = False, boxes: bool = False
) -> PhantomScans:
    """Draw a small data set: a NIfTI volume a patient, or four PNG pictures. Every second patient has a lesion.

    Args:
        folder: made; must be absent or empty.
        modality: ct, mri, ultrasound, histology or photo (as histology).
        seed: the same seed gives the same files.
        masks: write ``masks/`` too; all other files stay the same.
        boxes: write ``boxes.json`` too, of pictures; all other files stay the same.

    Raises:
        UsageError: another modality, or boxes of volumes.
        OutputExistsError: ``folder`` holds something.
    """
    if modality not in DRAWN:
        raise UsageError(f"no phantoms of '{modality}' are drawn; allowed: {', '.join(DRAWN)}")
    draw, volumes = DRAWN[modality], modality in ("ct", "mri")
    if boxes and volumes:
        raise UsageError(
            f"no boxes are drawn on the volumes of '{modality}'; ask for masks, which give boxes there: "
            "the target 'boxes around masks'"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} holds something already; give another folder, or remove it first")
    for name in ("scans", "masks") if masks else ("scans",):
        (folder / name).mkdir(parents=True, exist_ok=True)
    boxed: dict[str, tuple[tuple[int, int], Boxes]] = {}
    rows: list[tuple[str, str, str]] = []
    for number in range(patients):
        lesion = number % 2 == 1
        for scan in range(1 if volumes else PICTURES):
            drawn = draw(rng(seed, scan, number, f"phantom {modality}"), lesion)
            name = f"{number + 1:03d}-{scan + 1}{'.nii.gz' if volumes else '.png'}"
            _save(folder / "scans" / name, drawn.pixels, volumes)
            if masks:
                _save(folder / "masks" / name, drawn.lesion.astype(np.uint8), volumes)
            if boxes:
                boxed[f"scans/{name}"] = drawn.lesion.shape, boxes_around(drawn.lesion.astype(np.uint8))
            rows.append((f"scans/{name}", f"P{number + 1:03d}", CLASSES[lesion]))
    labels = folder / "labels.csv"
    with write_atomically(labels) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "patient", "label:finding"))
        writer.writerows(rows)
    coco = folder / "boxes.json" if boxes else None
    if coco is not None:
        write_coco(coco, boxed, CLASSES[1:])
    return PhantomScans(folder, labels, len(rows), patients, folder / "masks" if masks else None, coco)


def chest(stream: np.random.Generator, lesion: bool) -> Drawn:
    """A CT of `SHAPE` in HU, int16: body, lungs, spine and ribs; -2000 beyond the round field of view."""
    z, y, x = _grid(SHAPE)
    wide = stream.uniform(0.75, 0.9)
    body = (x / wide) ** 2 + (y / 0.62) ** 2
    values = np.where(body < 1, 40.0, -1000.0)
    values[(body < 1) & (body > 0.85)] = -100  # fat
    values[(body < 0.85) & (body > 0.78) & (np.sin(9 * z + 14 * np.abs(x)) > 0.3)] = 450  # ribs
    sides = [((x - side * 0.4) / 0.3) ** 2 + (y / 0.45) ** 2 for side in (-1, 1)]
    for lung in sides:
        values[lung < 1] = -850
    values[np.hypot(x, (y - 0.42)) < 0.13] = 600  # spine
    ball = np.zeros(SHAPE, bool)
    if lesion:
        side = int(stream.integers(2)) * 2 - 1
        centre = (stream.uniform(-0.5, 0.5), stream.uniform(-0.2, 0.2), side * 0.4 + stream.uniform(-0.1, 0.1))
        ball = _ball((z, y, x), centre, stream.uniform(0.14, 0.2))
        values[ball] = 60
    values += stream.normal(0, 15, SHAPE)
    values[np.hypot(x, y) > 1] = -2000
    return Drawn(np.rint(values).astype(np.int16), ball)


def head(stream: np.random.Generator, lesion: bool) -> Drawn:
    """An MR of `SHAPE`, int16, of any scale and shading: scalp, skull, brain and ventricles in noisy air."""
    z, y, x = _grid(SHAPE)
    away = np.hypot(x / stream.uniform(0.72, 0.8), y / stream.uniform(0.86, 0.94))
    values = np.where(away < 1, 1.0, 0.0)  # scalp
    values[away < 0.93] = 0.08  # bone
    values[away < 0.86] = 0.45
    values[(away < 0.86) & (np.sin(11 * away + 4 * np.arctan2(y, x)) > 0.4)] = 0.36
    for side in (-1, 1):
        values[np.hypot((x - side * 0.12) / 0.7, y) < 0.14] = 0.12  # fluid
    ball = np.zeros(SHAPE, bool)
    if lesion:
        side = int(stream.integers(2)) * 2 - 1
        centre = (stream.uniform(-0.5, 0.5), stream.uniform(-0.3, 0.3), side * stream.uniform(0.3, 0.45))
        ball = _ball((z, y, x), centre, stream.uniform(0.14, 0.2))
        values[ball] = 0.75
    tilt = stream.uniform(-0.2, 0.2, 2)
    values *= 1 + tilt[0] * x + tilt[1] * y
    noise = stream.normal(0, 0.02, (2, *SHAPE))
    values = np.hypot(values + noise[0], noise[1])
    scale = float(np.exp(stream.uniform(np.log(300), np.log(20000))))
    return Drawn(np.asarray(np.rint(values * scale), np.int16), ball)


def beam(stream: np.random.Generator, lesion: bool) -> Drawn:
    """An ultrasound of `PICTURE`, uint8: a sector of speckle with layers, figures beside it; a lesion is dark."""
    rows, columns = PICTURE
    y, x = np.mgrid[:rows, :columns].astype(float)
    away, angle = np.hypot(x - columns / 2, y + 12), np.arctan2(x - columns / 2, y + 12)
    inside = (away > 20) & (away < rows + 6) & (np.abs(angle) < stream.uniform(0.55, 0.65))
    echo = 70 * np.exp(-away / (1.2 * rows)) * (1 + 0.6 * np.sin(away / stream.uniform(2.5, 4)) ** 8)
    disc = np.zeros(PICTURE, bool)
    if lesion:
        centre = stream.uniform(45, 75), stream.uniform(-0.3, 0.3)
        middle = columns / 2 + centre[0] * np.sin(centre[1]), centre[0] * np.cos(centre[1]) - 12
        disc = np.hypot(x - middle[0], y - middle[1]) < stream.uniform(8, 12)
        echo[disc] *= 0.15
    values = np.where(inside, echo * stream.gamma(2.5, 0.6, PICTURE), 0)
    for line in range(4):
        _write(values, stream.integers(10, size=4), top=3 + 8 * line, left=2)
    return Drawn(np.asarray(np.clip(values, 0, 255), np.uint8), disc & inside)


def tile(stream: np.random.Generator, lesion: bool) -> Drawn:
    """A stained tile (`TILE`, `TILE`, 3), uint8: nuclei in haematoxylin, more in a lesion, the rest in eosin."""
    y, x = np.mgrid[:TILE, :TILE].astype(float)
    eosin = 0.25 + 0.1 * np.sin(x / stream.uniform(3, 6) + 4 * np.sin(y / 15)) + stream.normal(0, 0.02, (TILE, TILE))
    nuclei = np.zeros((TILE, TILE))
    for _ in range(int(stream.integers(36, 48) if lesion else stream.integers(10, 18))):
        row, column = stream.uniform(0, TILE, 2)
        away = np.hypot((y - row) / stream.uniform(2, 3.5), (x - column) / stream.uniform(2, 3.5))
        nuclei = np.maximum(nuclei, 0.9 / (1 + np.exp(6 * (away - 1))))
    strength = stream.uniform(0.8, 1.2, 2)
    density = np.stack([strength[0] * nuclei, strength[1] * eosin, np.zeros_like(eosin)], axis=2) @ RGB_FROM_HED
    return Drawn(np.asarray(np.clip(255 * np.exp(-density), 0, 255), np.uint8), _crowded(nuclei) & lesion)


DRAWN: dict[str, Draw] = {"ct": chest, "mri": head, "ultrasound": beam, "histology": tile, "photo": tile}


def _crowded(nuclei: Pixels) -> npt.NDArray[np.bool_]:
    """Where nuclei lie close together: their share of the tissue around a pixel is above `CROWD`."""
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(nuclei, REACH, mode="reflect") > CROWD)


def _save(path: Path, pixels: Pixels, volume: bool) -> None:
    if volume:
        write_nifti(path, pixels, affine=_affine())
    else:
        write_image(path, pixels)


def _grid(shape: tuple[int, int, int]) -> tuple[Pixels, Pixels, Pixels]:
    """Slice, row and column of every voxel, from -1 to 1."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    return z, y, x


def _ball(place: tuple[Pixels, Pixels, Pixels], centre: tuple[float, float, float], radius: float) -> Pixels:
    """Over half of the slices, since these are thick."""
    z, y, x = (axis - middle for axis, middle in zip(place, centre, strict=True))
    return np.asarray((0.25 * z**2 + y**2 + x**2) < radius**2)


def _affine() -> npt.NDArray[np.float64]:
    """Slices upwards, rows to the back, columns to the left, about the middle."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2] = SPACING[0], -SPACING[1], -SPACING[2]
    affine[:3, 3] = -affine[:3, :3] @ [(side - 1) / 2 for side in SHAPE]
    affine[3, 3] = 1
    return affine


def _write(picture: Pixels, figures: Pixels, top: int, left: int) -> None:
    """Figures in white, each of five rows of three pixels: an octal digit a row."""
    for number, figure in enumerate(figures.tolist()):
        rows = [int(digit) for digit in f"{_FIGURES[figure]:05o}"]
        bits = np.array([[row >> (2 - column) & 1 for column in range(3)] for row in rows])
        picture[top : top + 5, left + 4 * number : left + 4 * number + 3][bits > 0] = 255
