"""NIfTI-1 and NIfTI-2 files, plain or gzipped, to volumes, one after another where a file holds several.

nibabel reads the header; the bytes are unpacked here under a limit, so that a file that inflates without end is
refused.
"""

import gzip
import logging
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.data.readers.refusal import DEFLATE_RATIO, Pixels, RefusedError, check_bytes, check_size
from sslmed.data.scan import NiftiGrid, Scan

GZIP_MAGIC = b"\x1f\x8b"
_MAGIC = {344: (b"n+1\0",), 4: (b"n+2\0\r\n\x1a\n",)}  # offset in the header -> magic of a single file
_PAIR = {344: (b"ni1\0",), 4: (b"ni2\0\r\n\x1a\n",)}
_HEADER = 540  # of NIfTI-2, the longer one
MOST_VOLUMES = 10_000  # of one file; without an end, a few kilobytes of gzip would hold 10^9 volumes of one voxel
_KINDS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8")


def is_nifti(content: bytes) -> bool:
    """The magic of a NIfTI file, perhaps inside gzip."""
    head = _head(content)
    return any(
        head[place : place + len(word)] == word
        for magic in (_MAGIC, _PAIR)
        for place, words in magic.items()
        for word in words
    )


def _head(content: bytes) -> bytes:
    if not content.startswith(GZIP_MAGIC):
        return content[:_HEADER]
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(content[: 2**16], _HEADER)
    except zlib.error:
        return b""


def nifti(content: bytes, path: Path) -> tuple[str, Iterator[Scan]]:
    """The volumes, and how many of several there are ("4 volumes").

    A volume is (D, H, W) in canonical orientation: W grows to the patient's right, H to the front, D to the head.
    Values are scaled by slope and intercept: int16 or uint16 where the file holds such (or bytes) unscaled, else
    float32. The volumes of a fourth dimension (time, direction, echo) have one geometry and "0", "1", ... for part.

    Raises:
        RefusedError: no geometry (neither sform nor qform), other dimensions, colours, complex numbers, a header
            without its image beside it, claims beyond the file or the limits; while iterating: NaN, infinity.
    """
    import nibabel
    from nibabel.orientations import io_orientation

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)  # what it would log ends in the refusal
    head = _head(content)
    if any(head[place : place + len(word)] == word for place, words in _PAIR.items() for word in words):
        raise RefusedError("is a NIfTI header whose image lies in another file; save both as one .nii")
    two = head[4:12] in _MAGIC[4]
    kind: Any = nibabel.Nifti2Image if two else nibabel.Nifti1Image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = kind.header_class.from_fileobj(BytesIO(head), check=False)
        shape, count, dtype, offset = _claims(header)
        size = offset + count * int(np.prod(shape, dtype=object)) * dtype.itemsize
        check_bytes(size)
        whole = _unpacked(content, size)
        if len(whole) < size:
            raise RefusedError(f"is truncated: {size} bytes are claimed, {len(whole)} are there")
        fields, matrix, scale = _fields(header), _affine(header), header.get_slope_inter()
        grid = NiftiGrid(shape, io_orientation(matrix).astype(np.int8), fields)
    stored = np.frombuffer(whole, dtype, count * int(np.prod(shape)), offset).reshape((*shape, count), order="F")
    parts = [str(number) for number in range(count)] if count > 1 else [""]
    found = (
        _canonical(_scaled(stored[..., number], *scale), matrix, grid, path, part) for number, part in enumerate(parts)
    )
    return f"{count} volumes" if count > 1 else "", found


def _claims(header: Any) -> tuple[tuple[int, int, int], int, np.dtype[Any], int]:
    """The shape of a volume, how many there are, their dtype, and where the first begins."""
    shape = tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not 3 <= len(shape) <= 4:
        raise RefusedError(
            f"has {len(shape)} dimensions ({' x '.join(map(str, shape))}); allowed: 3, or 4 for several volumes"
        )
    check_size(*shape[:3])
    count = shape[3] if len(shape) == 4 else 1
    if not 1 <= count <= MOST_VOLUMES:
        raise RefusedError(f"claims {count} volumes; allowed: 1 to {MOST_VOLUMES}")
    dtype = header.get_data_dtype()
    if dtype.newbyteorder("=").str[1:] not in _KINDS:
        raise RefusedError(f"holds {dtype}; allowed: integers of 8, 16 or 32 bits and floats of 32 or 64")
    offset = float(header["vox_offset"])
    if not 0 < offset < 2**24:
        raise RefusedError(f"puts its values at byte {offset:g}")
    return (shape[0], shape[1], shape[2]), count, dtype, int(offset)


