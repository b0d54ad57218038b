from pathlib import Path

import nibabel
import numpy as np
import pytest

from sslmed.data.readers import read, read_series
from sslmed.data.scan import Scan
from sslmed.data.sources.facing import facing

PLACES = [Path(f"{number}.dcm") for number in range(3)]


def scan(affine: np.ndarray | None, kind: str = "volume") -> Scan:
    """Every value is the place (x, y or z) of its voxel, by one of three axes in turn; here x + 10 y + 100 z."""
    shape = (3, 4, 5) if kind == "volume" else (1, 4, 5)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), axis=-1)
    matrix = np.eye(4) if affine is None else affine
    values = (grid @ matrix[:3, :3].T + matrix[:3, 3]) @ [1, 10, 100]
    pixels = values.astype(np.float32) if kind == "volume" else values[0].astype(np.float32)
    return Scan(pixels, (1.0, 1.0, 1.0), PLACES[0], kind=kind, affine=affine, slices=tuple(PLACES))


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, -1), (1, -1, -1)])
@pytest.mark.parametrize("order", [(2, 1, 0), (0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("kind", ["volume", "image"])
def test_every_voxel_keeps_its_place(signs: tuple[int, ...], order: tuple[int, ...], kind: str) -> None:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (where, sign) in enumerate(zip(order, signs, strict=True)):
        affine[where, axis] = sign * (axis + 2)
    affine[:3, 3] = (5, -7, 11)
    affine[:3, :3] += 0.01  # slightly oblique
    turned = facing(scan(affine, kind))
    np.testing.assert_allclose(turned.pixels, scan(turned.affine, kind).pixels, rtol=1e-5)
    axes = (0, 1, 2) if kind == "volume" else (1, 2)
    assert all((turned.affine[order[axis], axis] > 0) == (axis == 0) for axis in axes)
    flipped = kind == "volume" and signs[0] < 0
    assert turned.slices == tuple(PLACES[::-1] if flipped else PLACES)


def test_what_is_not_placed_stays() -> None:
    given = scan(None)
    assert facing(given) is given


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]])
@pytest.mark.parametrize("modality", ["DX", "CR", "US"])
def test_a_picture_keeps_its_way_up_wherever_it_says_it_lies(
    tmp_path: Path, modality: str, orientation: list[float]
) -> None:
    from dicoms import make_dataset

    film = np.arange(48, dtype=np.uint8).reshape(6, 8)
    place = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [0, 0, 0], "PixelSpacing": [1, 1]}
    make_dataset(film, Modality=modality, **place).save_as(tmp_path / "placed.dcm")
    placed = read(tmp_path / "placed.dcm")
    assert placed.affine is not None
    np.testing.assert_array_equal(facing(placed).pixels, film)


def test_a_series_and_the_same_volume_as_nifti_are_one(tmp_path: Path) -> None:
    from dicoms import make_dataset

    values = np.random.default_rng(0).integers(0, 2000, (4, 6, 8), np.int16)
    for number, pixels in enumerate(values):
        make_dataset(
            pixels,
            Modality="CT",
            SeriesInstanceUID="1.2.3",
            RescaleSlope=1,
            RescaleIntercept=0,
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            PixelSpacing=[0.5, 0.25],
            ImagePositionPatient=[-10, 20, 3 * number],
        ).save_as(tmp_path / f"{number}.dcm")
    series = facing(read_series(sorted(tmp_path.glob("*.dcm"))))
    affine = np.diag([-0.25, -0.5, 3, 1.0])
    affine[:3, 3] = (10, -20, 0)
    nibabel.Nifti1Image(values.transpose(2, 1, 0), affine).to_filename(tmp_path / "same.nii")
    nifti = facing(read(tmp_path / "same.nii"))
    np.testing.assert_array_equal(series.pixels, nifti.pixels)
    np.testing.assert_allclose(series.affine, nifti.affine)
