"""NumPy arrays to images and volumes: what a shape and a dtype mean.

An array says nothing of itself but these two. A last axis of three unsigned values of 8 or 16 bits is colour; other
three axes are a volume, which lies nowhere. Arrays of Python objects are pickles, which would be run: never loaded.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sslmed.data.readers.refusal import Pixels, RefusedError, check_size
from sslmed.data.scan import Scan

NPY_MAGIC = b"\x93NUMPY"
_AS_IS = ("u1", "u2", "i2", "f4")
_COLOUR = (np.uint8, np.uint16)
_FEW = 16  # a last axis of 1, 2 or 4 after longer ones than this is channels


@dataclass(frozen=True)
class Claim:
    """What the header of an array says of it.

    Attributes:
        shape: sides, each at least 1.
        dtype: of numbers or truth values.
        fortran: whether the first axis runs fastest.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def claim(file: BinaryIO) -> Claim:
    """Read the header of an ``.npy`` file and stop where the values begin.

    Raises:
        RefusedError: Python objects, records or texts; no value at all.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise RefusedError(f"is an array of .npy version {version}; save it with numpy.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise RefusedError("holds Python objects, which are never loaded; save an array of numbers")
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise RefusedError(f"holds {dtype}; allowed: integers and floats of at most 64 bits, and truth values")
    if not shape or min(shape) < 1:
        raise RefusedError(f"holds an array of shape {shape}")
    return Claim(tuple(int(side) for side in shape), dtype, bool(fortran))


def npy(content: bytes, path: Path) -> Scan:
    """The scan that one array is; see `scan_of`."""
    file = BytesIO(content)
    found = claim(file)
    start = file.tell()
    check_size(*found.shape)
    if found.bytes != len(content) - start:
        raise RefusedError(
            f"is damaged: an array of {found.bytes} bytes is claimed, {len(content) - start} bytes are there"
        )
    return scan_of(array(content[start:], found), path)


def array(values: bytes, found: Claim) -> Pixels:
    """The claimed array of so many bytes."""
    return np.frombuffer(values, found.dtype).reshape(found.shape, order="F" if found.fortran else "C")


def scan_of(values: Pixels, path: Path, **known: Any) -> Scan:
    """(H, W), (H, W, 1) or, of unsigned 8 or 16 bits, (H, W, 3) as an image; other (D, H, W) as a volume.

    Args:
        known: other attributes of the scan.

    Raises:
        RefusedError: another shape, values that are not finite or do not fit a scan.
    """
    native = values.dtype.newbyteorder("=")
    if values.ndim not in (2, 3):
        raise RefusedError(f"holds an array of shape {values.shape}; allowed: (H, W), (H, W, 3) or (D, H, W)")
    channels = values.shape[2] if values.ndim == 3 else 0
    if channels == 3 and native not in _COLOUR:
        raise RefusedError(f"has a last axis of 3 in {native}; colours are uint8 or uint16")
    if channels in (2, 4) and min(values.shape[:2]) > _FEW:
        raise RefusedError(f"has a last axis of {channels}; allowed: 3 colours, or the columns of a volume")
    if channels == 1:
        values, channels = values[..., 0], 0
    volume = values.ndim == 3 and channels != 3
    return Scan(np.ascontiguousarray(_compact(values)), None, path, kind="volume" if volume else "image", **known)


def _compact(values: Pixels) -> Pixels:
    """In a dtype of a scan, without loss but of digits that a 32-bit float does not have."""
    native = values.dtype.newbyteorder("=")
    if native.kind == "f":
        if not np.isfinite(values).all():
            raise RefusedError(f"has {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
        if np.abs(values).max() > np.finfo(np.float32).max:
            raise RefusedError("has values beyond the range of 32-bit floats")
        return values.astype(np.float32)
    if native.str[1:] in _AS_IS:
        return values.astype(native)
    if native.kind == "b":
        return values.astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    for kind in (np.int16,) if native == np.int8 else (np.uint16, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    raise RefusedError(f"has values from {low} to {high} in {native}; allowed: what fits 16 bits, or float32")
