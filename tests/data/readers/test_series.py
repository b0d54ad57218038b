import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK

from sslmed.config import DataError
from sslmed.data.readers import group, is_dicom_file, read, read_series, series, series_of
from sslmed.data.readers.planes import plane, stack, upright

REAL = Path(__file__).parents[4] / "shared" / "data"
SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
Slices = Callable[..., list[Path]]


def test_slices_are_sorted_by_position_and_placed(slices: Slices) -> None:
    scan = read_series(slices([4.0, -1.0, 1.5]))
    assert (scan.kind, scan.unit, scan.pixels.dtype, scan.pixels.shape) == ("volume", "HU", np.int16, (3, 6, 8))
    assert scan.pixels[:, 0, 0].tolist() == [101 - 1024, 102 - 1024, 100 - 1024]
    assert scan.spacing == (2.5, 0.5, 0.25)
    assert scan.affine is not None
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [10, -20, -1, 1])  # LPS to RAS
    np.testing.assert_allclose(scan.affine @ [2, 3, 4, 1], [10 - 4 * 0.25, -20 - 3 * 0.5, 4, 1])
    assert scan.position is None
    assert [path.name for path in scan.slices] == ["1.dcm", "2.dcm", "0.dcm"]
    assert scan.orientation == "LPS"


def test_one_file_is_read_by_itself(slices: Slices) -> None:
    (path,) = slices([3.0])
    scan = read_series([path])
    assert (scan.kind, scan.position, scan.slices) == ("image", 3.0, ())
    np.testing.assert_array_equal(scan.pixels, read(path).pixels)


def test_files_are_grouped_by_series(slices: Slices, tmp_path: Path) -> None:
    first = slices([0.0, 1.0])
    kept = [Path(shutil.move(path, tmp_path / f"first{path.name}")) for path in first]
    second = slices([0.0], SeriesInstanceUID="1.2.4")
    assert group([kept[1], second[0], kept[0]]) == [[kept[1], kept[0]], second]
    (tmp_path / "x.dcm").write_bytes(kept[0].read_bytes()[:300])
    with pytest.raises(DataError, match=r"x\.dcm: "):
        group([kept[1], tmp_path / "x.dcm"])


@pytest.mark.parametrize(
    ("given", "series"),
    [
        ({}, "1.2.3"),
        ({"Modality": "MR"}, "1.2.3"),
        ({"SliceThickness": "5"}, "1.2.3 5.00"),
        ({"SliceThickness": "5.000"}, "1.2.3 5.00"),  # the same, written otherwise
        ({"SliceThickness": "2.5"}, "1.2.3 2.50"),  # another block of the same series
        ({"Modality": "DX"}, None),  # two views of a chest are a series, but no volume
        ({"SeriesInstanceUID": None}, None),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, None),
        ({"ImageType": "LOCALIZER"}, None),
        ({"NumberOfFrames": 2}, None),
    ],
)
def test_series_of_names_the_series_of_slices_alone(slices: Slices, given: dict[str, Any], series: str | None) -> None:
    (path,) = slices([0.0], **given)
    assert series_of(path) == series
    assert is_dicom_file(path)


def test_series_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"nothing")
    assert series_of(tmp_path / "a.dcm") is None
    assert not is_dicom_file(tmp_path / "a.dcm")
    with pytest.raises(DataError, match="cannot be read"):
        series_of(tmp_path / "absent.dcm")
    assert not is_dicom_file(tmp_path / "absent.dcm")
    with pytest.raises(DataError, match="is a dose grid"):
        series_of(SAMPLES / "rtdose.dcm")
    with pytest.raises(DataError, match="is a DICOMDIR"):
        series_of(SAMPLES / "dicomdirtests" / "DICOMDIR")


