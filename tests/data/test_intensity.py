import numpy as np
import pytest

from sslmed.data.intensity import (
    MOST_SAMPLES,
    STILL,
    WINDOWS,
    Intensity,
    Jitter,
    Window,
    Windowed,
    as_imagenet,
    dtype_range,
    foreground,
    hounsfield,
    lit,
    scaled,
    scored,
    tissue,
    whole_image,
    window,
)

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def head(scale: float = 1.0, fluid: float = 60.0, depth: int = 12) -> np.ndarray:
    """A volume of noisy air, a skull of bright fat, brain within, and in its middle dark fluid; (D, 64, 64) float32."""
    z, y, x = np.mgrid[:depth, :64, :64]
    away = np.hypot(x - 32, y - 32)
    values = np.abs(RNG.normal(0, 8, z.shape))
    values = np.where(away < 26, RNG.normal(400, 20, z.shape), values)
    values = np.where((away > 24) & (away < 27), 1000, values)
    values = np.where(away < 6, RNG.normal(fluid, 5, z.shape), values)
    return (scale * values).astype(np.float32)


# Images.


def test_an_xray_is_measured_by_percentiles_so_that_12_bits_in_16_fill_the_scale() -> None:
    pixels = RNG.integers(0, 4096, (64, 64), dtype=np.uint16)
    found = whole_image(pixels)
    assert (found.low, found.high) == tuple(np.percentile(pixels, (0.5, 99.5)))
    normalised = scaled(pixels, found)
    assert normalised.min() == -2
    assert normalised.max() == 2
    assert scaled(np.array([found.mean, found.mean + found.std]), found) == pytest.approx([0, 1], abs=1e-5)


def test_scaled_by_value() -> None:
    pixels = np.array([[100, 150, 200, 300, 50]], np.uint16)
    np.testing.assert_allclose(scaled(pixels, Intensity(100, 200, 150, 25)), [[-2, 0, 2, 2, -2]])


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_radiograph_has_a_range(value: int) -> None:
    assert whole_image(np.full((4, 4), value, np.uint16))[:2] == (value, value + 1)


def test_a_range_is_one_in_float32_too() -> None:
    """As which stores keep it."""
    for value in (3e7, -3e7, 1e20):
        found = tissue(np.full((2, 4, 4), value, np.float32))
        assert np.float32(found.low) < np.float32(found.high)


def test_a_few_bright_pixels_on_black_are_not_called_constant() -> None:
    pixels = np.zeros((100, 100), np.uint16)
    pixels[0, :5] = 900
    assert whole_image(pixels)[:2] == (0, 900)


