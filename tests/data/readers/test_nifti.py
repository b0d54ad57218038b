import gzip
import struct
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from sslmed.config import DataError
from sslmed.data.readers import read, scans

SAMPLES = Path(nibabel.__file__).parent / "tests" / "data"
REAL = Path(__file__).parents[4] / "shared" / "data"
VALUES = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
LPS = np.array([[-2.0, 0, 0, 7], [0, -3, 0, 8], [0, 0, 4, 9], [0, 0, 0, 1]])


def save(
    path: Path, values: np.ndarray, affine: np.ndarray | None = LPS, kind: Any = nibabel.Nifti1Image, **header: Any
) -> Path:
    image = kind(values, affine)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_a_volume_in_canonical_orientation(tmp_path: Path, suffix: str, kind: Any) -> None:
    scan = read(save(tmp_path / f"a.{suffix}", VALUES, kind=kind))
    assert (scan.kind, scan.pixels.dtype, scan.pixels.shape) == ("volume", np.int16, (6, 5, 4))
    assert scan.spacing == (4.0, 3.0, 2.0)
    assert scan.affine is not None
    # The file's first voxel lies at (7, 8, 9); its i and j run to the left and back, so it is the last of h and w.
    assert scan.pixels[0, 4, 3] == VALUES[0, 0, 0]
    np.testing.assert_allclose(scan.affine @ [0, 4, 3, 1], [7, 8, 9, 1])
    for d, h, w in np.ndindex(6, 5, 4):
        i, j, k = np.rint(np.linalg.solve(LPS, scan.affine @ [d, h, w, 1]))[:3].astype(int)
        assert scan.pixels[d, h, w] == VALUES[i, j, k]


def test_axes_in_any_order(tmp_path: Path) -> None:
    affine = np.array([[0, 0, -2.0, 0], [3, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 1]])  # i to the front, j up, k left
    scan = read(save(tmp_path / "a.nii", VALUES, affine))
    np.testing.assert_array_equal(scan.pixels, VALUES[:, :, ::-1].transpose(1, 0, 2))
    assert scan.spacing == (4.0, 3.0, 2.0)


def test_slope_and_intercept(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VALUES)
    content = bytearray(path.read_bytes())
    content[112:120] = struct.pack("<ff", 0.5, -3)
    path.write_bytes(content)
    scan = read(path)
    assert scan.pixels.dtype == np.float32
    assert scan.pixels[0, 4, 3] == VALUES[0, 0, 0] * 0.5 - 3


def test_big_endian_and_units(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES, LPS, nibabel.Nifti1Header(endianness=">"))
    image.set_data_dtype(np.int16)
    image.header.set_xyzt_units("meter")
    nibabel.save(image, tmp_path / "a.nii")
    scan = read(tmp_path / "a.nii")
    assert scan.pixels.dtype == np.dtype("=i2")
    assert scan.pixels[0, 4, 3] == VALUES[0, 0, 0]
    assert scan.spacing == (4000.0, 3000.0, 2000.0)


def _no_place(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[252:256] = bytes(4)  # qform and sform codes
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((4, 5, 6, 2), np.int16), "holds 2 volumes, and one is expected"),
        (np.zeros((4, 5, 6, 2, 3), np.int16), r"5 dimensions \(4 x 5 x 6 x 2 x 3\)"),
        (np.zeros((4, 5), np.int16), "2 dimensions"),
        (np.full((2, 2, 2), np.nan, np.float32), "8 values that are NaN"),
        (np.full((2, 2, 2), np.inf), "8 values that are NaN"),
        (np.zeros((2, 2, 2), np.complex64), "holds complex64"),
        (np.full((2, 2, 2), 1e300), "beyond the range"),
    ],
    ids=["4D", "5D", "2D", "nan", "inf", "complex", "huge"],
)
def test_what_is_refused_is_refused_by_name(tmp_path: Path, values: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(save(tmp_path / "a.nii", values))


def test_a_fourth_dimension_of_one_is_none(tmp_path: Path) -> None:
    assert read(save(tmp_path / "a.nii", VALUES[..., None])).pixels.shape == (6, 5, 4)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("sides", [(4, 5, 6, 3), (4, 5, 6, 3, 1), (4, 5, 6, 3, 1, 1)])
def test_volumes_come_one_after_another(tmp_path: Path, suffix: str, sides: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).integers(0, 60000, sides).astype(np.uint16)
    path = save(tmp_path / f"a.{suffix}", values)
    found = list(scans(path))
    assert [scan.part for scan in found] == ["0", "1", "2"]
    for number, scan in enumerate(found):
        alone = read(save(tmp_path / "b.nii", values.reshape(4, 5, 6, 3)[..., number]))
        assert (scan.kind, scan.pixels.dtype, scan.spacing, alone.part) == ("volume", np.uint16, alone.spacing, "")
        np.testing.assert_array_equal(scan.pixels, alone.pixels)
        np.testing.assert_array_equal(scan.affine, alone.affine)
        assert scan.grid is not None
        assert scan.grid.shape == (4, 5, 6)


def test_a_few_bytes_do_not_hold_volumes_without_end(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.zeros((1, 1, 1, 10_001), np.uint8), kind=nibabel.Nifti2Image)
    with pytest.raises(DataError, match="claims 10001 volumes; allowed: 1 to 10000"):
        next(scans(path))


def test_a_volume_that_is_bad_is_an_error_midway(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 2, 3), np.float32)
    values[0, 0, 0, 1] = np.nan
    found = scans(save(tmp_path / "a.nii", values))
    assert next(found).part == "0"
    with pytest.raises(DataError, match=r"a\.nii: has 1 values that are NaN"):
        next(found)


