from pathlib import Path

import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.annotations.masks import before_shrinking, match_masks, onto, shrunk
from sslmed.data.readers.refusal import RefusedError
from sslmed.data.scan import Scan


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def test_masks_and_images_that_nothing_goes_with(tmp_path: Path) -> None:
    folder = touch(tmp_path / "m", "a.png", "b_mask.png", "stray.png", "README.md", "v/seg.nii.gz")
    matches = match_masks(folder, same("a.jpg", "b.jpg", "c.jpg", "v/image.nii.gz"))
    assert {name: path.name for name, path in matches.masks.items()} == {
        "a.jpg": "a.png",
        "b.jpg": "b_mask.png",
        "v/image.nii.gz": "seg.nii.gz",
    }
    assert (matches.strays, matches.outside) == (("stray.png",), ())


def test_two_masks_of_one_image_and_one_of_two_images_are_named(tmp_path: Path) -> None:
    folder = touch(tmp_path / "two", "a.png", "a_mask.png")
    with pytest.raises(DataError, match=r"'a\.png' and 'a_mask\.png' .* both masks of 'a\.jpg'"):
        match_masks(folder, same("a.jpg"))
    folder = touch(tmp_path / "one", "a.png")
    with pytest.raises(DataError, match=r"one/a\.png may be the mask of 'p/a\.jpg' or of 'q/a\.jpg'"):
        match_masks(folder, same("p/a.jpg", "q/a.jpg"))


AFFINE = np.array([[0, 0, 2.0, -50], [0, 1.5, 0, 20], [3.0, 0, 0, 7], [0, 0, 0, 1]])  # (d, h, w) -> (x, y, z)
SHAPE = (3, 4, 5)


def mask(pixels: np.ndarray, affine: np.ndarray | None = AFFINE) -> Scan:
    return Scan(pixels, None, Path("m.nii"), kind="volume", affine=affine)


def numbers() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.uint8)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(), (0,), (1, 2), (0, 1, 2)])
def test_a_volume_is_turned_to_lie_as_its_image(order: tuple[int, ...], flips: tuple[int, ...]) -> None:
    """Voxels are compared by where they lie in mm, worked out for each of them."""
    pixels = numbers().transpose(order)
    matrix = AFFINE[:, [*order, 3]].copy()
    for axis in flips:
        pixels = np.flip(pixels, axis)
        matrix[:, 3] += matrix[:, axis] * (pixels.shape[axis] - 1)
        matrix[:, axis] *= -1
    at = {}
    for index in np.ndindex(pixels.shape):
        at[tuple(np.round((matrix @ (*index, 1))[:3], 6))] = pixels[index]
    turned = onto(mask(pixels, matrix), SHAPE[0], SHAPE[1:], AFFINE)
    assert turned.shape == SHAPE
    for index in np.ndindex(SHAPE):
        assert turned[index] == at[tuple(np.round((AFFINE @ (*index, 1))[:3], 6))]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (np.array([[0, 0, 0, 0.02], [0] * 4, [0] * 4, [0] * 4]), r"lies up to 0\.02 mm away"),
        (np.array([[0, 0, 0.01, 0], [0] * 4, [0] * 4, [0] * 4]), r"lies up to 0\.04 mm away"),
        (np.array([[0] * 4, [0, 0.5, 0, 0], [0] * 4, [0] * 4]), r"voxels of 3 x 2 x 2 mm, the image .* 3 x 1\.5 x 2"),
    ],
)
def test_another_place_is_refused_with_both_geometries(change: np.ndarray, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        onto(mask(numbers(), AFFINE + change), SHAPE[0], SHAPE[1:], AFFINE)


def test_rounding_is_no_other_place() -> None:
    onto(mask(numbers(), AFFINE.astype(np.float32).astype(np.float64) + 1e-4), SHAPE[0], SHAPE[1:], AFFINE)


def test_another_size_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"has 2 x 4 x 5 voxels .* image has 3 x 4 x 5"):
        onto(mask(numbers()[:2]), *(SHAPE[0], SHAPE[1:], AFFINE))
    flat = Scan(numbers()[0], None, Path("m.png"))
    with pytest.raises(RefusedError, match=r"has 4 x 5 pixels, but its image has 5 x 4"):
        onto(flat, 1, (5, 4), None)
    assert onto(flat, 1, (4, 5), None).shape == (1, 4, 5)
    with pytest.raises(RefusedError, match="axes cannot be compared"):
        onto(mask(numbers()), SHAPE[0], SHAPE[1:], None)
    onto(mask(numbers(), None), SHAPE[0], SHAPE[1:], None)  # an array has no place, nor has its image


def test_shrinking_takes_the_value_at_the_centre() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(6, 6)
    np.testing.assert_array_equal(shrunk(pixels, (2, 2)), pixels[[[1], [4]], [1, 4]])
    np.testing.assert_array_equal(shrunk(pixels, (6, 6)), pixels)
    assert set(np.unique(shrunk(pixels % 2 * 200, (4, 5)))) <= {0, 200}
    assert shrunk(np.zeros((7, 9), np.uint8), (5, 3)).shape == (5, 3)


def test_the_affine_before_shrinking_keeps_the_outer_edges() -> None:
    stored = before_shrinking(AFFINE, (8, 10), (4, 5))
    for corner in [(0, -0.5, -0.5, 1), (2, 3.5, 4.5, 1)]:  # of the stored image
        d, h, w, _ = corner
        np.testing.assert_allclose(stored @ (d, 2 * h + 0.5, 2 * w + 0.5, 1), AFFINE @ corner)
    np.testing.assert_array_equal(before_shrinking(AFFINE, (4, 5), (4, 5)), AFFINE)
