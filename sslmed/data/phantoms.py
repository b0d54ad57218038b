"""Synthetic X-ray-like pictures drawn by code, for the demo and the tests. They show no person and say nothing of any.

A picture is the negative logarithm of a projection: the attenuation of a body outline, two lungs, heart, spine, ribs,
clavicles and vessels adds up, then exposure, blur and noise follow. The anatomy belongs to the patient, pose and
exposure to the image. The lesion class "nodule" has one or two faint round shadows inside a lung, 10 to 16 % of the
width across.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import OutputExistsError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.coco import write_coco
from sslmed.data.annotations.components import boxes_around
from sslmed.data.writers import write_image
from sslmed.durable import write_atomically
from sslmed.keyed_rng import rng

CLASSES = ("clear", "nodule")
_SIZES = ((96, 96), (112, 104), (128, 112), (128, 128), (144, 160), (160, 136))  # rows, columns
_NODULE_RADIUS = (0.10, 0.16)  # half widths of the picture: 10 to 16 % of the width across
_NODULE_DENSITY = (0.40, 0.60)  # a rib has 0.10 to 0.18, the noise 0.006 to 0.02
_BLANK_SHARE = 0.25  # of the patients, without a label: pretraining is for them

Plane = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Anatomy:
    """What stays with a patient. Lengths are in half widths of the picture, the origin in its middle, y downwards.

    Attributes:
        body: half width of the chest.
        lungs: for each lung x, y, half width, half height of its middle.
        heart: x, y, half width, half height.
        ribs: first height, distance, drop towards the side, half thickness.
        rib_density, spine, vessels: attenuation.
        texture: seed of the vessels' pattern.
        nodules: for each x, y inside its lung (-1 to 1), lung number, radius, attenuation.
    """

    body: float
    lungs: tuple[tuple[float, float, float, float], ...]
    heart: tuple[float, float, float, float]
    ribs: tuple[float, float, float, float]
    rib_density: float
    spine: float
    vessels: float
    texture: int
    nodules: tuple[tuple[float, float, int, float, float], ...]


@dataclass(frozen=True)
class Phantoms:
    """What `write_phantoms` wrote.

    Attributes:
        folder: holds ``images/`` and the table of labels.
        labels: the CSV file, with the columns file, patient, label:finding, meta:study.
        images: files that can be read.
        patients: patients among them; ``labelled_patients`` of these have a label.
        broken: names of the two files that cannot be read, relative to ``folder``.
        masks: the folder with a PNG for each picture of a labelled patient, 1 inside a nodule and 0 elsewhere; it is
            called like the picture. None where no masks were asked for.
        boxes: the COCO file of the pictures of labelled patients, with a box of the class nodule around each nodule, or
            around two that overlap. None where no boxes were asked for.
    """

    folder: Path
    labels: Path
    images: int
    patients: int
    labelled_patients: int
    broken: tuple[str, str]
    masks: Path | None = None
    boxes: Path | None = None


def write_phantoms(
    folder: Path, patients: int = 140, seed: int = 0, masks: bool = False, boxes: bool = False
) -> Phantoms:
    """Draw a small data set: two to four pictures a patient, 96 to 160 pixels, 8, 12 or 16 bit; PNG, TIFF and JPEG.

    About half of the patients have the class nodule, in all their pictures; a quarter of the patients has no label. The
    first two pictures of a patient are study 1, the others study 2. Two files are broken on purpose: a PNG that ends in
    the middle, and a text that is called .png.

    Args:
        folder: made; must be absent or empty.
        patients: at least 2.
        seed: the same seed gives the same files.
        masks: write ``masks/`` too; all other files stay the same.
        boxes: write ``boxes.json`` too; all other files stay the same.

    Raises:
        OutputExistsError: ``folder`` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} holds something already; give another folder, or remove it first")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = folder / "masks" if masks else None
    if drawn is not None:
        drawn.mkdir()
    rows: list[tuple[str, str, str, str]] = []
    boxed: dict[str, tuple[tuple[int, int], Boxes]] = {}
    blank = set(rng(seed, 0, 0, "phantom blank").permutation(patients)[: round(_BLANK_SHARE * patients)].tolist())
    for number in range(patients):
        stream = rng(seed, 0, number, "phantom patient")
        lesion = (number + seed) % 2 == 1
        body = anatomy(stream, lesion)
        label = "" if number in blank else CLASSES[lesion]
        for picture in range(int(stream.integers(2, 5))):
            path, nodules = _write_one(images, len(rows), stream, body, None if number in blank else drawn)
            if boxes and number not in blank:
                boxed[f"images/{path.name}"] = nodules.shape, boxes_around(nodules)
            rows.append((f"images/{path.name}", f"P{number + 1:04d}", label, str(1 + picture // 2)))
    broken = _write_broken(images, images / Path(rows[0][0]).name)
    rows.extend((f"images/{name}", f"P{number + 1:04d}", "", "") for number, name in enumerate(broken))
    labels = folder / "labels.csv"
    with write_atomically(labels) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "patient", "label:finding", "meta:study"))
        writer.writerows(rows)
    coco = folder / "boxes.json" if boxes else None
    if coco is not None:
        write_coco(coco, boxed, CLASSES[1:])
    names = (f"images/{broken[0]}", f"images/{broken[1]}")
    return Phantoms(folder, labels, len(rows) - 2, patients, patients - len(blank), names, drawn, coco)


def phantom(
    stream: np.random.Generator, size: tuple[int, int], lesion: bool = False, body: Anatomy | None = None
) -> npt.NDArray[np.uint16]:
    """One picture of ``size`` (rows, columns), values over most of 0 to 65535; bright is dense, as in a radiograph.

    Args:
        stream: pose, exposure and noise are drawn from it, and the anatomy when ``body`` is None.
        size: rows and columns, at least 32 each.
        lesion: whether a patient drawn here has nodules; ``body`` has its own.
        body: the patient.
    """
    return _drawn(stream, size, body or anatomy(stream, lesion))[0]


def phantom_with_mask(
    stream: np.random.Generator, size: tuple[int, int], lesion: bool = False, body: Anatomy | None = None
) -> tuple[npt.NDArray[np.uint16], Mask]:
    """The picture that `phantom` draws, and where its nodules are: (rows, columns) uint8, 1 within their radius."""
    return _drawn(stream, size, body or anatomy(stream, lesion))


def _drawn(stream: np.random.Generator, size: tuple[int, int], body: Anatomy) -> tuple[npt.NDArray[np.uint16], Mask]:
    x, y = _grid(stream, size)
    dense, nodules = _attenuation(body, x, y, stream)
    dense = _blur(dense, stream.uniform(0.4, 0.8) * min(size) / 128)
    dense = dense + _noise(stream, size, stream.uniform(0.006, 0.02))
    exposure, gamma = stream.uniform(0.8, 1.1), stream.uniform(0.8, 1.25)
    low, high = stream.uniform(0.0, 0.08), stream.uniform(0.85, 1.0)
    unit = low + (high - low) * np.clip(dense * exposure / 1.6, 0, 1) ** gamma
    return np.asarray(np.round(unit * 65535), dtype=np.uint16), nodules


def anatomy(stream: np.random.Generator, lesion: bool) -> Anatomy:
    """Draw one patient."""
    draw = stream.uniform
    width = draw(0.30, 0.36)
    lungs = tuple(
        (side * draw(0.37, 0.42), draw(-0.12, -0.02), width * draw(0.92, 1.06), draw(0.56, 0.68)) for side in (-1, 1)
    )
    nodules = tuple(
        (draw(-0.6, 0.6), draw(-0.65, 0.65), int(stream.integers(2)), draw(*_NODULE_RADIUS), draw(*_NODULE_DENSITY))
        for _ in range(int(stream.integers(1, 3)))
    )
    return Anatomy(
        body=draw(0.86, 0.97),
        lungs=lungs,
        heart=(draw(0.10, 0.18), draw(0.25, 0.35), draw(0.24, 0.34), draw(0.26, 0.36)),
        ribs=(draw(-0.85, -0.75), draw(0.17, 0.21), draw(0.20, 0.35), draw(0.026, 0.036)),
        rib_density=draw(0.10, 0.18),
        spine=draw(0.28, 0.40),
        vessels=draw(0.03, 0.07),
        texture=int(stream.integers(2**31)),
        nodules=nodules if lesion else (),
    )


def _grid(stream: np.random.Generator, size: tuple[int, int]) -> tuple[Plane, Plane]:
    """Body coordinates of every pixel: the pose is a small shift, turn and magnification."""
    rows, columns = size
    half = columns / 2
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    x = (x - columns / 2 + 0.5) / half - stream.uniform(-0.05, 0.05)
    y = (y - rows / 2 + 0.5) / (rows / 2) - stream.uniform(-0.05, 0.05)
    angle, zoom = stream.normal(0, 0.04), stream.uniform(0.94, 1.06)
    turned_x = (np.cos(angle) * x + np.sin(angle) * y) / zoom
    turned_y = (np.cos(angle) * y - np.sin(angle) * x) / zoom
    return turned_x.astype(np.float32), turned_y.astype(np.float32)


def _attenuation(body: Anatomy, x: Plane, y: Plane, stream: np.random.Generator) -> tuple[Plane, Mask]:
    """Soft tissue less the air of the lungs, plus bone, heart, vessels and nodules; and where the nodules are."""
    outline = _soft((np.abs(x) / body.body) ** 3 + (np.abs(y + 0.05) / 1.25) ** 6, 0.10)
    shoulders = _soft((x / 1.3) ** 2 + ((y - 1.3) / 0.55) ** 2, 0.15)
    air = [_soft(_ellipse(x, y, lung, tilt=0.12 * np.sign(lung[0])), 0.10) for lung in body.lungs]
    lungs = np.maximum(air[0], air[1])
    dense = 0.80 * np.maximum(outline, 0.6 * shoulders)
    dense -= 0.50 * lungs
    dense += 0.30 * _soft(_ellipse(x, y, body.heart), 0.12)
    dense += body.spine * np.exp(-((x / 0.10) ** 2)) * (1 + 0.15 * np.cos(2 * np.pi * y / 0.16))
    dense += body.rib_density * _ribs(body, x, y) * outline
    dense += body.vessels * _vessels(body.texture, x.shape) * lungs
    breath = stream.normal(0, 0.01, size=2)  # drawn without a nodule too: pose and noise must not depend on the class
    nodules = np.zeros(x.shape, np.uint8)
    for across, down, number, radius, density in body.nodules:
        centre_x, centre_y, half_width, half_height = body.lungs[number]
        centre_x += across * half_width + breath[0]
        centre_y += down * half_height + breath[1]
        aspect = x.shape[0] / x.shape[1]  # y is in half heights: round on the film, not in these coordinates
        distance = ((x - centre_x) ** 2 + ((y - centre_y) * aspect) ** 2) / radius**2
        dense += np.float32(density) * np.exp(-(distance**1.5))
        nodules[distance < 1] = 1  # within the radius, where it adds more than 1/e of its density
    return np.asarray(dense, dtype=np.float32), nodules


def _ellipse(x: Plane, y: Plane, shape: tuple[float, float, float, float], tilt: float = 0.0) -> Plane:
    """Squared distance from the middle, 1 on the edge; the top leans inwards by ``tilt``."""
    centre_x, centre_y, half_width, half_height = shape
    return np.asarray(((x - centre_x - tilt * (y - centre_y)) / half_width) ** 2 + ((y - centre_y) / half_height) ** 2)


def _soft(squared: Plane, edge: float) -> Plane:
    """1 inside, 0 outside of ``squared`` = 1, with a smooth edge."""
    return np.asarray(1 / (1 + np.exp(np.clip((squared - 1) / edge, -30, 30))))


def _ribs(body: Anatomy, x: Plane, y: Plane) -> Plane:
    """Arcs that fall towards the sides, nine a side, and the clavicles above them."""
    first, distance, drop, thickness = body.ribs
    across = np.abs(x)
    height = y - drop * across**2 - 0.25 * across
    phase = (height - first) / distance
    nearest = np.clip(np.round(phase), 0, 8)
    bars = np.exp(-(((phase - nearest) * distance / thickness) ** 2)) * (across > 0.08)
    clavicles = np.exp(-(((y + 0.72 + 0.18 * across) / 0.035) ** 2)) * (across < 0.75)
    return np.asarray(bars + 1.2 * clavicles)


def _vessels(seed: int, shape: tuple[int, ...]) -> Plane:
    """A branching-like pattern of the patient's own: ridges of smooth noise, on one grid for every size."""
    from scipy.ndimage import gaussian_filter, zoom

    field = gaussian_filter(np.random.Generator(np.random.Philox(seed)).standard_normal((64, 64)), 2.0)
    ridges = np.exp(-((field / (0.35 * field.std())) ** 2))
    return np.asarray(zoom(ridges, (shape[0] / 64, shape[1] / 64), order=1), dtype=np.float32)


def _blur(plane: Plane, sigma: float) -> Plane:
    from scipy.ndimage import gaussian_filter

    return np.asarray(gaussian_filter(plane, sigma), dtype=np.float32)


def _noise(stream: np.random.Generator, size: tuple[int, int], sigma: float) -> Plane:
    return np.float32(sigma) * stream.standard_normal(size, dtype=np.float32)


def _write_one(
    images: Path, number: int, stream: np.random.Generator, body: Anatomy, masks: Path | None
) -> tuple[Path, Mask]:
    pixels: np.ndarray[Any, np.dtype[Any]]
    pixels, nodules = _drawn(stream, _SIZES[stream.integers(len(_SIZES))], body)
    bits = int(stream.choice((8, 12, 16)))
    pixels = (pixels >> (16 - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    lot = stream.random()
    suffix = ".tif" if lot < 0.08 else ".jpg" if lot < 0.3 and bits == 8 else ".png"
    path = images / f"{number + 1:04d}{suffix}"
    write_image(path, pixels)
    if masks is not None:
        write_image(masks / f"{path.stem}.png", nodules)
    return path, nodules


def _write_broken(images: Path, good: Path) -> tuple[str, str]:
    from sslmed.data.readers import read

    truncated, text = images / "broken_truncated.png", images / "broken_text.png"
    write_image(truncated, read(good).pixels)
    content = truncated.read_bytes()
    truncated.write_bytes(content[: len(content) * 6 // 10])
    text.write_text("this is no picture\n", encoding="utf-8")
    return truncated.name, text.name