def test_photo_by_value() -> None:
    assert dtype_range(RGB)[:2] == (0, 255)
    assert dtype_range(RGB.astype(np.uint16))[:2] == (0, 65535)
    expected = (RGB / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(as_imagenet(RGB, dtype_range(RGB)), expected, atol=1e-5)
    np.testing.assert_allclose(as_imagenet(np.rot90(RGB), dtype_range(RGB)), np.rot90(expected), atol=1e-5)
    grey = as_imagenet(RGB[..., 0], dtype_range(RGB))
    np.testing.assert_allclose(grey, (RGB[..., 0] / 255 - 0.449) / 0.226, atol=1e-5)


def test_a_crop_is_scaled_like_its_image() -> None:
    pixels = RNG.integers(0, 4096, (32, 32), dtype=np.uint16)
    whole = scaled(pixels, whole_image(pixels))
    np.testing.assert_array_equal(scaled(pixels[5:9, 3:7], whole_image(pixels)), whole[5:9, 3:7])


def test_an_ultrasound_is_measured_within_its_sector() -> None:
    clip = np.zeros((3, 50, 50), np.uint8)
    clip[:, 10:20, 10:20] = RNG.integers(40, 200, (3, 10, 10))
    inside = clip[:, 10:20, 10:20]
    assert lit(clip)[:2] == tuple(np.percentile(inside, (0.5, 99.5)))
    assert lit(np.zeros((8, 8), np.uint8))[:2] == (0, 1)
    assert scaled(clip, lit(clip))[0, 0, 0] == -2


# Windows.


def test_a_window_at_its_edges() -> None:
    abdomen = Windowed((window("abdomen"),))
    level, width = WINDOWS["abdomen"]
    edges = np.array([[level - width / 2 - 1, level - width / 2, level, level + width / 4, level + width / 2, 3000]])
    np.testing.assert_allclose(abdomen(edges, hounsfield(edges)), [[-2, -2, 0, 1, 2, 2]], atol=1e-6)


def test_air_and_what_is_below_are_the_floor_of_every_window() -> None:
    outside = np.array([[-2000, -1024]], np.int16)
    for name in WINDOWS:  # the lung's would reach down to -1250
        for jitter in (STILL, Jitter(-0.1, 1.1), Jitter(0.1, 0.9)):
            assert (Windowed((window(name),))(outside, hounsfield(outside), jitter) == -2).all()


def test_the_wide_window_is_what_the_intensity_says() -> None:
    pixels = RNG.integers(-2000, 3000, (16, 16)).astype(np.int16)
    wide = Windowed((WINDOWS["wide"],))(pixels, hounsfield(pixels))
    np.testing.assert_allclose(wide, scaled(pixels, hounsfield(pixels)), atol=1e-6)
    assert hounsfield(pixels) == (-1024, 1024, 0, 512)


def test_each_window_is_a_plane_and_slices_of_one_stand_together() -> None:
    stack = RNG.integers(-1024, 1024, (6, 7, 3)).astype(np.int16)
    found = Windowed((window("lung"), window("bone")))(stack, hounsfield(stack))
    assert found.shape == (6, 7, 6)
    assert found.dtype == np.float32
    for number, name in enumerate(("lung", "bone")):
        alone = Windowed((window(name),))(stack, hounsfield(stack))
        np.testing.assert_array_equal(found[..., 3 * number : 3 * number + 3], alone)
    assert Windowed((window("lung"), window("bone")))(stack[..., 0], hounsfield(stack)).shape == (6, 7, 2)


def test_a_jitter_is_relative_to_each_windows_own_width() -> None:
    brain, wide = Window(40, 80), Window(0, 2000)
    values = np.linspace(-1000, 1000, 200).reshape(1, -1)
    jitter = Jitter(0.1, 1.2)
    found = Windowed((brain, wide))(values, hounsfield(values), jitter)
    for plane, (level, width) in zip(np.moveaxis(found, 2, 0), (brain, wide), strict=True):
        moved = Windowed((Window(level + 0.1 * width, 1.2 * width),))(values, hounsfield(values))
        np.testing.assert_allclose(plane, moved, atol=1e-5)
    assert STILL == (0, 1)


def test_a_jitter_never_turns_a_window_upside_down() -> None:
    """A window that ends just above air, moved below it."""
    narrow = Windowed((Window(-1024, 40),))
    pixels = np.array([[-2000, -1024, -1010, 0]], np.int16)
    seen = narrow(pixels, hounsfield(pixels), Jitter(-0.6, 1.0))[0]
    assert (np.diff(seen) >= 0).all()
    assert seen[0] == seen[1] == -2


def test_a_window_is_a_name_or_level_and_width() -> None:
    assert window((30, 150)) == Window(30, 150)
    with pytest.raises(ValueError, match="'brian' is no window; did you mean 'brain'"):
        window("brian")
    with pytest.raises(ValueError, match=r"allowed: wide, lung, .* or \[level, width\]"):
        window("x")
    with pytest.raises(ValueError, match="width must be above 0"):
        window((30, 0))
    with pytest.raises(ValueError, match="where all is air"):
        window((-2000, 100))


# MR.


def test_an_mr_of_0_to_1000_in_int16_fills_the_scale() -> None:
    """By the dtype's range all of it would lie in [0.50, 0.52]."""
    volume = RNG.integers(0, 1001, (6, 32, 32)).astype(np.int16)
    normalised = scored(volume, tissue(volume))
    assert normalised.std() > 0.9
    assert normalised.max() - normalised.min() > 3


def test_air_is_one_value_and_fluid_inside_keeps_its_own() -> None:
    volume = head()
    mask, air = foreground(volume)
    brain, fluid = volume[0, 32, 45], volume[:, 30:34, 30:34]
    assert mask[:, 30:34, 30:34].all()  # dark, but enclosed
    assert not mask[:, :4].any()
    assert air[:, :4].mean() > 0.9
    found = tissue(volume)
    normalised = scored(volume, found)
    assert (normalised[:, :4] == normalised.min()).mean() > 0.9
    assert scored(fluid, found).mean() > normalised.min() + 0.02
    assert scored(np.array([brain]), found)[0] > scored(fluid, found).max()
    inside = normalised[mask]
    assert abs(inside.mean()) < 0.02
    assert inside.std() == pytest.approx(1, abs=0.02)


def test_it_does_not_depend_on_how_much_air_there_is_nor_on_the_scale() -> None:
    volume = head()
    wider = np.abs(RNG.normal(0, 8, (12, 128, 128))).astype(np.float32)
    wider[:, 32:96, 32:96] = volume
    one, two = tissue(volume), tissue(wider)
    np.testing.assert_allclose(one[1:], two[1:], rtol=0.03)
    np.testing.assert_allclose(tissue(volume * 7), np.multiply(one, 7), rtol=1e-4)


def test_a_cut_out_organ_with_fluid_is_foreground_as_a_whole() -> None:
    volume = RNG.normal(500, 60, (20, 30, 30)).astype(np.float32)
    volume[:, :10] = RNG.normal(150, 20, (20, 10, 30))
    mask, air = foreground(volume)
    assert mask.mean() > 0.99
    assert not air.any()
    assert tissue(volume).low < 130


def test_zeros_around_are_no_foreground() -> None:
    volume = np.zeros((10, 40, 40), np.int16)
    volume[:, 10:30, 10:30] = RNG.normal(500, 50, (10, 20, 20))
    found = tissue(volume)
    assert found.mean == pytest.approx(500, rel=0.01)
    assert found.std == pytest.approx(50, rel=0.05)
    assert scored(volume, found)[0, 0, 0] == scored(volume, found).min()


@pytest.mark.parametrize(
    "volume",
    [
        np.zeros((3, 8, 8), np.int16),
        np.full((3, 8, 8), 700, np.uint16),
        np.full((1, 1, 1), -3.5, np.float32),
        np.where(np.arange(4096).reshape(1, 64, 64) < 5, 30000, 0).astype(np.int16),
        np.where(np.arange(64).reshape(1, 8, 8) < 40, 5, 0).astype(np.uint8),
        RNG.normal(0, 1, (4, 9, 9)).astype(np.float32),
        np.linspace(0, 1e-6, 128, dtype=np.float32).reshape(2, 8, 8),
        np.exp(RNG.normal(0, 4, (4, 32, 32))).astype(np.float32),
        np.array([[[0, 1], [2, 3]]], np.int16),
    ],
    ids=["zeros", "constant", "a voxel", "a spike", "a mask", "signed", "tiny values", "heavy tail", "four voxels"],
)
def test_whatever_the_volume_the_input_is_finite_and_bounded(volume: np.ndarray) -> None:
    found = tissue(volume)
    assert np.isfinite(found).all()
    assert found.low < found.high
    assert found.std > 0
    normalised = scored(volume, found)
    assert np.isfinite(normalised).all()
    assert np.abs(normalised).max() <= 8.01
    if volume.min() < volume.max():
        assert normalised.max() > normalised.min()


def test_a_large_volume_is_sampled_all_over() -> None:
    small = RNG.gamma(4, 100, (16, 96, 96)).astype(np.float32)
    large = np.tile(small, (3, 4, 4))
    assert large.size > 2 * MOST_SAMPLES
    np.testing.assert_allclose(tissue(large), tissue(small), rtol=0.03)
