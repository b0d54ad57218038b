import pickle
from typing import Any

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from sslmed.data.intensity import STILL, Intensity, Jitter, Window, Windowed, as_imagenet
from sslmed.data.modality import MODALITIES
from sslmed.data.views import Augment, ViewConfig, _intensity, _normalised, _resize, letterbox, shrink
from sslmed.keyed_rng import rng

SIZE = 32
XRAY = MODALITIES["xray"]
SQUARE: dict[str, Any] = {"crop": (1, 1), "aspect": (1, 1)}  # with every other knob at its default: does nothing
NEUTRAL = ViewConfig(**SQUARE)
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
RGB = RANDOM.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)

# For each knob the settings without it and with it, and the picture that shows it.
KNOBS: dict[str, tuple[dict[str, Any], dict[str, Any], np.ndarray]] = {
    "crop": (SQUARE, {"crop": (0.3, 0.5)}, GREY),
    "aspect": (SQUARE | {"crop": (0.5, 0.5)}, {"aspect": (0.5, 0.5)}, GREY),
    "hflip": (SQUARE, {"hflip": 1}, GREY),
    "vflip": (SQUARE, {"vflip": 1}, GREY),
    "rot90": (SQUARE, {"rot90": 1}, GREY),
    "rotate": (SQUARE, {"rotate": 20}, GREY),
    "brightness": (SQUARE, {"brightness": 0.5}, GREY),
    "contrast": (SQUARE, {"contrast": 0.5}, GREY),
    "gamma": (SQUARE, {"gamma": 0.5}, GREY),
    "blur": (SQUARE | {"blur_sigma": (0.5, 1)}, {"blur": 1}, GREY),
    "solarize": (SQUARE, {"solarize": 1}, GREY),
    "blur_sigma": (SQUARE | {"blur": 1, "blur_sigma": (0.5, 0.5)}, {"blur_sigma": (3, 3)}, GREY),
    "noise": (SQUARE, {"noise": 0.5}, GREY),
    "colour": (SQUARE, {"colour": 0.5}, RGB),
    "grey": (SQUARE, {"grey": 1}, RGB),
    "stain": (SQUARE, {"stain": 0.2}, RGB),
    "window": (SQUARE, {"window": 0.1}, GREY),
}


def to(high: float) -> Intensity:
    """From 0."""
    return Intensity(0, high, high / 2, high / 4)


