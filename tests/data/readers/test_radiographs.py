"""DICOM through ingest and predict's door: radiographs go in, everything else is skipped by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from sslmed.commands.ingest import ingest
from sslmed.config import DataError
from sslmed.data.acceptance import accept_scan
from sslmed.data.modality import MODALITIES
from sslmed.data.readers import read
from sslmed.data.store import Store

Make = Callable[..., Path]
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 4096, (40, 36)).astype(np.uint16)


def test_a_folder_of_radiographs_becomes_a_store(tmp_path: Path, make: Make) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        make(GREY + number, f"in/{number}.dcm", BitsStored=13, Modality="CR", PatientID=f"p{number}")
    make(GREY, "in/IM0004", BitsStored=12, Modality="DX", PhotometricInterpretation="MONOCHROME1")
    rescale = {"RescaleSlope": 1, "RescaleIntercept": 0}
    make(GREY, "in/ct.dcm", BitsStored=12, Modality="CT", **rescale)
    make(np.stack([GREY, GREY]), "in/cine.dcm", BitsStored=12, Modality="XA")
    result = ingest(tmp_path / "in", tmp_path / "store", modality="xray", key=tmp_path / "key")
    assert result.images == 5
    assert {skipped.file: skipped.reason.split(":")[0] for skipped in result.skipped} == {
        "cine.dcm": "is a clip of 2 x 40 x 36 pixels (XA), not one image",
        "ct.dcm": "is a slice of a series (CT), not a whole image",
    }
    pixels = Store(tmp_path / "store").pixels(4)
    np.testing.assert_array_equal(np.squeeze(pixels), 4095 - GREY)
    assert "p0" not in json.dumps(result.as_dict())


@pytest.mark.parametrize("name", ["xray", "histology", "photo"])
@pytest.mark.parametrize(
    ("pixels", "given", "words"),
    [
        (GREY, {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": 0}, r"is a slice of a series \(CT\)"),
        (GREY, {"Modality": "MR"}, r"is a slice of a series \(MR\)"),
        (GREY, {"Modality": "NM"}, "was taken as NM"),
        (GREY, {"Modality": "US"}, "was taken as US"),
        (np.stack([GREY] * 3), {"Modality": "US"}, "is a clip of 3 x 40 x 36"),
    ],
)
def test_what_no_modality_takes_is_refused(
    make: Make, name: str, pixels: np.ndarray, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=f"{words}.*not read by modality {name}"):
        accept_scan(MODALITIES[name], read(make(pixels, **given)))


def test_a_volume_is_refused_in_two_dimensions(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match="is a volume of 6 x 5 x 4 pixels, not one image: not read by modality xray"):
        accept_scan(MODALITIES["xray"], read(tmp_path / "a.nii"))
