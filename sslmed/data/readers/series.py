"""The DICOM files of one series to one volume."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sslmed.data.readers import dicom, planes
from sslmed.data.readers.dicom_pixels import check, stored_values
from sslmed.data.readers.dicom_values import QUANTITIES
from sslmed.data.readers.refusal import BYTE_LIMIT, Pixels, RefusedError, one_error, whole
from sslmed.data.scan import Scan

if TYPE_CHECKING:
    from pydicom import Dataset


def series_of(path: Path) -> str | None:
    """What the slices of one volume share, their SeriesInstanceUID and SliceThickness; only the header is read.

    A head CT is often taken in two blocks, thin below and thick above, that stand in one series: two volumes. None of
    everything that is a scan by itself: another format, several frames, a localizer, a picture such as a radiograph
    (whose series is no volume), a file without SeriesInstanceUID.

    Raises:
        DataError: the file cannot be read, or is DICOM without an image.
    """
    with one_error(path), dicom.quiet():
        if not dicom.is_dicom_file(path):
            path.stat()  # a file that is not there is an error
            return None
        header = dicom.header(path, ("SeriesInstanceUID", "SliceThickness", "NumberOfFrames", "ImageType"))
        single = int(header.get("NumberOfFrames") or 1) == 1 and not dicom.is_localizer(header)
        if not single or header.get("Modality") not in QUANTITIES:
            return None
        series = str(header.get("SeriesInstanceUID") or "")
        if not series:
            return None
        thickness = header.get("SliceThickness")
        return f"{series} {float(thickness):.2f}" if thickness else series


def group(paths: Sequence[Path]) -> list[list[Path]]:
    """The files of each series together, in the order in which the series first appear; only headers are read.

    A file of which `series_of` is None is a group of its own.

    Raises:
        DataError: a file whose header is bad.
    """
    found: dict[str | Path, list[Path]] = {}
    for path in paths:
        found.setdefault(series_of(path) or path, []).append(path)
    return list(found.values())


def read_series(paths: Sequence[Path], resample_tilt: bool = False) -> Scan:
    """Read the slices of one series as a volume (D, H, W), sorted by position along their normal, as ``slices`` names.

    Geometry is checked on all headers before any pixel is decoded, and each file is decoded once; see `planes.stack`
    for the tolerances. With one path, that file is read by itself: a volume or clip of several frames, or an image.

    Args:
        paths: files of one series, in any order.
        resample_tilt: shear the slices of a tilted gantry back by linear interpolation (in float32) instead of refusing
            them; the grid grows so that nothing is cut off, and what no slice covers is -1024 HU or the least value.

    Raises:
        DataError: mixed series, sizes, orientations or spacings, a localizer, no geometry, slices at one position,
            uneven gaps, a tilt; or a file that cannot be read.
        MissingDependencyError: a decoder is not installed.
    """
    if not paths:
        raise ValueError("a series needs at least one file")
    if len(paths) == 1:
        with one_error(paths[0]), dicom.quiet():
            return dicom.scan_of(dicom.parse(_content(paths[0])), paths[0])
    first: Dataset | None = None
    slices = []
    for path in paths:
        with one_error(path), dicom.quiet():
            header = dicom.header(path)
            slices.append(_slice(header))
            first = header if first is None else first
            _check_alike(header, first)
    assert first is not None  # noqa: S101  # for the type checker
    with one_error(paths[0]):
        if len(paths) * int(first.Rows) * int(first.Columns) * 4 > BYTE_LIMIT:
            raise RefusedError(f"and its series claim {len(paths)} x {first.Rows} x {first.Columns} pixels: too many")
        found = planes.stack(slices, resample_tilt)
    in_order = [paths[number] for number in found.order]
    volume = _decoded(in_order)
    with one_error(paths[0]):
        scan = dicom.stacked(volume, first, in_order[0], [slices[number] for number in found.order], resample_tilt)
        return replace(scan, slices=tuple(in_order))


def _decoded(paths: Sequence[Path]) -> Pixels:
    """(D, H, W), filled slice by slice: a series of a thousand slices is there once, not seven times."""
    volume: Pixels | None = None
    for number, path in enumerate(paths):
        with one_error(path), dicom.quiet():
            dataset = dicom.parse(_content(path))
            pixels = dicom.finished(dicom.meaning(stored_values(dataset, check(dataset))[0], dataset, 0), dataset)
            if volume is None:
                volume = np.empty((len(paths), *pixels.shape), pixels.dtype)
            elif pixels.dtype != volume.dtype:
                volume = volume.astype(np.result_type(volume, pixels))
            if pixels.shape != volume.shape[1:]:
                raise RefusedError(f"decodes to {pixels.shape}, another slice of the same volume to {volume.shape[1:]}")
            volume[number] = pixels
    assert volume is not None  # noqa: S101  # for the type checker
    return volume


def _content(path: Path) -> bytes:
    content = whole(path)
    if not dicom.is_dicom(content):
        raise RefusedError("is no DICOM file")
    return content


def _slice(header: "Dataset") -> planes.Plane:
    if check(header) != 1:
        raise RefusedError("has several frames among the single slices of a series")
    if dicom.is_localizer(header):
        raise RefusedError("is a localizer, not a slice of a volume")
    if header.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise RefusedError(f"is in colour ({header.PhotometricInterpretation}), not a slice of a volume")
    place = dicom.plane_of(header)
    if place is None:
        raise RefusedError(
            "does not say where its slice lies: "
            "ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing"
        )
    return place


def _check_alike(header: "Dataset", first: "Dataset") -> None:
    if len({" ".join(str(one.get("PatientID") or "").casefold().split()) for one in (header, first)}) > 1:
        raise RefusedError("has another PatientID than another slice of the same volume: whose it is, is open")
    for name in ("SeriesInstanceUID", "Modality", "Rows", "Columns", "RescaleType"):
        if header.get(name) != first.get(name):
            raise RefusedError(f"has {name} {header.get(name)}, another slice of the same volume {first.get(name)}")
