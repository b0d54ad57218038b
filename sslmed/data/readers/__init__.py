"""Files to scans. Whatever is wrong with a file, `read` raises a `DataError`.

The content says which format a file has; each format has one module here. `refusal.one_error` is the one place that
turns whatever a format's module raises into that one error.
"""

import os
from pathlib import Path

import numpy as np

from sslmed.config import DataError, MissingInputError
from sslmed.data.readers import dicom, nifti, raster, tiff
from sslmed.data.readers.refusal import BYTE_LIMIT, PIXEL_LIMIT, RefusedError, one_error
from sslmed.data.readers.series import group, read_series
from sslmed.data.scan import Scan

__all__ = ["BYTE_LIMIT", "PIXEL_LIMIT", "SUFFIXES", "find", "group", "listing", "read", "read_series"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm"})


def find(source: Path) -> list[Path]:
    """The files under ``source`` that a reader knows, sorted; see `listing`."""
    return listing(source)[0]


def listing(source: Path) -> tuple[list[Path], list[Path]]:
    """The files under a folder, or the one file, as (readable by suffix, others), each sorted by path.

    DICOM files often have no suffix, or the end of a number for one: those are known by the magic in their content.
    Hidden files and folders (a leading dot) are in neither list. Links to folders are followed, each folder once.

    Raises:
        MissingInputError: ``source`` does not exist.
    """
    if source.is_file():
        return ([source], []) if _known(source) else ([], [source])
    if not source.is_dir():
        raise MissingInputError(f"{source} does not exist; give a folder of images or one image file")
    known: list[Path] = []
    others: list[Path] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link that leads back up would never end
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                (known if _known(path) else others).append(path)
    return sorted(known), sorted(others)


def _known(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix and not suffix[1:].isdigit():
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read: {error.strerror}; its images would be missing in silence"
    )


def read(path: Path) -> Scan:
    """Read one file; its content, not its suffix, says which format it is.

    The EXIF or TIFF orientation is applied: every viewer shows the picture turned, so labels, masks and boxes are drawn
    on the turned picture, and a policy about left and right means nothing on an unturned one. Grey with a palette or
    with three equal channels stays RGB here: the modality decides. An alpha channel is dropped when it is opaque. What
    DICOM and NIfTI files become is told in docs/readers.md.

    Raises:
        DataError: the file cannot be read, is damaged, truncated, empty, too large or of a kind that is not supported.
        MissingDependencyError: the file may be good, but a library that it needs is not installed. That is no reason to
            go on without it in silence.
    """
    with one_error(path):
        return _scan(_content(path), path)


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > BYTE_LIMIT:
        raise RefusedError(f"has {size} bytes; allowed: at most {BYTE_LIMIT}")
    return path.read_bytes()  # not cv2.imread, which opens no path outside ASCII on some systems


def _scan(content: bytes, path: Path) -> Scan:
    if not content:
        raise RefusedError("is empty")
    if content.startswith(raster.PNG_MAGIC):
        return Scan(np.ascontiguousarray(raster.png(content)), None, path)
    if content.startswith(raster.JPEG_MAGIC):
        return Scan(np.ascontiguousarray(raster.jpeg(content)), None, path)
    if dicom.is_dicom(content):  # before TIFF: a DICOM preamble may hold a TIFF header (PS3.10, 7.1)
        return dicom.dicom(content, path)
    if content.startswith(tiff.TIFF_MAGIC):
        return Scan(np.ascontiguousarray(tiff.tiff(content)), None, path)
    if nifti.is_nifti(content):
        return nifti.nifti(content, path)
    raise RefusedError("is no PNG, JPEG or TIFF, nor DICOM or NIfTI, whatever its name says")
