import numpy as np
import pytest

from sslmed.config import DataError, UsageError
from sslmed.data.modality import MODALITIES, accept, named, set_knobs, with_views

XRAY, PHOTO = MODALITIES["xray"], MODALITIES["photo"]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_xray_range_is_the_percentiles_so_that_12_bits_in_16_fill_the_scale() -> None:
    pixels = RNG.integers(0, 4096, (64, 64), dtype=np.uint16)
    low, high = XRAY.intensity_range(pixels)
    assert (low, high) == tuple(np.percentile(pixels, (0.5, 99.5)))
    normalised = XRAY.normalise(pixels, low, high)
    assert normalised.min() == -2
    assert normalised.max() == 2


def test_xray_by_value() -> None:
    pixels = np.array([[100, 150, 200, 300, 50]], np.uint16)
    np.testing.assert_allclose(XRAY.normalise(pixels, 100, 200), [[-2, 0, 2, 2, -2]])


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_radiograph_has_a_range(value: int) -> None:
    assert XRAY.intensity_range(np.full((4, 4), value, np.uint16)) == (value, value + 1)


def test_a_few_bright_pixels_on_black_are_not_called_constant() -> None:
    pixels = np.zeros((100, 100), np.uint16)
    pixels[0, :5] = 900
    assert XRAY.intensity_range(pixels) == (0, 900)


def test_photo_by_value() -> None:
    assert PHOTO.intensity_range(RGB) == (0, 255)
    assert PHOTO.intensity_range(RGB.astype(np.uint16)) == (0, 65535)
    expected = (RGB / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(PHOTO.normalise(RGB, 0, 255), expected, atol=1e-5)
    grey = PHOTO.normalise(RGB[..., 0], 0, 255)
    np.testing.assert_allclose(grey, (RGB[..., 0] / 255 - 0.449) / 0.226, atol=1e-5)


def test_a_crop_is_scaled_like_its_image() -> None:
    pixels = RNG.integers(0, 4096, (32, 32), dtype=np.uint16)
    low, high = XRAY.intensity_range(pixels)
    whole = XRAY.normalise(pixels, low, high)
    np.testing.assert_array_equal(XRAY.normalise(pixels[5:9, 3:7], low, high), whole[5:9, 3:7])


def test_equal_channels_collapse_for_xray_and_colour_is_refused() -> None:
    grey = RGB[..., 0]
    stored = accept(XRAY, np.dstack([grey] * 3))
    np.testing.assert_array_equal(stored, grey)
    assert accept(XRAY, grey) is grey
    with pytest.raises(DataError, match="--modality photo"):
        accept(XRAY, RGB)
    one_coloured_pixel = np.dstack([grey] * 3)
    one_coloured_pixel[3, 4, 2] ^= 128
    with pytest.raises(DataError, match="save it as grey"):
        accept(XRAY, one_coloured_pixel)


def test_photo_takes_grey_and_colour_as_they_are() -> None:
    assert accept(PHOTO, RGB) is RGB
    assert accept(PHOTO, RGB[..., 0]).shape == (20, 30)


def test_with_views_changes_only_what_is_asked_and_not_the_shared_instance() -> None:
    before = XRAY.view
    changed = with_views(XRAY, {"crop": [0.6, 1.0], "hflip": 0.5})
    assert changed.view.crop == (0.6, 1.0)
    assert changed.view.hflip == 0.5
    assert changed.view.rotate == before.rotate
    assert MODALITIES["xray"].view is before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"vflip": 0.5}, r"'views\.vflip' is 0\.5.*xray"),
        ({"colour": 0.1}, r"'views\.colour'"),
        ({"grey": 0.2}, r"'views\.grey'"),
        ({"rot90": 1}, r"'views\.rot90'"),
        ({"brightnes": 0.5}, "did you mean 'brightness'"),
        ({"hflip": 1.5}, r"'views\.hflip' is 1\.5"),
        ({"crop": [0.9, 0.1]}, "views"),
    ],
)
def test_with_views_names_what_it_refuses(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        with_views(XRAY, overrides)
    assert str(caught.value).count("\n") < 6


def test_a_neutral_value_of_a_forbidden_knob_is_no_error() -> None:
    assert "vflip" not in set_knobs(with_views(XRAY, {"vflip": 0.0, "colour": 0}).view)


def test_an_unknown_modality_is_named() -> None:
    assert named("xray") is XRAY
    with pytest.raises(UsageError, match="did you mean 'xray'"):
        named("x-ray")


def test_a_grey_jpeg_in_colour_coding_is_grey_and_a_coloured_marker_is_not() -> None:
    grey = RNG.integers(10, 240, (20, 30), dtype=np.uint8)
    nearly = np.stack([grey, grey + 3, grey - 3], axis=2)
    taken = accept(XRAY, nearly)
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, grey)
    nearly[3:6, 3:6] = (255, 0, 0)
    with pytest.raises(DataError, match="colour"):
        accept(XRAY, nearly)