def test_of_a_header_only_the_header_is_read(slices: Slices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = slices([0.0, 1.0, 2.0])
    for path in paths:  # without its pixels a file is as good for its header
        content = path.read_bytes()
        path.write_bytes(content[: content.index(b"\xe0\x7f\x10\0") + 12])
        assert series_of(path) == "1.2.3"
    opened: list[Path] = []
    whole = series.whole
    monkeypatch.setattr(series, "whole", lambda path: opened.append(path) or whole(path))
    paths = slices([0.0, 1.0, 3.0])
    with pytest.raises(DataError, match="uneven gaps"):
        read_series(paths)
    assert opened == []
    read_series(slices([0.0, 1.0, 2.0]))
    assert sorted(opened) == sorted(paths)


def test_a_deflated_header_is_inflated_under_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = (SAMPLES / "image_dfl.dcm").read_bytes()
    assert series_of(SAMPLES / "image_dfl.dcm") is None  # no volume
    monkeypatch.setattr("sslmed.data.readers.dicom._INFLATED_LIMIT", 2**17)
    # A group length that lies cannot lead the check astray: what pydicom is about to inflate is what is checked.
    for group_length in (content[140:144], b"\0\0\0\0", b"\xff\0\0\0"):
        (tmp_path / "a.dcm").write_bytes(content[:140] + group_length + content[144:])
        for way in (series_of, read):
            with pytest.raises(DataError, match="inflates to more"):
                way(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    ("along", "given", "words"),
    [
        ([0.0, 1.0, 3.0], {}, "uneven gaps between its slices: 1.500 mm"),
        ([0.0, 1.0, 2.0, 3.0, 5.0], {}, "1.000 mm, but one of 2.000 mm"),
        ([0.0, 1.0, 1.0], {}, "2 slices at a position of another, the first at 1.00 mm"),
        ([0.0, 1.0], {"ImagePositionPatient": None}, "does not say where"),
        ([0.0, 1.0], {"PixelSpacing": None}, "does not say where"),
        ([0.0, 1.0], {"PixelSpacing": [0, 1]}, "must be positive"),
        ([0.0, 1.0], {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "right angles"),
        ([0.0, 1.0], {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "is a localizer"),
    ],
)
def test_a_series_that_is_no_volume_is_refused(
    slices: Slices, along: list[float], given: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read_series(slices(along, **given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "mixed orientation"),
        ({"PixelSpacing": [0.5, 0.26]}, "different pixel spacing"),
        ({"Rows": 3}, "has Rows 3"),
        ({"SeriesInstanceUID": "1.9"}, "has SeriesInstanceUID 1.9"),
        ({"PatientID": "another"}, "has another PatientID"),
    ],
)
def test_slices_must_be_alike(slices: Slices, tmp_path: Path, given: dict[str, Any], words: str) -> None:
    (odd,) = (Path(shutil.move(path, tmp_path / "odd.dcm")) for path in slices([9.0], **given))
    with pytest.raises(DataError, match=words):
        read_series([*slices([7.0, 8.0]), odd])


def test_rounded_positions_are_even_enough(slices: Slices) -> None:
    assert read_series(slices([0.0, 3.33, 6.67, 10.0])).spacing == pytest.approx((10 / 3, 0.5, 0.25))


def test_a_tilt_is_refused_and_sheared_back(slices: Slices) -> None:
    # Three slices 2 mm apart, each one pixel (0.5 mm) further down: a column of one bright row each.
    paths = []
    for number in range(3):
        (path,) = slices([0.0], ImagePositionPatient=[0, number * 0.5, number * 2.0])
        paths.append(path.rename(path.with_name(f"t{number}.dcm")))
    with pytest.raises(DataError, match=r"tilted gantry \(14.0 degrees\)"):
        read_series(paths)
    scan = read_series(paths, resample_tilt=True)
    assert (scan.pixels.shape, scan.pixels.dtype) == ((3, 8, 8), np.float32)
    assert scan.pixels[:, :, 0].tolist() == [
        [-924.0] * 6 + [-1024.0] * 2,
        [-1024.0] + [-924.0] * 6 + [-1024.0],
        [-1024.0] * 2 + [-924.0] * 6,
    ]
    assert scan.affine is not None
    np.testing.assert_allclose(scan.affine @ [1, 1, 0, 1], [0, -0.5, 2, 1], atol=1e-9)  # the middle slice's corner


def test_a_tilted_ramp_is_interpolated_where_it_lies() -> None:
    # A field that is linear in space keeps its value at every point that some slice covers.
    planes = [plane([0, 0.3 * number, 2.0 * number], [1, 0, 0, 0, 1, 0], [0.5, 0.5]) for number in range(4)]
    rows = np.arange(40) * 0.5
    volume = np.stack([np.tile((rows + one.origin[1])[:, None], (1, 5)) for one in planes]).astype(np.float32)
    found = stack(planes, resample_tilt=True)
    assert found.slide == (pytest.approx(0.6), 0.0)
    straight, affine = upright(volume, found, fill=-99)
    at = -(affine @ [0, 10, 0, 1])[1]  # DICOM's y at row 10
    np.testing.assert_allclose(straight[:, 10, 2], at, atol=1e-5)


@pytest.mark.real
def test_real_series() -> None:
    head = sorted((REAL / "ct_dicom" / "head_gantry_tilt").glob("*.dcm"))
    with pytest.raises(DataError, match=r"tilted gantry \(18.5 degrees\)"):
        read_series(head)
    with pytest.raises(DataError, match="uneven gaps"):  # the last slice of the seven lies 1.1 mm on
        read_series(head, resample_tilt=True)
    straight = read_series(head[:6], resample_tilt=True)
    assert straight.pixels.shape == (6, 530, 512)
    assert straight.spacing == pytest.approx((4.0019, 0.48828, 0.48828), abs=1e-4)

    for folder, shape in (("ct_dicom/chest", (8, 512, 512)), ("mri_dicom/11-T1post-18670", (22, 320, 280))):
        paths = list((REAL / folder).glob("*.dcm"))
        assert len(group(paths)) == 1
        scan = read_series(paths)
        names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(REAL / folder))
        theirs = SimpleITK.ReadImage(names)
        assert scan.pixels.shape == shape
        np.testing.assert_array_equal(scan.pixels, SimpleITK.GetArrayFromImage(theirs))
        assert scan.affine is not None
        for d, h, w in ((0, 0, 0), (3, 5, 7), (7, 100, 40)):
            x, y, z = theirs.TransformIndexToPhysicalPoint((w, h, d))
            np.testing.assert_allclose(scan.affine @ [d, h, w, 1], [-x, -y, z, 1], atol=0.01)
