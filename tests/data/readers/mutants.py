"""Reads mutated files, in a process of its own that lives through all of them.

Each line on standard input, "READER FIRST LAST", is answered by one line of JSON: how many files gave scans and how
many were refused, the longest time in seconds, the memory in MB by which the process has ever grown since it had read
one clean file of each kind, and what went wrong.
"""

import gzip
import io
import json
import random
import resource
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pydicom
import tifffile

from sslmed.config import DataError, MissingDependencyError
from sslmed.data.readers import scans, series_of

DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
NIFTI = Path(nibabel.__file__).parent / "tests" / "data"
RNG = np.random.default_rng(0)
NATIVE = (
    *("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "image_dfl.dcm", "CT_small.dcm"),
    *("examples_palette.dcm", "SC_rgb_small_odd.dcm", "dicomdirtests/77654033/CR1/6154"),
)
COMPRESSED = (
    *("MR_small_RLE.dcm", "SC_rgb_rle_2frame.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm"),
    *("SC_rgb_jpeg_gdcm.dcm", "JPGExtended.dcm", "SC_rgb_jpeg_dcmtk.dcm", "JPEGLSNearLossless_16.dcm", "693_J2KI.dcm"),
)
LENGTHS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\0\0", b"\1\0\0\0", b"\0\0\0\x10")


def sources() -> dict[str, list[bytes]]:
    grey = RNG.integers(0, 4096, (40, 56)).astype(np.uint16)
    colour = RNG.integers(0, 256, (40, 56, 3)).astype(np.uint8)
    smooth = (np.add.outer(np.arange(40), np.arange(56)) * 2).astype(np.uint8)
    return {
        "png": [_cv2(".png", grey), _cv2(".png", colour), _cv2(".png", np.dstack([colour, colour[..., :1] | 255]))],
        "jpeg": [
            _cv2(".jpg", smooth),
            _cv2(".jpg", colour),
            _cv2(".jpg", smooth, cv2.IMWRITE_JPEG_PROGRESSIVE),
            _cv2(".jpg", smooth, cv2.IMWRITE_JPEG_RST_INTERVAL),
        ],
        "tiff": list(_tiffs(grey, colour)),
        "dicom_native": [(DICOM / name).read_bytes() for name in NATIVE],
        "dicom_compressed": [(DICOM / name).read_bytes() for name in COMPRESSED],
        "nifti": [(NIFTI / "anatomical.nii").read_bytes(), _volumes(), _volumes(nibabel.Nifti2Image)],
        "nifti_gz": [(NIFTI / "standard.nii.gz").read_bytes(), gzip.compress(_volumes())],
        "npy": [_npy(grey), _npy(colour), _npy(np.asfortranarray(RNG.normal(size=(4, 5, 6))))],
        "npz": [_npz(colour), _npz(grey.astype(np.int16))],
    }


def _cv2(suffix: str, pixels: np.ndarray, *options: int) -> bytes:
    return cv2.imencode(suffix, pixels, [option for name in options for option in (name, 1)])[1].tobytes()


def _tiffs(grey: np.ndarray, colour: np.ndarray) -> Iterator[bytes]:
    stack = np.stack([grey, grey + 1, grey + 2])
    for pixels, options in (
        (grey, {"compression": "zlib"}),
        (colour, {"photometric": "rgb"}),
        (stack, {"photometric": "minisblack", "rowsperstrip": 8}),
        (stack.astype(np.float32), {"photometric": "minisblack", "bigtiff": True, "byteorder": ">"}),
        (stack, {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.5}}),
        (stack.astype(np.int16), {"imagej": True, "metadata": {"axes": "TYX", "unit": "um"}}),
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, **options)
        yield file.getvalue()


def _volumes(kind: Any = nibabel.Nifti1Image) -> bytes:
    affine = np.diag([-2.0, 3, 4, 1])
    return kind(RNG.integers(0, 900, (6, 7, 8, 3)).astype(np.int16), affine).to_bytes()


