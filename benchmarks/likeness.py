"""How near copies and strangers are by the perceptual hash of `sslmed ingest --check`; the numbers of docs/checks.md.

    python benchmarks/likeness.py ../shared/data

Copies: every picture of four sets (of the radiographs every twelfth) saved as JPEG, at half its size, with other tones.
Strangers: how many of all radiographs have another patient's within so many bits.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sslmed.data.checks.likeness import MOST, image_hash, survey
from sslmed.data.readers import find, read
from sslmed.data.sources.labels import read_labels

Pixels = np.ndarray[Any, np.dtype[Any]]
SETS = {"xray_pneumonia/images": 12, "blood_cells/images": 1, "ultrasound_nerve/images": 1, "histology_lung": 1}


def jpeg(quality: int) -> Callable[[Pixels], Pixels]:
    def coded(pixels: Pixels) -> Pixels:
        return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)

    return coded


def half(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    return np.asarray(cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA))


COPIES: dict[str, Callable[[Pixels], Pixels]] = {
    "12 bits, signed": lambda pixels: pixels.astype(np.int16) * 16 - 1024,
    "JPEG quality 90": jpeg(90),
    "JPEG quality 75": jpeg(75),
    "JPEG quality 50": jpeg(50),
    "half the size": half,
    "half, quality 75": lambda pixels: jpeg(75)(half(pixels)),
    "gamma 1.2": lambda pixels: np.rint(255 * (pixels / 255.0) ** 1.2).astype(np.uint8),
    "2 pixels cut off": lambda pixels: pixels[2:-2, 2:-2],
}


def main(data: Path) -> None:
    pictures = [read(path).pixels for name, step in SETS.items() for path in find(data / name)[::step]]
    print(f"share of copies of {len(pictures)} pictures within {MOST} bits")
    for name, change in COPIES.items():
        bits = [(image_hash(pixels) ^ image_hash(change(pixels))).bit_count() for pixels in pictures]
        print(f"  {name:18} {np.mean(np.array(bits) <= MOST):.3f}")
    folder = data / "xray_pneumonia"
    rows = read_labels(folder / "labels.csv", folder, ["label"]).rows
    hashes = np.array([image_hash(read(folder / name).pixels) for name in rows], np.uint64)
    patients = np.unique([row.patient for row in rows.values()], return_inverse=True)[1]
    print(f"share of {len(rows)} radiographs with another patient's within so many bits")
    for most in (2, 3, 4, 6, 8):
        print(f"  {most} {survey(hashes, patients, most).images / len(rows):.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