def _fields(header: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What a `NiftiGrid` keeps of a header."""
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")
    codes = [header["qform_code"], header["sform_code"], header["xyzt_units"]]
    given = [*codes, header["pixdim"][:4], *(header[name] for name in names)]
    return np.concatenate([np.asarray(one, np.float64).reshape(-1) for one in given])


def _unpacked(content: bytes, size: int) -> bytes:
    if not content.startswith(GZIP_MAGIC):
        return content
    if size > DEFLATE_RATIO * len(content):
        raise RefusedError(f"claims {size} bytes, more than its {len(content)} can hold")
    with gzip.open(BytesIO(content)) as file:
        whole = file.read(size)
        while file.read(2**20):  # to the end: gzip's checksum stands there
            if file.tell() > 2 * size + 2**20:
                raise RefusedError(f"inflates to more than twice the {size} bytes that it claims")
        return whole


def _scaled(volume: Pixels, slope: float | None, intercept: float | None) -> Pixels:
    if slope is None or intercept is None or (slope == 1 and intercept == 0):
        if volume.dtype.kind in "ui" and volume.dtype.itemsize <= 2:
            small = volume.dtype.newbyteorder("=")
            return volume.astype(np.int16 if small == np.int8 else small)
        slope, intercept = 1.0, 0.0
    if not np.isfinite([slope, intercept]).all():
        raise RefusedError(f"has a slope of {slope} and an intercept of {intercept}")
    with np.errstate(all="ignore"):  # what overflows is seen below
        values = volume.astype(np.float64) * slope + intercept
    bad = ~np.isfinite(values)
    if bad.any():
        raise RefusedError(f"has {int(bad.sum())} values that are NaN or infinite")
    if np.abs(values).max() > np.finfo(np.float32).max:
        raise RefusedError("has values beyond the range of 32-bit floats")
    return values.astype(np.float32)


def _affine(header: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if int(header["sform_code"]) > 0:
        matrix = header.get_sform()
    elif int(header["qform_code"]) > 0:
        if header["pixdim"][0] == 0:  # means 1 (nifti1.h, "METHOD 2")
            header["pixdim"][0] = 1
        matrix = header.get_qform()
    else:
        raise RefusedError("does not say how its axes lie in the patient: both qform and sform codes are 0")
    matrix = np.array(matrix, np.float64)
    sides = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or sides.min() <= 0 or abs(np.linalg.det(matrix[:3, :3] / sides)) < 0.01:
        raise RefusedError("has an affine that is no geometry: axes of no length, or in one plane")
    unit = header.get_xyzt_units()[0]
    matrix[:3] *= {"meter": 1e3, "micron": 1e-3}.get(unit, 1.0)
    return matrix


def _canonical(
    values: Pixels, matrix: np.ndarray[Any, np.dtype[np.float64]], grid: NiftiGrid, path: Path, part: str
) -> Scan:
    """Axes (i, j, k) of the file to (d, h, w) = (to the head, to the front, to the right), as near as they are."""
    from nibabel.orientations import aff2axcodes, apply_orientation, inv_ornt_aff

    right_front_head = apply_orientation(values, grid.turn)
    turned = (matrix @ inv_ornt_aff(grid.turn, values.shape))[:, [2, 1, 0, 3]]
    return Scan(
        np.ascontiguousarray(right_front_head.transpose(2, 1, 0)),
        tuple(float(side) for side in np.linalg.norm(turned[:3, :3], axis=0)),
        path,
        kind="volume",
        affine=turned,
        part=part,
        orientation="".join(str(letter) for letter in aff2axcodes(matrix)),
        grid=grid,
    )