def _npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _npz(each: np.ndarray) -> bytes:
    file = io.BytesIO()
    members = {}
    for split in ("train", "val", "test"):
        members[f"{split}_images"] = np.stack([each] * 4)
        members[f"{split}_labels"] = np.arange(4)[:, None]
    np.savez_compressed(file, **members)
    return file.getvalue()


def mutated(content: bytes, stream: random.Random) -> bytes:
    """One to four flips, insertions, deletions, cuts or overwritten lengths, half of them near the start."""
    changed = bytearray(content)
    for _ in range(stream.randint(1, 4)):
        place = int(len(changed) * stream.random() * (0.1 if stream.random() < 0.5 else 1))
        kind = stream.choice(("flip", "insert", "delete", "truncate", "length"))
        if kind == "flip" and place < len(changed):
            changed[place] ^= stream.randint(1, 255)
        elif kind == "insert":
            changed[place:place] = bytes([stream.randint(0, 255)]) * stream.randint(1, 5)
        elif kind == "delete":
            del changed[place : place + stream.randint(1, 9)]
        elif kind == "truncate" and stream.random() < 0.3:
            del changed[place:]
        elif kind == "length":
            changed[place // 2 * 2 : place // 2 * 2 + 4] = stream.choice(LENGTHS)
    return bytes(changed)


def mutated_inside(content: bytes, stream: random.Random) -> bytes:
    """Packed again after the mutation, so that the checksum is right and the reader gets to see it."""
    if content.startswith(b"\x1f\x8b"):
        return gzip.compress(mutated(gzip.decompress(content), stream), 1)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        chosen = stream.choice(names)
        for name in names:
            values = old.read(name)
            new.writestr(name, mutated(values[:200], stream) + values[200:] if name == chosen else values)
    return file.getvalue()


def mutants(reader: str, contents: list[bytes], first: int, last: int) -> Iterator[bytes]:
    for number in range(first, last):
        stream = random.Random(f"{reader} {number}")
        content = stream.choice(contents)
        inside = reader in ("nifti_gz", "npz") and stream.random() < 0.5
        yield (mutated_inside if inside else mutated)(content, stream)


def attack(path: Path) -> str:
    """What became of a file: "scans" or "refused"; anything else is raised."""
    said = ""
    try:
        if path.suffix == ".dicom":
            series_of(path)
        for scan in scans(path):
            assert scan.pixels.dtype in (np.uint8, np.uint16, np.int16, np.float32), scan.pixels.dtype
            assert scan.pixels.dtype.isnative
            assert np.isfinite(scan.pixels).all()
            assert scan.spacing is None or (min(scan.spacing) > 0 and np.isfinite(scan.spacing).all())
    except (DataError, MissingDependencyError) as error:
        said = str(error)
    assert not said or str(path) in said, said
    assert len(said) < 600, said
    return "refused" if said else "scans"


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(folder: Path, ask: Callable[[], str], answer: Callable[[str], Any]) -> None:
    everything = sources()
    for reader, contents in everything.items():
        for content in contents:
            path = folder / f"clean.{reader.split('_')[0]}"
            path.write_bytes(content)
            assert attack(path) == "scans", reader
    start = memory()
    while line := ask().split():
        reader, first, last = line[0], int(line[1]), int(line[2])
        path = folder / f"mutant.{reader.split('_')[0]}"
        report: dict[str, Any] = {"scans": 0, "refused": 0, "slowest": 0.0, "wrong": []}
        for number, content in enumerate(mutants(reader, everything[reader], first, last), start=first):
            path.write_bytes(content)
            began = time.monotonic()
            try:
                report[attack(path)] += 1
            except Exception:
                report["wrong"].append(f"{reader} {number}: {traceback.format_exc(limit=-3)}")
            report["slowest"] = max(report["slowest"], time.monotonic() - began)
        answer(json.dumps(report | {"grown": memory() - start}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        serve(Path(name), sys.stdin.readline, lambda text: print(text, flush=True))
