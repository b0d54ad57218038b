"""One DICOM file to a scan: an image, or the volume or clip that its frames are."""

import logging
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from sslmed.data.readers import dicom_header as facts
from sslmed.data.readers import dicom_values as values
from sslmed.data.readers import planes
from sslmed.data.readers.dicom_pixels import check, stored_values
from sslmed.data.readers.refusal import Pixels, RefusedError, check_bytes
from sslmed.data.scan import Scan

if TYPE_CHECKING:
    from pydicom import Dataset

_INFLATED_LIMIT = 2**29
_KNOWN_BY = ("Modality", "Rows", "DirectoryRecordSequence")
_NO_IMAGES = {
    "RTDOSE": "a dose grid",
    "RTPLAN": "a treatment plan",
    "RTSTRUCT": "contours",
    "SEG": "a segmentation",
    "SR": "a report",
    "PR": "a presentation state",
    "KO": "a selection of images",
    "ECG": "a waveform",
    "DOC": "a document",
}


def is_dicom(content: bytes) -> bool:
    """The magic after the preamble, or a file without one: it begins with group 2 or 8, little endian (PS3.10, 7.1)."""
    bare = content[:1] in (b"\2", b"\x08") and content[1:2] == b"\0" and content[3:4] == b"\0" and len(content) > 8
    return content[128:132] == b"DICM" or bare


def is_dicom_file(path: Path) -> bool:
    """Whether a file begins as DICOM does; False of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns of every departure from the standard; what matters of them ends in a refusal."""
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse(content: bytes) -> "Dataset":
    """The dataset of an image.

    Raises:
        RefusedError: an index, a report or something else without pixels.
    """
    from pydicom import dcmread

    dataset = _image(dcmread(_Source(BytesIO(content)), force=True))
    if "PixelData" not in dataset:
        other = next((name for name in ("FloatPixelData", "DoubleFloatPixelData") if name in dataset), None)
        raise RefusedError(f"is DICOM with {other}, which is not read" if other else "is DICOM without an image")
    return dataset


def header(path: Path, names: Sequence[str] | None = None) -> "Dataset":
    """What stands before the pixels of an image; nothing after it is read from the disk, unless the file is deflated.

    Args:
        names: the attributes that are wanted, besides those by which an image is known; None for all.

    Raises:
        RefusedError: as `parse`; or the file is no DICOM.
    """
    from pydicom import dcmread

    check_bytes(path.stat().st_size)
    wanted = None if names is None else [*_KNOWN_BY, *names]
    with path.open("rb") as file:
        if not is_dicom(file.read(132)):
            raise RefusedError("is no DICOM file")
        file.seek(0)
        return _image(dcmread(_Source(file), force=True, stop_before_pixels=True, specific_tags=wanted))


class _Source:
    """What pydicom reads a file from.

    It reads "all that is left" only of a deflated file, to inflate that whole: which is tried here first, under a
    limit.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        if size < 0:
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            inflater.decompress(content, _INFLATED_LIMIT)
            if inflater.unconsumed_tail:
                raise RefusedError(f"inflates to more than {_INFLATED_LIMIT} bytes")
        return content


def _image(dataset: "Dataset") -> "Dataset":
    """The dataset with the transfer syntax that it was read in, once it is one of an image."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    meta = getattr(dataset, "file_meta", None)
    if meta is None:
        dataset.file_meta = meta = FileMetaDataset()
    if "TransferSyntaxUID" not in meta:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    kind = str(dataset.get("Modality") or "")
    if str(meta.get("MediaStorageSOPClassUID", "")) == "1.2.840.10008.1.3.10" or "DirectoryRecordSequence" in dataset:
        raise RefusedError("is a DICOMDIR, an index of other files")
    if kind in _NO_IMAGES:
        raise RefusedError(f"is {_NO_IMAGES[kind]} (DICOM {kind}), no image")
    if "Rows" not in dataset:
        raise RefusedError("is DICOM without an image")
    return dataset


def is_localizer(dataset: "Dataset") -> bool:
    """Whether it is a scout that slices were planned on (PS3.3, C.7.6.1.1.2), not one of them."""
    words = dataset.get("ImageType") or []
    return "LOCALIZER" in [str(word).upper() for word in ([words] if isinstance(words, str) else words)]


def dicom(content: bytes, path: Path) -> Scan:
    """Read one file; see `scan_of`."""
    with quiet():
        return scan_of(parse(content), path)