def as_it_is(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
    return pixels.astype(np.float32)


def unit(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
    whole = pixels.astype(np.float32) / np.float32(intensity.high)
    return whole if jitter == STILL else (whole - np.float32(jitter.level)) / np.float32(jitter.width)


def views(config: ViewConfig, pixels: np.ndarray, count: int, size: Any = SIZE, normalise: Any = unit) -> np.ndarray:
    """``count`` views of one picture, (count, height, width[, 3]); unit scale, so that a grey picture fills 0 to 1."""
    augment = Augment((config,), size, normalise, seed=0)
    high = float(np.iinfo(pixels.dtype).max)
    return np.stack([augment(pixels, to(high), epoch=0, sample=sample)[0] for sample in range(count)])


# Which views.


def test_a_view_is_a_function_of_seed_epoch_and_sample_alone() -> None:
    configs = (XRAY.view, XRAY.view)
    augment = Augment(configs, SIZE, XRAY.normalise, seed=3)
    first = augment(GREY, to(65535), epoch=2, sample=7)
    augment(GREY, to(65535), epoch=5, sample=1)  # what was drawn before does not matter
    np.random.seed(1)  # nor does anybody's global random state
    again = augment(GREY, to(65535), epoch=2, sample=7)
    other_process = pickle.loads(pickle.dumps(augment))(GREY, to(65535), epoch=2, sample=7)  # noqa: S301
    for one, two, three in zip(first, again, other_process, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    other_seed = Augment(configs, SIZE, XRAY.normalise, seed=4)(GREY, to(65535), epoch=2, sample=7)
    assert not np.array_equal(first[0], other_seed[0])


def test_no_two_epochs_or_samples_or_views_share_an_augmentation() -> None:
    """The picture is always the same, so equal bytes mean equal augmentations."""
    augment = Augment((XRAY.view, XRAY.view), SIZE, XRAY.normalise, seed=0)
    made = [
        view.tobytes()
        for epoch in range(25)
        for sample in range(12)
        for view in augment(GREY, to(65535), epoch=epoch, sample=sample)
    ]
    assert len(made) == 600
    assert len(set(made)) == len(made)


def test_geometry_alone_differs_between_epochs() -> None:
    augment = Augment((ViewConfig(crop=(0.2, 0.9), rotate=30),), SIZE, XRAY.normalise, seed=0)
    made = {augment(GREY, to(65535), epoch=epoch, sample=0)[0].tobytes() for epoch in range(100)}
    assert len(made) == 100


def test_a_view_has_its_own_settings() -> None:
    augment = Augment((NEUTRAL, ViewConfig(**SQUARE, hflip=1)), SIZE, as_it_is, seed=0)
    still, mirrored = augment(GREY, to(1), epoch=0, sample=0)
    np.testing.assert_array_equal(still, GREY)
    np.testing.assert_array_equal(mirrored, GREY[:, ::-1])


# What the knobs do.


@pytest.mark.parametrize("pixels", [GREY, RGB, (GREY >> 8).astype(np.uint8)], ids=["16 bit", "colour", "8 bit"])
def test_neutral_does_nothing(pixels: np.ndarray) -> None:
    for view in views(NEUTRAL, pixels, 5, normalise=as_it_is):
        assert view.dtype == np.float32
        np.testing.assert_array_equal(view, pixels)


def test_every_knob_is_tried_here() -> None:
    assert set(KNOBS) == set(ViewConfig.model_fields) - {"scale"}


@pytest.mark.parametrize("tile", [False, True])
def test_views_of_their_own_size_show_what_a_view_of_that_size_shows(tile: bool) -> None:
    configs = (ViewConfig(rotate=20), ViewConfig(rotate=20, scale=0.5))
    whole, local = Augment(configs, SIZE, as_it_is, seed=3, tile=tile)(GREY, to(1), epoch=1, sample=2)
    assert whole.shape == (SIZE, SIZE)
    assert local.shape == (SIZE // 2, SIZE // 2)
    alone = Augment((configs[0], ViewConfig(rotate=20)), SIZE // 2, as_it_is, seed=3, tile=tile)
    np.testing.assert_array_equal(local, alone(GREY, to(1), epoch=1, sample=2)[1])
    assert ViewConfig(scale=0.43).size((224, 100)) == (96, 43)


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_does_something(knob: str) -> None:
    without, with_it, pixels = KNOBS[knob]
    before = views(ViewConfig(**without), pixels, 8)
    after = views(ViewConfig(**(without | with_it)), pixels, 8)
    changed = [not np.allclose(one, two, atol=1e-4) for one, two in zip(before, after, strict=True)]
    assert sum(changed) >= (5 if knob == "rot90" else 8)
    assert after.shape == before.shape
    assert after.dtype == np.float32


@pytest.mark.parametrize("knob", [knob for knob in KNOBS if KNOBS[knob][2] is GREY])
def test_every_knob_of_grey_pictures_takes_colour_too(knob: str) -> None:
    without, with_it, _ = KNOBS[knob]
    assert views(ViewConfig(**(without | with_it)), RGB, 2).shape == (2, SIZE, SIZE, 3)


def test_colour_knobs_leave_grey_pictures_alone() -> None:
    for view in views(ViewConfig(**SQUARE, colour=1, grey=1), GREY, 3, normalise=as_it_is):
        np.testing.assert_array_equal(view, GREY)


def ramps(height: int, width: int) -> np.ndarray:
    """Column and row numbers as 16-bit channels, 256 a pixel: what a view shows of the picture can be read from it."""
    rows, columns = np.mgrid[:height, :width]
    return np.dstack([columns, rows, 0 * rows]).astype(np.uint16) * 256


def test_crops_keep_to_area_and_aspect_and_reach_both_ends() -> None:
    height, width = 120, 160
    config = ViewConfig(crop=(0.2, 0.6), aspect=(0.5, 2))
    made = views(config, ramps(height, width), 200, normalise=as_it_is) / 256
    inner = made[:, 2:-2, 2:-2]  # the border is interpolated differently
    step = np.diff(inner.mean(axis=1)[..., 0], axis=1).mean(axis=1)  # source columns an output pixel
    down = np.diff(inner.mean(axis=2)[..., 1], axis=1).mean(axis=1)
    area, aspect = step * down * SIZE**2 / (height * width), step / down
    assert 0.2 * 0.93 < area.min() < 0.25
    assert 0.55 < area.max() < 0.6 * 1.07
    assert 0.5 * 0.93 < aspect.min() < 0.6
    assert 1.7 < aspect.max() < 2 * 1.07
    middle = made[:, SIZE // 2, SIZE // 2]
    assert middle[:, 0].std() > 15  # the place of the crop varies too
    assert middle[:, 1].std() > 10


def test_rotation_reaches_its_bound_either_way_and_no_further() -> None:
    made = views(ViewConfig(**SQUARE, rotate=15), ramps(64, 64), 120, size=64, normalise=as_it_is)[:, 24:40, 24:40, 0]
    across, down = np.diff(made, axis=2).mean(axis=(1, 2)), np.diff(made, axis=1).mean(axis=(1, 2))
    angle = np.degrees(np.arctan2(down, across))
    assert -15.1 < angle.min() < -13
    assert 13 < angle.max() < 15.1
    assert abs(angle.mean()) < 3


def test_rotation_shows_no_empty_corner() -> None:
    bright = np.full((SIZE, SIZE), 60000, np.uint16)
    np.testing.assert_array_equal(views(ViewConfig(**SQUARE, rotate=45), bright, 10, normalise=as_it_is), 60000)


@pytest.mark.parametrize(("knob", "axis"), [("hflip", 1), ("vflip", 0)])
def test_flips_come_as_often_as_asked(knob: str, axis: int) -> None:
    made = views(ViewConfig(**SQUARE, **{knob: 0.3}), GREY, 300, normalise=as_it_is)
    flipped = np.array([np.array_equal(view, np.flip(GREY, axis)) for view in made])
    still = np.array([np.array_equal(view, GREY) for view in made])
    assert (flipped ^ still).all()
    assert 0.21 < flipped.mean() < 0.39  # 3.4 standard deviations


def test_quarter_turns_are_equally_likely() -> None:
    made = views(ViewConfig(**SQUARE, rot90=1), GREY, 400, normalise=as_it_is)
    turned = [sum(np.array_equal(view, np.rot90(GREY, turns)) for view in made) for turns in range(4)]
    assert sum(turned) == 400
    assert min(turned) > 70


def test_brightness_shifts_within_its_bound() -> None:
    shift = (views(ViewConfig(**SQUARE, brightness=0.4), GREY, 200) - unit(GREY, to(65535))).reshape(200, -1)
    assert shift.std(axis=1).max() < 1e-5  # the same for every pixel
    assert -0.4 <= shift.min() < -0.36
    assert 0.36 < shift.max() <= 0.4 + 1e-5
    assert abs(shift.mean()) < 0.06


def test_contrast_scales_about_the_mean_within_its_bound() -> None:
    before, after = unit(GREY, to(65535)), views(ViewConfig(**SQUARE, contrast=0.4), GREY, 200)
    np.testing.assert_allclose(after.mean(axis=(1, 2)), before.mean(), atol=1e-4)
    factor = after.std(axis=(1, 2)) / before.std()
    assert 0.6 - 1e-4 < factor.min() < 0.64
    assert 1.36 < factor.max() < 1.4 + 1e-4


def test_intensity_is_never_clipped() -> None:
    """Normalised images live on both sides of 0 and 1; what clips them there destroys them."""
    after = views(ViewConfig(**SQUARE, brightness=2, contrast=0.5), GREY, 50, normalise=XRAY.normalise)
    assert after.min() < -3.5
    assert after.max() > 3.5
    assert len(np.unique(after[0])) > 0.9 * len(np.unique(XRAY.normalise(GREY, to(65535))))


def test_gamma_bends_between_minimum_and_maximum_within_its_bound() -> None:
    before, after = unit(GREY, to(65535)), views(ViewConfig(**SQUARE, gamma=0.3), GREY, 200)
    np.testing.assert_allclose(after.min(axis=(1, 2)), before.min(), atol=1e-5)
    np.testing.assert_allclose(after.max(axis=(1, 2)), before.max(), atol=1e-5)
    order = np.argsort(before, axis=None)
    assert (np.diff(after.reshape(200, -1)[:, order], axis=1) >= -1e-6).all()
    place = np.unravel_index(np.argmin(np.abs(before - 0.5)), before.shape)
    span = before.max() - before.min()
    exponent = np.log((after[:, *place] - before.min()) / span) / np.log((before[place] - before.min()) / span)
    assert -0.301 < np.log(exponent).min() < -0.27
    assert 0.27 < np.log(exponent).max() < 0.301


def test_gamma_of_a_constant_view_is_finite() -> None:
    flat = np.full((SIZE, SIZE), 1000, np.uint16)
    np.testing.assert_allclose(views(ViewConfig(**SQUARE, gamma=1), flat, 3), 1000 / 65535, rtol=1e-5)


def test_noise_is_additive_and_bounded_in_strength() -> None:
    noise = (views(ViewConfig(**SQUARE, noise=0.2), GREY, 100) - unit(GREY, to(65535))).reshape(100, -1)
    sigma = noise.std(axis=1)
    assert 0.18 < sigma.max() < 0.2 * 1.08
    assert sigma.min() < 0.02
    assert abs(noise.mean()) < 0.005


def test_blur_smooths_as_often_as_asked_and_keeps_the_mean() -> None:
    before = unit(GREY, to(65535))
    after = views(ViewConfig(**SQUARE, blur=0.4, blur_sigma=(1, 2)), GREY, 200)
    smoothed = after.std(axis=(1, 2)) < 0.5 * before.std()
    assert 0.28 < smoothed.mean() < 0.52
    np.testing.assert_array_equal(after[~smoothed][0], before)
    np.testing.assert_allclose(after.mean(axis=(1, 2)), before.mean(), atol=0.03)


def test_colour_scales_each_channel_by_itself_and_grey_drops_it() -> None:
    ratio = views(ViewConfig(**SQUARE, colour=0.3), RGB, 100)[:, 5, 5] / unit(RGB, to(255))[5, 5]
    assert 0.7 - 1e-4 < ratio.min() < 0.74
    assert 1.26 < ratio.max() < 1.3 + 1e-4
    assert np.abs(ratio[:, 0] - ratio[:, 1]).max() > 0.2
    grey = views(ViewConfig(**SQUARE, grey=1), RGB, 1)[0]
    np.testing.assert_allclose(grey, np.repeat(unit(RGB, to(255)).mean(axis=2, keepdims=True), 3, axis=2), rtol=1e-5)


def test_solarize_inverts_what_is_above_the_middle_as_often_as_asked() -> None:
    """BYOL, arXiv 2006.07733, appendix B: x below 0.5, 1 - x from there on; here between the view's own ends."""
    low, high = -1.5, 2.5
    ramp = np.linspace(low, high, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    expected = np.where(ramp < 0.5, ramp, low + high - ramp)
    made = views(ViewConfig(**SQUARE, solarize=0.3), GREY, 200, normalise=lambda *_: ramp)
    inverted = np.abs(made - ramp).max(axis=(1, 2)) > 1
    assert 0.2 < inverted.mean() < 0.4  # 3 standard deviations
    np.testing.assert_array_equal(made[~inverted][0], ramp)
    for view in made[inverted]:
        np.testing.assert_allclose(view, expected, atol=1e-6)
    flat = np.full((SIZE, SIZE), 9000, np.uint16)
    np.testing.assert_array_equal(views(ViewConfig(**SQUARE, solarize=1), flat, 2, normalise=as_it_is), 9000)


def test_solarize_comes_after_blur_and_leaves_other_views_as_they_were() -> None:
    config = {"contrast": 0.4, "blur": 1.0, "blur_sigma": (1, 2), "noise": 0.0}
    before, after = (views(ViewConfig(**SQUARE, **config, solarize=share), GREY, 3) for share in (0, 1))
    for blurred, solarized in zip(before, after, strict=True):
        ends = blurred.min() + blurred.max()
        np.testing.assert_array_equal(solarized, np.where(blurred > ends / 2, ends - blurred, blurred))


def test_the_jitter_of_a_window_reaches_its_bound_and_no_further() -> None:
    """One draw a view, for all windows: how far in HU is each window's own matter."""
    seen: list[Jitter] = []

    def note(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
        seen.append(jitter)
        return pixels.astype(np.float32)

    views(ViewConfig(**SQUARE, window=0.1), GREY, 300, normalise=note)
    level, width = np.array(seen).T
    for shift in (level, width - 1):
        assert -0.1 <= shift.min() < -0.095
        assert 0.095 < shift.max() <= 0.1
        assert abs(shift.mean()) < 0.01
    assert abs(np.corrcoef(level, width)[0, 1]) < 0.2
    seen.clear()
    views(ViewConfig(**SQUARE), GREY, 2, normalise=note)
    assert seen == [STILL, STILL]


def test_knobs_that_are_not_set_draw_nothing() -> None:
    """So a knob that is added leaves the views of every recipe without it as they were."""
    view = np.asarray(unit(GREY, to(65535)))
    made = _intensity(view, ViewConfig(brightness=0.4, noise=0.2), rng(0, 0, 0, "view"))
    stream = rng(0, 0, 0, "view")
    stream.uniform(0, 0)  # contrast shares brightness's draw
    shift, sigma = stream.uniform(-0.4, 0.4), stream.uniform(0, 0.2)
    expected = view + shift + sigma * stream.standard_normal(view.shape, dtype=np.float32)
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_a_view_of_a_photo_is_what_its_draws_say_step_by_step() -> None:
    """In float64 with NumPy alone, and not one draw more or less."""
    config = ViewConfig(brightness=0.4, contrast=0.4, gamma=0.2, colour=0.2, grey=0.5, solarize=0.5, noise=0.1)
    before = as_imagenet(RGB, to(255))
    kept, greys = before.copy(), 0
    for sample in range(12):
        made_by, drawn = (rng(0, 0, sample, "view") for _ in range(2))
        made = _intensity(before, config, made_by)
        factor, shift, gamma = (drawn.uniform(-most, most) for most in (0.4, 0.4, 0.2))
        view = (before.astype(np.float64) - before.mean()) * (1 + factor) + before.mean() + shift
        low, high = view.min(), view.max()
        view = low + (high - low) * ((view - low) / (high - low)) ** np.exp(gamma)
        view = view * drawn.uniform(0.8, 1.2, size=3)
        if drawn.random() < 0.5:
            view, greys = np.repeat(view.mean(axis=2, keepdims=True), 3, axis=2), greys + 1
        if drawn.random() < 0.5:
            ends = view.min() + view.max()
            view = np.where(view > ends / 2, ends - view, view)
        view = view + drawn.uniform(0, 0.1) * drawn.standard_normal(view.shape, dtype=np.float32)
        far = np.abs(made - view) > 2e-5
        assert far.mean() < 0.001  # what lies on the middle may be inverted or not
        assert made_by.integers(2**63) == drawn.integers(2**63)
    assert 0 < greys < 12
    np.testing.assert_array_equal(before, kept)


# Bytes.


@pytest.mark.parametrize("name", MODALITIES)
@pytest.mark.parametrize("windows", [1, 2, 3])
def test_a_looked_up_byte_is_a_normalised_one(name: str, windows: int) -> None:
    normalise = MODALITIES[name].normalise
    if isinstance(normalise, Windowed):
        normalise = Windowed((Window(40, 80), Window(-500, 1500), Window(100, 33))[:windows])
    intensity, bits = Intensity(12.5, 201, 90, 40), (GREY >> 8).astype(np.uint8)
    many = (np.dstack([bits, bits[::-1], bits.T, bits[:, ::-1], bits]), Intensity(0, 255, 1, 1))
    for pixels, by in ((bits, intensity), (RGB, intensity), (np.rot90(RGB), intensity), many):
        for jitter in (STILL, Jitter(0.1, 0.9)):
            expected = normalise(pixels, by, jitter)
            np.testing.assert_array_equal(_normalised(pixels, by, normalise, jitter), expected)
            np.testing.assert_array_equal(_normalised(pixels, by, normalise, jitter), expected)  # and from the cache


@pytest.mark.parametrize("size", [(24, 40), (32, 32), (33, 31)])
def test_averaged_colours_are_opencvs(size: tuple[int, int]) -> None:
    """To the level, where both sides shrink, one does, none, and by whole numbers; noise and edges."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    for pixels in (noise, np.where(noise > 127, np.uint8(255), np.uint8(0))):
        for height in (16, 33, 41, 48, 64, 96, 99, 137, 193):
            for width in (17, 31, 40, 62, 64, 80, 93, 120, 171):
                crop = pixels[3 : 3 + height, 5 : 5 + width]
                method = cv2.INTER_AREA if height > size[0] or width > size[1] else cv2.INTER_LINEAR
                expected = cv2.resize(np.ascontiguousarray(crop), size[::-1], interpolation=method)
                averaged = method == cv2.INTER_AREA
                np.testing.assert_array_equal(_resize(crop, size, averaged=averaged), expected)


# Height and width.


def test_a_view_has_the_height_and_width_that_were_asked_for() -> None:
    config = ViewConfig(crop=(0.3, 0.9), rotate=20, hflip=0.5, vflip=0.5, rot90=1, blur=1, noise=0.1)
    for size in ((32, 48), (48, 32), (32, 32)):
        for pixels in (GREY, RGB):
            made = views(config, pixels, 8, size=size)  # quarter turns too: all of one shape
            assert made.shape == (8, *size, *pixels.shape[2:])


def test_one_number_is_a_square() -> None:
    config = XRAY.view
    np.testing.assert_array_equal(views(config, GREY, 3, size=24), views(config, GREY, 3, size=(24, 24)))


def test_quarter_turns_of_a_view_that_is_not_square_keep_what_is_up_or_turn_it() -> None:
    made = views(ViewConfig(crop=(0.99, 1), rot90=1), ramps(64, 64), 80, size=(32, 48), normalise=as_it_is)
    across = np.diff(made[..., 0].mean(axis=1), axis=1).mean(axis=1)  # the source's columns, from left to right
    down = np.diff(made[..., 0].mean(axis=2), axis=1).mean(axis=1)
    quarter, half = np.abs(down) > np.abs(across), across < 0
    assert 0.3 < quarter.mean() < 0.7
    assert (half & ~quarter).any()
    assert (~half & ~quarter).any()


def test_aspect_is_relative_to_the_input() -> None:
    """A crop of aspect 1 is not stretched, whatever the shape of the input, as nothing is outside training."""
    config = ViewConfig(crop=(0.3, 0.5), aspect=(1, 1))
    for size in ((32, 64), (64, 32)):
        made = views(config, ramps(160, 160), 20, size=size, normalise=as_it_is)[:, 4:-4, 4:-4] / 256
        across = np.diff(made[..., 0].mean(axis=1), axis=1).mean(axis=1)
        down = np.diff(made[..., 1].mean(axis=2), axis=1).mean(axis=1)
        np.testing.assert_allclose(across / down, 1, atol=0.06)


# Bit depth.


def test_geometry_works_on_the_stored_dtype_and_keeps_its_range() -> None:
    """albumentations turns uint16 into float64 and clips to [0, 1] or to 8 bits in places; nothing here may."""
    seen: list[np.ndarray] = []

    def note(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
        seen.append(pixels)
        return pixels.astype(np.float32)

    config = ViewConfig(crop=(0.3, 1), hflip=0.5, vflip=0.5, rot90=0.5, rotate=30)
    steep = np.zeros((96, 80), np.uint16)
    steep[:, 40:] = 65535
    steep[24:72, 20:60] = 40000 + np.arange(40, dtype=np.uint16)
    for pixels in (steep, np.dstack([steep] * 3), np.dstack([steep] * 9)):
        seen.clear()
        made = views(config, pixels, 20, normalise=note)
        assert {crop.dtype for crop in seen} == {np.dtype(np.uint16)}
        assert {crop.shape for crop in seen} == {made.shape[1:]}
        assert made.max() == 65535
        assert made.min() == 0
        assert ((made >= 40000) & (made < 40040)).sum() > 2000
        assert set(range(40002, 40038)) <= set(np.unique(made))  # grey values that differ by 1 are still there


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
@pytest.mark.parametrize("planes", [(), (3,), (5,), (9,)], ids=["one", "three", "five", "nine"])
def test_geometry_of_hu_keeps_sign_and_scale(dtype: type[np.generic], planes: tuple[int, ...]) -> None:
    """albumentations refuses int16 in some transforms and clips float32 in others: in none of those used here."""
    low, high = (0, 250) if dtype == np.uint8 else (0, 5000) if dtype == np.uint16 else (-2000, 3000)
    column = np.linspace(low, high, 64).astype(dtype)
    pixels = np.ascontiguousarray(np.broadcast_to(column.reshape(1, 64, *(1 for _ in planes)), (64, 64, *planes)))
    dtypes: set[np.dtype[Any]] = set()

    def note(view: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
        dtypes.add(view.dtype)
        return view.astype(np.float32)

    made: list[np.ndarray] = []
    whole, turned = ({**SQUARE, "hflip": 1, "vflip": 1, "rot90": 1}, {"crop": (0.3, 1), "rotate": 30})
    for config in (whole, turned):
        augment = Augment((ViewConfig(**config),), 64, note, seed=0)
        for sample in range(8):
            made += augment(pixels, Intensity(low, high, 0, 1), epoch=0, sample=sample)
    assert dtypes == {np.dtype(dtype)}
    assert {view.shape for view in made} == {(64, 64, *planes)}
    for view in made[:8]:  # moved as they are
        assert sorted(view.ravel().tolist()) == sorted(pixels.ravel().tolist())
    for view in made[8:]:
        assert low <= view.min()
        assert view.max() <= high
        assert view.std() > 0.3 * pixels.std()
        first = view.reshape(64, 64, -1)[..., 0]
        assert all((plane == first).all() for plane in np.moveaxis(view.reshape(64, 64, -1), 2, 0))


# Whole images.


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64), (7, 9), (300, 2), (2, 300), (1, 1), (33, 32)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "rgb"])
def test_letterbox_keeps_aspect_and_fills_the_rest(
    shape: tuple[int, int], dtype: type[np.unsignedinteger[Any]], channels: tuple[int, ...]
) -> None:
    boxed = letterbox(np.full((*shape, *channels), 200, dtype), SIZE, fill=7.0)
    assert boxed.shape == (SIZE, SIZE, *channels)
    assert boxed.dtype == dtype
    assert set(np.unique(boxed)) <= {7, 200}
    rows, columns = (np.unique(where) for where in np.nonzero(boxed == 200)[:2])
    scale = SIZE / max(shape)
    for found, length in ((rows, shape[0]), (columns, shape[1])):
        assert len(found) == found[-1] - found[0] + 1 == max(1, round(length * scale))
        assert abs(found[0] - (SIZE - 1 - found[-1])) <= 1  # in the middle
    assert max(len(rows), len(columns)) == SIZE


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64), (10, 14)])
def test_letterbox_cuts_nothing_off(shape: tuple[int, int]) -> None:
    image = np.full(shape, 1000, np.uint16)
    mark = max(2, max(shape) // 16)
    for number, (row, column) in enumerate(((0, 0), (0, -mark), (-mark, 0), (-mark, -mark)), start=2):
        image[row:, column:][:mark, :mark] = number * 10000
    boxed = letterbox(image, SIZE, fill=0)
    rows, columns = (np.unique(where) for where in np.nonzero(boxed))
    corners = [boxed[row, column] for row in (rows[0], rows[-1]) for column in (columns[0], columns[-1])]
    assert corners == [20000, 30000, 40000, 50000]


@pytest.mark.parametrize("size", [(32, 48), (48, 32), (20, 100)])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (64, 64), (64, 96), (7, 9), (300, 2), (1, 1)])
def test_letterbox_in_a_box_that_is_not_square(size: tuple[int, int], shape: tuple[int, int]) -> None:
    boxed = letterbox(np.full(shape, 200, np.uint8), size, fill=7.0)
    assert boxed.shape == size
    rows, columns = (np.unique(where) for where in np.nonzero(boxed == 200))
    scale = min(size[0] / shape[0], size[1] / shape[1])
    for found, length, whole in ((rows, shape[0], size[0]), (columns, shape[1], size[1])):
        assert len(found) == found[-1] - found[0] + 1 == max(1, round(length * scale))
        assert abs(found[0] - (whole - 1 - found[-1])) <= 1  # in the middle
    assert len(rows) == size[0] or len(columns) == size[1]


@pytest.mark.parametrize("size", [16, 64], ids=["smaller", "larger"])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_letterbox_of_stacks_is_that_of_each_slice(size: int, dtype: type[np.generic]) -> None:
    stack = RANDOM.normal(0, 500, (40, 30, 9)).astype(dtype)
    boxed = letterbox(stack, size, fill=-1024.0)
    assert (boxed.shape, boxed.dtype) == ((size, size, 9), np.dtype(dtype))
    for plane in range(9):
        np.testing.assert_array_equal(boxed[..., plane], letterbox(stack[..., plane], size, fill=-1024.0))
    assert letterbox(stack[..., :1], size, fill=0).shape == (size, size, 1)


def test_letterbox_fills_with_no_more_than_was_asked_for() -> None:
    """What is filled must end at the floor of the scale: -3 is above -3.5, and 0 is all that unsigned pixels have."""
    for dtype, fill, expected in ((np.int16, -3.5, -4), (np.uint8, 12.7, 12), (np.uint16, -3.5, 0)):
        assert letterbox(np.full((4, 8), 100, dtype), 8, fill)[0, 0] == expected


def test_letterbox_of_the_size_itself_is_the_image() -> None:
    np.testing.assert_array_equal(letterbox(GREY, SIZE, fill=0), GREY)


def test_shrink_averages_areas_and_leaves_small_images() -> None:
    image = RANDOM.integers(0, 65536, (64, 96), dtype=np.uint16)
    blocks = image.reshape(32, 2, 48, 2).mean(axis=(1, 3))
    shrunk = shrink(image, 32)
    assert shrunk.dtype == np.uint16
    np.testing.assert_allclose(shrunk, blocks, atol=0.51)
    assert shrink(image, 64) is image
    assert shrink(image, 1000) is image
    assert shrink(np.zeros((300, 200, 3), np.uint8), 100).shape == (150, 100, 3)


# Settings.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": (0.9, 0.1)}, "the smaller first"),
        ({"crop": (0, 1)}, "above 0"),
        ({"crop": (0.5, 1.1)}, "at most 1"),
        ({"aspect": (2, 1)}, "aspect"),
        ({"blur_sigma": (0, 1)}, "blur_sigma"),
        ({"hflip": 1.1}, "hflip"),
        ({"rotate": -1}, "rotate"),
        ({"solarize": 2}, "solarize"),
        ({"posterize": 1}, "posterize"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ViewConfig(**settings)