def test_the_grid_is_what_the_header_says(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(VALUES, None)
    image.header.set_qform(LPS, 1)
    image.header.set_sform(np.diag([1.0, 2, 3, 1]), 2)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, tmp_path / "a.nii")
    scan = read(tmp_path / "a.nii")
    assert scan.orientation == "RAS"  # of the sform, which counts before the qform
    grid = scan.grid
    assert grid is not None
    assert (grid.shape, grid.turn.tolist()) == ((4, 5, 6), [[0, 1], [1, 1], [2, 1]])
    # codes, units (mm is 2, s is 8), qfac and sides, half a turn about z, the offset, the rows of the sform
    assert grid.fields[:13].tolist() == pytest.approx([1, 2, 10, 1, 2, 3, 4, 0, 0, 1, 7, 8, 9], abs=1e-6)
    assert grid.fields[13:].tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0]
    assert read(save(tmp_path / "b.nii", VALUES)).orientation == "LPS"


def test_no_geometry_and_flat_axes_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", VALUES)
    _no_place(path)
    with pytest.raises(DataError, match="qform and sform codes are 0"):
        read(path)
    content = bytearray(save(path, VALUES).read_bytes())
    content[296:312] = content[280:296]  # the second axis becomes the first
    path.write_bytes(content)
    with pytest.raises(DataError, match="no geometry"):
        read(path)


def test_claims_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / "a.nii", VALUES).read_bytes())
    content[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    for suffix, packed in (("nii", bytes(content)), ("nii.gz", gzip.compress(content))):
        (tmp_path / f"a.{suffix}").write_bytes(packed)
        with pytest.raises(DataError, match="allowed: at most"):
            read(tmp_path / f"a.{suffix}")
    content[42:48] = struct.pack("<3h", 500, 500, 500)
    for suffix, packed, words in (("nii", bytes(content), "truncated"), ("nii.gz", gzip.compress(content), "can hold")):
        (tmp_path / f"a.{suffix}").write_bytes(packed)
        with pytest.raises(DataError, match=words):
            read(tmp_path / f"a.{suffix}")


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "a.nii", VALUES).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content + bytes(2**24)))
    with pytest.raises(DataError, match="inflates to more"):
        read(tmp_path / "a.nii.gz")


def test_a_wrong_checksum_is_seen(tmp_path: Path) -> None:
    content = bytearray(save(tmp_path / "a.nii.gz", VALUES).read_bytes())
    content[-6] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(content)
    with pytest.raises(DataError, match="CRC check failed"):
        read(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii"])
def test_values_are_those_of_nibabel(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = read(SAMPLES / name)
    theirs = nibabel.as_closest_canonical(nibabel.load(SAMPLES / name))
    np.testing.assert_allclose(scan.pixels, np.asarray(theirs.dataobj).transpose(2, 1, 0))
    assert scan.affine is not None
    np.testing.assert_allclose(scan.affine[:, [2, 1, 0, 3]], theirs.affine, atol=1e-6)


@pytest.mark.real
def test_real_hippocampus() -> None:
    path = REAL / "mri_hippocampus" / "images" / "hippocampus_290.nii.gz"
    scan, theirs = read(path), SimpleITK.ReadImage(str(path))
    assert scan.affine is not None
    for d, h, w in ((0, 0, 0), (3, 5, 7), (20, 30, 30)):
        x, y, z = (scan.affine @ [d, h, w, 1])[:3]
        there = theirs.TransformPhysicalPointToIndex((-x, -y, z))
        assert scan.pixels[d, h, w] == theirs.GetPixel(there)
