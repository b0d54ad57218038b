"""Pixels to PNG, JPEG, TIFF and NIfTI files, whole or not at all."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.data.scan import NiftiGrid
from sslmed.durable import write_atomically

JPEG_QUALITY = 95


def write_image(path: Path, pixels: np.ndarray[Any, np.dtype[Any]]) -> None:
    """Write (H, W) grey or (H, W, 3) RGB pixels; the suffix of ``path`` says the format.

    PNG and TIFF keep uint8 and uint16 exactly; JPEG takes uint8 and loses a little.

    Raises:
        ValueError: a shape, dtype or suffix that the format cannot hold.
        DiskError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    grey_or_rgb = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    depths = ("uint8",) if suffix in (".jpg", ".jpeg") else ("uint8", "uint16")
    if not grey_or_rgb or pixels.dtype.name not in depths:
        allowed = f"(H, W) or (H, W, 3) of {' or '.join(depths)}"
        raise ValueError(f"{path.name} holds {allowed}, not {pixels.shape} {pixels.dtype}")
    if suffix in (".tif", ".tiff"):
        _write_tiff(path, pixels)
    elif suffix in (".png", ".jpg", ".jpeg"):
        _write_cv2(path, pixels, suffix)
    else:
        raise ValueError(f"{path.name}: allowed suffixes are .png, .jpg, .jpeg, .tif and .tiff")


def write_nifti(
    path: Path,
    values: np.ndarray[Any, np.dtype[Any]],
    grid: NiftiGrid | None = None,
    affine: np.ndarray[Any, np.dtype[np.float64]] | None = None,
) -> None:
    """Write a volume (D, H, W) of uint8, int16 or float32 where its source lies; ``.nii.gz`` is gzipped.

    With ``grid``, (d, h, w) are the canonical axes that a NIfTI scan has: they are turned back to the axes of its
    file, and qform, sform, their codes, pixdim and units are those of the file bit for bit. Without it, ``affine``
    becomes the sform (code 1, scanner coordinates; NIfTI keeps it in 32-bit floats), i along w, j along h, k along d.
    NIfTI-1, or NIfTI-2 where the source is one whose numbers or sides only that holds. Equal content makes equal files.

    Args:
        grid: of the scan that the values belong to.
        affine: (4, 4) from (d, h, w, 1) to mm in RAS+; of no use beside ``grid``.

    Raises:
        ValueError: another shape or dtype, a suffix that is not ``.nii`` or ``.nii.gz``, neither grid nor affine.
        DiskError: the file cannot be written.
    """
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path.name}: allowed suffixes are .nii and .nii.gz")
    if values.ndim != 3 or values.dtype.name not in ("uint8", "int16", "float32"):
        raise ValueError(f"{path.name} holds (D, H, W) of uint8, int16 or float32, not {values.shape} {values.dtype}")
    if grid is not None:
        voxels, fields = _in_file_axes(values, grid, path), grid.fields
    elif affine is not None:
        voxels, fields = values.transpose(2, 1, 0), _fields_of(affine)
    else:
        raise ValueError(f"{path.name}: a NIfTI file needs a grid or an affine; without, its voxels lie nowhere")
    native = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False)
    with write_atomically(path) as partial, partial.open("wb") as raw:
        # No name and no time in the gzip header, so that equal volumes are equal files.
        file = gzip.GzipFile("", "wb", 6, raw, mtime=0) if name.endswith(".gz") else raw
        file.write(_header(native, fields))
        for plane in np.moveaxis(native, 2, 0):  # one at a time: i runs fastest in the file
            file.write(plane.tobytes(order="F"))
        if file is not raw:
            file.close()


def _in_file_axes(
    values: np.ndarray[Any, np.dtype[Any]], grid: NiftiGrid, path: Path
) -> np.ndarray[Any, np.dtype[Any]]:
    """(d, h, w) = (head, front, right) to (i, j, k)."""
    right_front_head = values.transpose(2, 1, 0)
    voxels = right_front_head.transpose([int(axis) for axis in grid.turn[:, 0]])
    if voxels.shape != tuple(grid.shape):
        raise ValueError(f"{path.name}: {values.shape} values do not fill a grid of {grid.shape} voxels (i, j, k)")
    return voxels[tuple(slice(None, None, int(sign)) for sign in grid.turn[:, 1])]


def _fields_of(affine: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`NiftiGrid.fields` of an affine for (d, h, w): in mm, no qform."""
    matrix = affine[:, [2, 1, 0, 3]]
    sides = np.linalg.norm(matrix[:3, :3], axis=0)
    fields = np.concatenate([[0, 1, 2, 1], sides, np.zeros(6), matrix[:3].reshape(-1)])
    return fields.astype(np.float32).astype(np.float64)  # as NIfTI-1 keeps it: 1e-5 mm


def _header(voxels: np.ndarray[Any, np.dtype[Any]], fields: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    """The header and the four bytes that say that no extension follows."""
    import nibabel

    with np.errstate(over="ignore"):
        exact = np.array_equal(fields.astype(np.float32).astype(np.float64), fields, equal_nan=True)
    small = max(voxels.shape) < 2**15
    two = not small or not exact
    kind: Any = nibabel.Nifti2Header if two else nibabel.Nifti1Header
    header = kind(endianness="<")
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in zip(("qform_code", "sform_code", "xyzt_units"), fields[:3], strict=True):
        header[name] = int(value)
    header["pixdim"][:4] = fields[3:7]
    names = ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
    for name, value in zip(names, fields[7:13], strict=True):
        header[name] = value
    for name, row in zip(("srow_x", "srow_y", "srow_z"), fields[13:].reshape(3, 4), strict=True):
        header[name] = row
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    return bytes(header.binaryblock) + bytes(4)


def _write_tiff(path: Path, pixels: np.ndarray[Any, np.dtype[Any]]) -> None:
    import tifffile

    with write_atomically(path) as partial:
        tifffile.imwrite(partial, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", compression="zlib")


def _write_cv2(path: Path, pixels: np.ndarray[Any, np.dtype[Any]], suffix: str) -> None:
    import cv2

    options = [] if suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, encoded = cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels, options)
    if not done:
        raise ValueError(f"{path.name}: the encoder refused {pixels.shape} {pixels.dtype}")
    with write_atomically(path) as partial:
        partial.write_bytes(encoded.tobytes())