def scan_of(dataset: "Dataset", path: Path) -> Scan:
    """An image, or the volume (parallel frames that are placed in the patient) or clip (other frames) of a dataset.

    CT, MR, PET and NM keep their rescaled values, other grey images are shown through their window; see `values`.

    Raises:
        RefusedError: sizes, frames, values or a geometry that are not read here, a localizer.
    """
    frames = check(dataset)
    if dataset.get("Modality") in values.QUANTITIES and frames > 1 and not _placed(dataset, frames):
        raise RefusedError(
            f"is {dataset.Modality} of {frames} frames, but does not say where each lies (no functional groups)"
        )
    if dataset.get("Modality") in values.QUANTITIES and is_localizer(dataset):
        raise RefusedError("is a localizer, not a slice of a volume")
    stored = stored_values(dataset, frames)
    pixels = np.stack([meaning(stored[frame], dataset, frame) for frame in range(frames)])
    if frames == 1:
        place = plane_of(dataset)
        return described(finished(pixels[0], dataset), dataset, path, Geometry.of_slice(place, facts.spacing(dataset)))
    if _placed(dataset, frames):
        return _volume(pixels, dataset, path, frames)
    return described(finished(pixels, dataset), dataset, path, Geometry("clip", facts.spacing(dataset)))


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a scan says of its place; see `Scan`."""

    kind: Any
    spacing: tuple[float, ...] | None = None
    affine: Any = None
    position: float | None = None

    @classmethod
    def of_slice(cls, place: planes.Plane | None, spacing: tuple[float, float] | None) -> "Geometry":
        if place is None:
            return cls("image", spacing)
        return cls("image", place.spacing, planes.affine(place), place.position)


def meaning(stored: Pixels, dataset: "Dataset", frame: int) -> Pixels:
    """One frame of stored values to what it means; quantities are not yet in their final dtype: see `finished`."""
    if stored.ndim == 3:
        return stored
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        return values.palette(stored, dataset)
    if dataset.get("Modality") in values.QUANTITIES:
        return values.quantity(stored, dataset, frame)
    return values.picture(stored, dataset, frame)


def finished(pixels: Pixels, dataset: "Dataset") -> Pixels:
    """In the dtype of a scan."""
    pixels = values.compact(pixels, dataset.Modality) if pixels.dtype.kind in "if" else pixels
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedError("has values that are not finite")
    return pixels


def described(pixels: Pixels, dataset: "Dataset", path: Path, place: Geometry) -> Scan:
    """The scan with what the header says of it."""
    kind = str(dataset.get("Modality") or "")
    units = kind == "CT" and str(dataset.get("RescaleType") or "HU") == "HU"
    return Scan(
        np.ascontiguousarray(pixels),
        place.spacing,
        path,
        kind=place.kind,
        affine=place.affine,
        unit="HU" if units else "",
        modality=kind or None,
        patient=str(dataset.get("PatientID") or ""),
        study=str(dataset.get("StudyInstanceUID") or ""),
        series=str(dataset.get("SeriesInstanceUID") or ""),
        position=place.position,
        identity=facts.identity(dataset),
        orientation="" if place.affine is None else planes.letters(place.affine),
        annotated=facts.annotated(dataset),
    )


def plane_of(dataset: "Dataset", frame: int = 0) -> planes.Plane | None:
    """Where a frame lies, None where the file does not say all of it.

    Raises:
        RefusedError: it says something impossible.
    """
    found = []
    for group, name in (
        ("PlanePositionSequence", "ImagePositionPatient"),
        ("PlaneOrientationSequence", "ImageOrientationPatient"),
        ("PixelMeasuresSequence", "PixelSpacing"),
    ):
        place = values.functional_group(dataset, frame, group) or dataset
        found.append(place.get(name))
    if any(value is None or value == "" or not len(value) for value in found):
        return None
    return planes.plane(*([float(number) for number in value] for value in found))


def _placed(dataset: "Dataset", frames: int) -> bool:
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    if not own or not any(group.get("PlanePositionSequence") for group in own):
        return False
    if len(own) != frames:
        raise RefusedError(f"is damaged: it has {frames} frames and places {len(own)}")
    return True


def _volume(pixels: Pixels, dataset: "Dataset", path: Path, frames: int) -> Scan:
    found = [plane_of(dataset, frame) for frame in range(frames)]
    known = [place for place in found if place is not None]
    if len(known) < frames:
        raise RefusedError(f"is of {frames} frames, and {frames - len(known)} do not say where they lie")
    return stacked(pixels, dataset, path, known, resample_tilt=False)


def stacked(pixels: Pixels, dataset: "Dataset", path: Path, slices: list[planes.Plane], resample_tilt: bool) -> Scan:
    """Slices (D, H, W) in any order as a volume, sorted along their normal; see `planes.stack`."""
    found = planes.stack(slices, resample_tilt)
    volume, matrix = pixels, found.affine
    if found.order != list(range(len(found.order))):
        volume = pixels[found.order]
    if found.slide != (0.0, 0.0):
        fill = values.AIR if dataset.Modality == "CT" else float(volume.min())
        volume, matrix = planes.upright(volume, found, fill)
    spacing = (found.gap, *slices[0].spacing)
    scan = described(finished(volume, dataset), dataset, path, Geometry("volume", spacing, matrix))
    return replace(scan, sheared=found.slide != (0.0, 0.0))
