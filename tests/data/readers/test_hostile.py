"""Mutated files: a reader ends with a scan or with a DataError, soon, and in no other way."""

import random
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from sslmed.config import DataError
from sslmed.data.readers import read

_DICOM = Path(pydicom.__file__).parent / "data" / "test_files"
_NIFTI = Path(nibabel.__file__).parent / "tests" / "data"
READERS = {
    "dicom": [
        _DICOM / name
        for name in (
            "MR_small.dcm",
            "MR_small_bigendian.dcm",
            "MR_small_RLE.dcm",
            "MR_small_jp2klossless.dcm",
            "MR_small_jpeg_ls_lossless.dcm",
            "SC_rgb_jpeg_gdcm.dcm",
            "JPGExtended.dcm",
            "SC_rgb_jpeg_dcmtk.dcm",
            "SC_rgb_rle_2frame.dcm",
            "dicomdirtests/77654033/CR1/6154",
        )
    ],
    "nifti": [_NIFTI / "standard.nii.gz", _NIFTI / "anatomical.nii"],
}
LENGTHS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff\xff\0\0", b"\1\0\0\0")


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


def attack(path: Path, reader: str, number: int) -> None:
    stream = random.Random(f"{reader} {number}")
    source = stream.choice(READERS[reader])
    path.write_bytes(mutated(source.read_bytes(), stream))
    started = time.monotonic()
    said = str(path)
    try:
        scan = read(path)
    except DataError as error:
        said = str(error)
    else:
        assert scan.pixels.dtype in (np.uint8, np.uint16, np.int16, np.float32)
        assert np.isfinite(scan.pixels).all()
    assert time.monotonic() - started < 2
    assert str(path) in said
    assert len(said) < 600


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files(tmp_path: Path, reader: str) -> None:
    for number in range(300):
        attack(tmp_path / "a", reader, number)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_more_mutated_files(tmp_path: Path, reader: str) -> None:
    for number in range(300, 2300):
        attack(tmp_path / "a", reader, number)
