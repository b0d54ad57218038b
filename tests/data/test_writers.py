"""Volumes written back lie where they came from, by nibabel's word."""

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.orientations import inv_ornt_aff

from sslmed.config import DiskError
from sslmed.data.readers import read, read_series
from sslmed.data.writers import write_nifti

REAL = Path(__file__).parents[3] / "shared" / "data"
RNG = np.random.default_rng(0)
VALUES = RNG.integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
TURNS = [
    np.array(list(zip(axes, signs, strict=True)))
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
FIELDS = ("pixdim", "qform_code", "sform_code", "xyzt_units", "quatern_b", "quatern_c", "quatern_d")
FIELDS += ("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z")


def oblique() -> np.ndarray:
    """A rotation by a few degrees about each axis, sides of 0.7, 1.1 and 3 mm, and an origin."""
    rotation, _ = np.linalg.qr(np.eye(3) + 0.1 * RNG.normal(size=(3, 3)))
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.sign(np.diag(rotation)) * [0.7, 1.1, 3.0]
    matrix[:3, 3] = RNG.normal(size=3) * 100
    return matrix


def assert_lies_as(written: Path, source: Path, values: np.ndarray) -> None:
    out, given = nibabel.load(written), nibabel.load(source)
    assert np.array_equal(out.affine, given.affine)
    assert out.shape == given.shape
    for name in FIELDS:
        size = 4 if name == "pixdim" else None
        ours, theirs = out.header[name].reshape(-1)[:size], given.header[name].reshape(-1)[:size]
        assert ours.astype(np.float64).tobytes() == theirs.astype(np.float64).tobytes(), name
    assert out.get_data_dtype() == values.dtype
    np.testing.assert_array_equal(np.asanyarray(out.dataobj), values)


def save(path: Path, matrix: np.ndarray, forms: str, kind: Any = nibabel.Nifti1Image) -> Path:
    """``forms``: q, s, or qs with another matrix for the qform."""
    image = kind(VALUES, None)
    image.header.set_data_dtype(np.int16)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms(np.linalg.norm(matrix[:3, :3], axis=0))
    if "q" in forms:
        other = matrix.copy()
        other[:3, 3] += 5 * ("s" in forms)
        image.header.set_qform(other, 1)
    if "s" in forms:
        image.header.set_sform(matrix, 2)
    nibabel.save(image, path)
    return path


@pytest.mark.parametrize("forms", ["q", "s", "qs"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_goes_back_into_its_own_axes(tmp_path: Path, forms: str, suffix: str) -> None:
    letters = set()
    for turn in TURNS:
        matrix = oblique() @ inv_ornt_aff(turn, VALUES.shape)
        source = save(tmp_path / f"in{suffix}", matrix, forms)
        scan = read(source)
        letters.add(scan.orientation)
        assert scan.orientation == "".join(nibabel.aff2axcodes(nibabel.load(source).affine))
        write_nifti(tmp_path / f"out{suffix}", scan.pixels, scan.grid)
        assert_lies_as(tmp_path / f"out{suffix}", source, VALUES)
    assert len(letters) == 48


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_labels_and_maps_lie_where_the_voxels_lie(tmp_path: Path, dtype: type) -> None:
    source = save(tmp_path / "in.nii", oblique() @ inv_ornt_aff(TURNS[29], VALUES.shape), "s")
    scan = read(source)
    write_nifti(tmp_path / "out.nii", (scan.pixels > 300).astype(dtype), scan.grid)
    assert_lies_as(tmp_path / "out.nii", source, (VALUES > 300).astype(dtype))


def test_a_grid_that_nifti_1_cannot_hold_is_written_as_nifti_2(tmp_path: Path) -> None:
    matrix = oblique()  # in 64 bits
    source = save(tmp_path / "in.nii", matrix, "s", nibabel.Nifti2Image)
    scan = read(source)
    write_nifti(tmp_path / "out.nii", scan.pixels, scan.grid)
    assert np.array_equal(nibabel.load(tmp_path / "out.nii").affine, matrix)
    assert_lies_as(tmp_path / "out.nii", source, VALUES)


def test_a_qfac_of_zero_counts_as_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", oblique(), "q")
    before = read(path).affine
    content = bytearray(path.read_bytes())
    content[76:80] = bytes(4)
    path.write_bytes(content)
    assert np.array_equal(read(path).affine, before)


def test_without_a_grid_the_affine_places_it(tmp_path: Path) -> None:
    affine = np.array([[0.0, 0, -0.5, 10], [0, -0.25, 0, 20], [2.5, 0, 0, 30], [0, 0, 0, 1]])  # of (d, h, w)
    values = RNG.integers(0, 200, (3, 6, 8)).astype(np.uint8)
    write_nifti(tmp_path / "a.nii.gz", values, affine=affine)
    out = nibabel.load(tmp_path / "a.nii.gz")
    assert (int(out.header["sform_code"]), int(out.header["qform_code"])) == (1, 0)
    assert out.header.get_zooms() == (0.5, 0.25, 2.5)
    assert out.header.get_xyzt_units()[0] == "mm"
    for d, h, w in np.ndindex(3, 6, 8):
        assert np.asanyarray(out.dataobj)[w, h, d] == values[d, h, w]
        np.testing.assert_array_equal(out.affine @ [w, h, d, 1], affine @ [d, h, w, 1])
    again = read(tmp_path / "a.nii.gz")
    assert again.orientation == "LPS"
    np.testing.assert_array_equal(again.pixels, values[:, ::-1, ::-1])


def test_equal_volumes_are_equal_files_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    values = np.zeros((3, 4, 5), np.uint8)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(tmp_path / name, values, affine=np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").read_bytes()[3:8] == bytes(5)  # no name, no time
    grid = read(save(tmp_path / "in.nii", np.eye(4), "s")).grid
    (tmp_path / "sub").mkdir()
    for given, name in (
        ({"values": values[0], "affine": np.eye(4)}, "a.nii"),
        ({"values": values.astype(np.int64), "affine": np.eye(4)}, "a.nii"),
        ({"values": values, "affine": np.eye(4)}, "a.nrrd"),
        ({"values": values}, "a.nii"),
        ({"values": values, "grid": grid}, "a.nii"),
    ):
        with pytest.raises(ValueError, match=name):
            write_nifti(tmp_path / "sub" / name, **given)
    (tmp_path / "sub").chmod(0o500)
    try:
        if not _writable(tmp_path / "sub"):
            with pytest.raises(DiskError):
                write_nifti(tmp_path / "sub" / "a.nii", values, affine=np.eye(4))
    finally:
        (tmp_path / "sub").chmod(0o700)
    assert not list((tmp_path / "sub").iterdir())


def _writable(folder: Path) -> bool:
    """The super-user may write anywhere."""
    try:
        (folder / "x").touch()
        (folder / "x").unlink()
    except OSError:
        return False
    return True


@pytest.mark.real
def test_real_hippocampi_and_a_series(tmp_path: Path) -> None:
    paths = sorted((REAL / "mri_hippocampus").glob("*/*.nii.gz"))[::7]
    assert len(paths) > 3
    for path in paths:
        scan = read(path)
        write_nifti(tmp_path / "a.nii.gz", scan.pixels.astype(np.float32), scan.grid)
        assert_lies_as(tmp_path / "a.nii.gz", path, np.asanyarray(nibabel.load(path).dataobj).astype(np.float32))
    series = read_series(list((REAL / "ct_dicom" / "chest").glob("*.dcm")))
    write_nifti(tmp_path / "ct.nii.gz", series.pixels, affine=series.affine)
    again = read(tmp_path / "ct.nii.gz")
    assert series.orientation == again.orientation == "LPS"
    assert series.affine is not None
    assert again.affine is not None
    d, h, w = 2, 100, 300
    corner = np.linalg.solve(again.affine, series.affine @ [d, h, w, 1])
    np.testing.assert_allclose(corner, np.rint(corner), atol=1e-3)
    assert again.pixels[tuple(np.rint(corner[:3]).astype(int))] == series.pixels[d, h, w]
