"""DICOM files made here, so that every value in them is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

Make = Callable[..., Path]


def make_dataset(pixels: np.ndarray, **given: Any) -> FileDataset:
    """A dataset whose BitsStored are those of the dtype unless given; ``pixels`` (H, W), (H, W, 3) or (D, H, W)."""
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    frames = len(pixels) if pixels.ndim == 3 and not colour else 1
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["a"])
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.dtype.itemsize
    dataset.BitsStored = given.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.Modality = "DX"
    content = pixels.tobytes()
    dataset.PixelData = content + b"\0" * (len(content) % 2)
    dataset["PixelData"].VR = "OW" if dataset.BitsAllocated > 8 else "OB"
    for name, value in given.items():
        if value is None:
            dataset.pop(name, None)
        else:
            setattr(dataset, name, value)
    return dataset


def item(**given: Any) -> Dataset:
    """A dataset for a sequence."""
    one = Dataset()
    for name, value in given.items():
        setattr(one, name, value)
    return one


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a DICOM file of pixels and attributes; the attributes may replace any."""

    def write(pixels: np.ndarray, name: str = "a.dcm", **given: Any) -> Path:
        path = tmp_path / name
        make_dataset(pixels, **given).save_as(path)
        return path

    return write


@pytest.fixture
def slices(make: Make) -> Callable[..., list[Path]]:
    """Writes CT slices at positions along their normal, in the order given; slice i is constant 100 + i."""

    def write(along: list[float], **given: Any) -> list[Path]:
        attributes: dict[str, Any] = {
            "Modality": "CT",
            "SeriesInstanceUID": "1.2.3",
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.5, 0.25],
        }
        return [
            make(
                np.full((6, 8), 100 + number, np.int16),
                f"{number}.dcm",
                **attributes | {"ImagePositionPatient": [-10, 20, place]} | given,
            )
            for number, place in enumerate(along)
        ]

    return write


@pytest.fixture
def sequence_item() -> Callable[..., Dataset]:
    return item
