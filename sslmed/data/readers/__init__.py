"""Files to scans. Whatever is wrong with a file, `scans` and `read` raise a `DataError`.

The content says which format a file has; each format has one module here. `refusal.one_error` is the one place that
turns whatever a format's module raises into that one error.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sslmed.data.readers import arrays, dicom, nifti, npz, raster, tiff
from sslmed.data.readers.dicom import is_dicom_file
from sslmed.data.readers.folder import SUFFIXES, Listing, find, listing
from sslmed.data.readers.refusal import BYTE_LIMIT, PIXEL_LIMIT, RefusedError, one_error, whole
from sslmed.data.readers.series import group, read_series, series_of
from sslmed.data.scan import Scan

__all__ = [
    "BYTE_LIMIT",
    "PIXEL_LIMIT",
    "SUFFIXES",
    "Listing",
    "find",
    "group",
    "is_dicom_file",
    "listing",
    "read",
    "read_series",
    "scans",
    "series_of",
]


def scans(path: Path) -> Iterator[Scan]:
    """Every scan of one file, in order; its content, not its suffix, says which format it is.

    A NIfTI file of several volumes and an ``.npz`` of many images give one after another, each with its ``part``, and
    hold no more than a few at a time; every other file gives one.

    The EXIF or TIFF orientation is applied: every viewer shows the picture turned, so labels, masks and boxes are drawn
    on the turned picture, and a policy about left and right means nothing on an unturned one. Grey with a palette or
    with three equal channels stays RGB here: the modality decides. An alpha channel is dropped when it is opaque. What
    becomes of each format is told in docs/readers.md.

    Raises:
        DataError: while iterating, also midway: the file cannot be read, is damaged, truncated, empty, too large or of
            a kind that is not supported.
        MissingDependencyError: the file may be good, but a library that it needs is not installed. That is no reason to
            go on without it in silence.
    """
    with one_error(path):
        yield from _found(path)[1]


def read(path: Path) -> Scan:
    """Read a file of one scan; see `scans`.

    Raises:
        DataError: as `scans`; or the file holds several.
        MissingDependencyError: as `scans`.
    """
    with one_error(path):
        several, found = _found(path)
        if several:
            raise RefusedError(f"holds {several}, and one is expected; save each by itself")
        return next(found)


def _found(path: Path) -> tuple[str, Iterator[Scan]]:
    """How many scans of what there are, "" for one, and the scans."""
    with path.open("rb") as file:
        if npz.is_npz(file.read(4)):
            return npz.npz(path)  # may be larger than memory: never read whole
    content = whole(path)
    one = _one(content, path)
    if one is None and nifti.is_nifti(content):
        return nifti.nifti(content, path)
    if one is None:
        raise RefusedError("is no PNG, JPEG or TIFF, nor DICOM, NIfTI or NumPy array, whatever its name says")
    return "", iter([one])


def _one(content: bytes, path: Path) -> Scan | None:
    """The scan of a format that holds one; None where the content is of no such format."""
    if not content:
        raise RefusedError("is empty")
    if content.startswith(raster.PNG_MAGIC):
        return Scan(np.ascontiguousarray(raster.png(content)), None, path)
    if content.startswith(raster.JPEG_MAGIC):
        return Scan(np.ascontiguousarray(raster.jpeg(content)), None, path)
    if dicom.is_dicom(content):  # before TIFF: a DICOM preamble may hold a TIFF header (PS3.10, 7.1)
        return dicom.dicom(content, path)
    if content.startswith(tiff.TIFF_MAGIC):
        return tiff.tiff(content, path)
    if content.startswith(arrays.NPY_MAGIC):
        return arrays.npy(content, path)
    return None
