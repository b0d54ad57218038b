"""What a header says besides the pixels, and which headers are of no slice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from sslmed.config import DataError
from sslmed.data.readers import read

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("cosines", "letters"),
    [
        ([1, 0, 0, 0, 1, 0], "LPS"),  # axial
        ([0, 1, 0, 0, 0, -1], "PIR"),  # sagittal: the normal of (back, foot) points to the right
        ([1, 0, 0, 0, 0, -1], "LIP"),
        ([-1, 0, 0, 0, 1, 0], "RPI"),
        ([0.8, 0.6, 0, -0.6, 0.8, 0], "LPS"),
    ],
)
def test_orientation_says_where_columns_rows_and_slices_grow(make: Make, cosines: list[float], letters: str) -> None:
    place = {"ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1]}
    assert read(make(RAMP, Modality="MR", ImageOrientationPatient=cosines, **place)).orientation == letters
    assert read(make(RAMP, Modality="MR")).orientation == ""


def region(item: Callable[..., Any], across: float, down: float, **given: Any) -> Any:
    units = {"PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3, "RegionSpatialFormat": 1}
    return item(**units | {"PhysicalDeltaX": across, "PhysicalDeltaY": down} | given)


def test_spacing_of_ultrasound_is_that_of_its_regions(make: Make, sequence_item: Callable[..., Any]) -> None:
    def spacing(*regions: Any) -> tuple[float, ...] | None:
        frames = np.zeros((3, 6, 8), np.uint8)
        path = make(frames, Modality="US", SequenceOfUltrasoundRegions=list(regions), PixelSpacing=[9, 9])
        return read(path).spacing

    flat = region(sequence_item, 0.02, -0.03)
    assert spacing(flat) == pytest.approx((0.3, 0.2))  # cm to mm, (down, across)
    spectrum = region(sequence_item, 0.5, 0.5, RegionSpatialFormat=3, PhysicalUnitsXDirection=4)
    assert spacing(flat, flat, spectrum) == pytest.approx((0.3, 0.2))
    assert spacing(flat, region(sequence_item, 0.02, 0.04)) is None
    assert spacing(flat, region(sequence_item, 0.02, -0.03, PhysicalUnitsYDirection=4)) is None
    assert spacing(region(sequence_item, 0.0, 0.03)) is None
    assert spacing(spectrum) == (9, 9)
    assert spacing() == (9, 9)


@pytest.mark.parametrize(("given", "said"), [("YES", True), ("NO", False), ("PERHAPS", None), ("", None)])
def test_burned_in_annotation(make: Make, given: str, said: bool | None) -> None:
    assert read(make(RAMP, BurnedInAnnotation=given)).annotated is said


def test_a_localizer_is_no_image_of_a_volume(make: Make) -> None:
    with pytest.raises(DataError, match="is a localizer"):
        read(SAMPLES / "dicomdirtests/98892001/CT2N/6293")
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    assert read(make(RAMP, **scout)).kind == "image"  # of a radiograph the word means nothing
