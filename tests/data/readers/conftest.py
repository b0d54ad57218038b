"""DICOM files made here, so that every value in them is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import item, make_dataset
from pydicom.dataset import Dataset

Make = Callable[..., Path]


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
