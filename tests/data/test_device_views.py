"""The views of a device beside those of the CPU, one by one.

Both draw the same numbers, so they are compared pixel by pixel; the noise alone is another and is judged by its
moments. Tried, and seen to fail: no antialiasing, INTER_AREA's one-axis case as plain linear, a rotation the other way
or about another centre, flips or turns in another order, a blur of half the sigma, gamma before contrast, solarize
before blur, stains after normalisation, a level that is not in units of the width, one noise for all planes.
"""

import pickle
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sslmed.config import UsageError
from sslmed.data import device_geometry, device_intensity, device_views
from sslmed.data.device_geometry import Placement
from sslmed.data.device_views import DeviceViews, Images
from sslmed.data.input import as_tensor
from sslmed.data.intensity import Intensity, whole_image
from sslmed.data.modality import MODALITIES, Modality, with_views, with_windows
from sslmed.data.views import Augment, Pixels, ViewConfig

SQUARE, WIDE = 48, (32, 56)
SHAPES = [(90, 120), (120, 90), (40, 30), (200, 50), (48, 48)]
EVERYTHING: dict[str, Any] = {
    "crop": (0.2, 1.0),
    "aspect": (0.5, 2.0),
    "hflip": 0.5,
    "vflip": 0.5,
    "rot90": 0.7,
    "rotate": 40.0,
    "brightness": 0.5,
    "contrast": 0.5,
    "gamma": 0.5,
    "blur": 0.6,
    "blur_sigma": (0.1, 1.5),
    "solarize": 0.3,
    "stain": 0.2,
    "window": 0.1,
    "noise": 0.0,
    "colour": 0.5,
    "grey": 0.3,
}
SETTINGS = [(name, every) for name in MODALITIES for every in (False, True)]
Sources = list[tuple[Pixels, Intensity]]


def smooth(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> Pixels:
    """A picture without a flat place, from the least to the greatest value."""
    noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), 1.5)
    unit = (noise - noise.min()) / (noise.max() - noise.min())
    if dtype == "float32":
        return unit * 1000
    limits = np.iinfo(dtype)
    return np.round(limits.min + unit.astype(np.float64) * (limits.max - limits.min)).astype(dtype)


def scan(modality: Modality, shape: tuple[int, ...], seed: int = 0) -> tuple[Pixels, Intensity]:
    """A float32 picture, whose geometry is not rounded on the CPU either, and its intensity."""
    pixels = smooth(shape, seed=seed)
    if modality.name == "ct":
        pixels = pixels * 2 - 1000
    if modality.name in ("photo", "histology"):
        return pixels, Intensity(0, 1000, 450, 225)
    return pixels, modality.intensity(pixels)


def sources(modality: Modality) -> Sources:
    """Images of different sizes; of photos and histology in colour, but the last."""
    colour = (3,) if 3 in modality.channels else ()
    made = [scan(modality, shape + colour, seed) for seed, shape in enumerate(SHAPES)]
    return [*made, scan(modality, (70, 80), 9)]


def configured(name: str, every: bool, **changes: Any) -> Modality:
    """The modality with the noise off, and with every other legal knob on."""
    modality = MODALITIES[name]
    knobs = {knob: value for knob, value in EVERYTHING.items() if knob in modality.legal} if every else {"noise": 0.0}
    return with_views(modality, knobs | {knob: value for knob, value in changes.items() if knob in modality.legal})


def on_device(
    modality: Modality, images: Sources, size: Any, channels: int, epoch: int = 0, first: int = 0
) -> list[torch.Tensor]:
    """Two views of each image, (N, channels, h, w) each, by torch; the samples count from ``first``."""
    views = DeviceViews((modality.view, modality.view), size, modality, channels)
    drawn = [
        views.draw([pixels.shape] * 2, seed=5, epoch=epoch, sample=first + number)
        for number, (pixels, _) in enumerate(images)
    ]
    stacked = torch.from_numpy(np.stack(drawn, axis=1))
    return [views.render(number, Images.of(images), stacked[number]) for number in range(2)]


def on_cpu(modality: Modality, images: Sources, size: Any, channels: int, epoch: int = 0) -> list[torch.Tensor]:
    augment = Augment((modality.view, modality.view), size, modality.normalise, seed=5)
    made = [augment(*image, epoch=epoch, sample=number) for number, image in enumerate(images)]
    return [torch.stack([as_tensor(views[number], channels) for views in made]) for number in range(2)]


# The same views as on the CPU.


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize(("name", "every"), SETTINGS)
def test_views_are_those_of_the_cpu(name: str, every: bool, size: Any) -> None:
    modality = configured(name, every)
    images = sources(modality)
    for epoch in range(4):
        expected, made = (views(modality, images, size, 3, epoch) for views in (on_cpu, on_device))
        for one, two in zip(made, expected, strict=True):
            assert one.shape == two.shape
            assert (one.dtype, one.is_contiguous()) == (torch.float32, True)
            torch.testing.assert_close(one, two, rtol=0, atol=5e-4)


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
def test_smaller_views_are_those_of_the_cpu(size: Any) -> None:
    modality = configured("xray", every=True)
    small = replace(modality, view=modality.view.model_copy(update={"scale": 0.5}))
    images = sources(modality)
    made, expected = (views(small, images, size, 1)[0] for views in (on_device, on_cpu))
    assert made.shape[2:] == small.view.size(size) != modality.view.size(size)
    torch.testing.assert_close(made, expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("depth", [(), (3,)], ids=["grey", "colour"])
def test_every_stored_dtype_to_its_rounding(dtype: str, depth: tuple[int, ...]) -> None:
    """A level of it at each of two roundings; a rotation of int16 is to 1/32 pixel in OpenCV, and is left out."""
    modality = MODALITIES["photo" if depth else "xray"]
    view = ViewConfig(crop=(0.3, 1), hflip=0.5, rotate=0 if dtype == "int16" else 30)
    modality = replace(modality, view=view, normalise=MODALITIES["xray"].normalise)
    pixels = [smooth(shape + depth, dtype, seed) for seed, shape in enumerate(SHAPES)]
    images = [(each, Intensity(float(each.min()), float(each.max()), 0, 1)) for each in pixels]
    level = 4 / (images[0][1].high - images[0][1].low)
    for one, two in zip(on_device(modality, images, SQUARE, 3), on_cpu(modality, images, SQUARE, 3), strict=True):
        assert (one - two).abs().max() < 2 * level + 1e-4
        assert (one - two).abs().mean() < 0.5 * level + 1e-5


@pytest.mark.parametrize("name", MODALITIES)
def test_neutral_views_are_the_image(name: str) -> None:
    neutral = {knob: ViewConfig.model_fields[knob].default for knob in ViewConfig.model_fields}
    modality = replace(MODALITIES[name], view=ViewConfig(**neutral | {"crop": (1, 1), "aspect": (1, 1)}))
    pixels, intensity = scan(modality, (SQUARE, SQUARE))
    (view, _) = on_device(modality, [(pixels, intensity)], SQUARE, 1)
    torch.testing.assert_close(view[0], as_tensor(modality.normalise(pixels, intensity), 1), rtol=0, atol=1e-5)


def test_windows_and_slices_are_the_planes() -> None:
    modality = with_windows(configured("ct", True), ("lung", "brain"))
    images = [scan(modality, (*shape, 3), seed) for seed, shape in enumerate(SHAPES)]
    made, expected = on_device(modality, images, SQUARE, 6), on_cpu(modality, images, SQUARE, 6)
    for one, two in zip(made, expected, strict=True):
        assert one.shape == (len(images), 6, SQUARE, SQUARE)
        torch.testing.assert_close(one, two, rtol=0, atol=2e-3)  # 80 HU wide, of numbers near 1000


def test_grey_beside_colour_is_a_grey_image() -> None:
    modality = configured("photo", True, grey=0.0, noise=0.2)
    grey = scan(modality, (60, 70))
    alone = on_device(modality, [grey], SQUARE, 3)
    beside = on_device(modality, [grey, scan(modality, (64, 64, 3))], SQUARE, 3)
    for one, two in zip(alone, beside, strict=True):
        torch.testing.assert_close(one[0], two[0], rtol=0, atol=1e-5)
        assert (two[0] - two[0, :1]).abs().max() < 1e-5
        assert (two[1] - two[1, :1]).abs().max() > 0.05


# Geometry.


def placed(pixels: Pixels, size: tuple[int, int], **changes: float) -> Pixels:
    numbers = dict.fromkeys(Placement._fields, 0.0) | {"height": pixels.shape[0], "width": pixels.shape[1]} | changes
    placement: Placement[torch.Tensor] = Placement(
        **{name: torch.tensor([number], dtype=torch.float64) for name, number in numbers.items()}
    )
    return device_geometry.place(torch.from_numpy(pixels)[None, None], placement, size)[0, 0].numpy()


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_a_crop_is_resized_as_opencv_does(size: tuple[int, int]) -> None:
    """Larger along both axes, along one, along none, by whole numbers, and where OpenCV hangs on the last digit."""
    noise = np.random.default_rng(0).normal(size=(150, 130)).astype(np.float32)
    for height in (16, 20, 24, 26, 31, 32, 33, 48, 52, 64, 96, 113, 136):
        for width in (17, 26, 32, 39, 40, 52, 68, 80, 104, 120, 123):
            crop = np.ascontiguousarray(noise[5 : 5 + height, 7 : 7 + width])
            method = cv2.INTER_AREA if height > size[0] or width > size[1] else cv2.INTER_LINEAR
            expected = cv2.resize(crop, size[::-1], interpolation=method)
            made = placed(noise, size, top=5, left=7, height=height, width=width)
            np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)


def test_a_flat_image_stays_flat_far_from_its_corner() -> None:
    """Places of thousands have few digits left in float32, the weights of a pixel add up to 1 all the same."""
    flat = np.full((40, 4096), 60000, np.float32)
    for width in (3.0, 17.0, 133.0):
        made = placed(flat, (32, 32), top=7, height=29, left=4096 - width, width=width)
        np.testing.assert_allclose(made, 60000, rtol=2e-6)


def test_a_turn_is_counter_clockwise_and_comes_after_the_mirrors() -> None:
    picture = smooth((24, 24))
    made = placed(picture, (24, 24), columns=1, transposed=1)
    np.testing.assert_allclose(made, np.rot90(picture), rtol=0, atol=1e-3)
    quarter = placed(picture, (24, 24), angle=np.pi / 2)
    np.testing.assert_allclose(quarter, np.rot90(picture), rtol=0, atol=1)  # of 1000


def test_drawn_crops_keep_to_the_image_when_none_fits() -> None:
    """The whole of the longer axis of a strip cannot be had at this aspect: the largest crop in the middle is taken."""
    modality = replace(MODALITIES["xray"], view=ViewConfig(crop=(1, 1), aspect=(0.9, 1.1)))
    images = [scan(modality, (300, 20)), scan(modality, (20, 300))]
    made, expected = on_device(modality, images, SQUARE, 1), on_cpu(modality, images, SQUARE, 1)
    torch.testing.assert_close(made[0], expected[0], rtol=0, atol=1e-4)


# Intensity.


@pytest.mark.parametrize(("height", "width"), [(16, 48), (64, 33)])
def test_a_blur_is_opencvs(height: int, width: int) -> None:
    """A radius beyond the side too: sigma 5 has one of 20."""
    sigmas = torch.tensor([0.05, 0.1, 0.3, 0.0, 0.5, 0.95, 1.3, 2.0, 5.0], dtype=torch.float64)
    views = torch.from_numpy(np.random.default_rng(0).normal(size=(len(sigmas), 2, height, width)).astype(np.float32))
    made = device_intensity._blurred(views, sigmas)
    for sigma, before, after in zip(sigmas.tolist(), views.numpy(), made.numpy(), strict=True):
        for one, two in zip(before, after, strict=True):
            expected = cv2.GaussianBlur(one, (0, 0), sigma) if sigma else one
            np.testing.assert_allclose(two, expected, rtol=0, atol=2e-6)


def test_a_flat_view_stays_finite_under_gamma() -> None:
    modality = configured("xray", True)
    flat = np.full((40, 40), 7, np.uint16)
    for view in on_device(modality, [(flat, whole_image(flat))], SQUARE, 1):
        assert torch.isfinite(view).all()
        assert view.std() < 1e-4


def test_only_known_normalisations_are_rendered() -> None:
    def homemade(pixels: Pixels, intensity: Intensity, *_: Any) -> Pixels:
        return pixels

    with pytest.raises(UsageError, match="'homemade' is not known on the device"):
        DeviceViews((ViewConfig(),), SQUARE, replace(MODALITIES["xray"], normalise=homemade), 1)


# Noise.


def test_philox_gives_the_published_words() -> None:
    """Random123's known answers of philox2x32 with 10 rounds: counter, key, words."""
    for low, high, key, *words in (
        (0x00000000, 0x00000000, 0x00000000, 0xFF1DAE59, 0x6CD10DF2),
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x2C3F628B, 0xAB4FD7AD),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0xDD7CE038, 0xF62A4C12),
    ):
        made = device_intensity.philox(*(torch.tensor([word]) for word in (low, high, key)))
        assert [int(word) for word in made] == words


def noise(keys: list[tuple[int, int]], planes: int = 1, height: int = 64, width: int = 63) -> torch.Tensor:
    low, high = (torch.tensor([key[word] for key in keys], dtype=torch.float64) for word in (0, 1))
    return device_intensity.white_noise(low, high, (len(keys), planes, height, width), torch.device("cpu"))


def test_noise_is_white_and_normal() -> None:
    numbers = np.random.default_rng(0).integers(2**32, size=(60, 2)).tolist()
    drawn = noise(numbers, planes=2)
    each = drawn.double().flatten()
    count = len(each)
    assert abs(each.mean()) < 4 / count**0.5
    assert abs(each.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((each**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((each**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert 4.3 < each.abs().max() < 6.8  # of 480,000 numbers
    for down, across in ((0, 1), (1, 0), (1, 1), (0, 2), (32, 0)):
        moved = drawn.roll((-down, -across), (2, 3))[:, :, : 64 - down, : 63 - across]
        product = drawn[:, :, : 64 - down, : 63 - across] * moved
        assert abs(product.mean()) < 4 / product.numel() ** 0.5, (down, across)
    between = [drawn[:, 0] * drawn[:, 1], drawn[1:, 0] * drawn[:-1, 0]]  # planes, and images
    assert all(abs(product.mean()) < 4 / product.numel() ** 0.5 for product in between)


def test_neighbouring_keys_and_either_word_give_other_noise() -> None:
    drawn = noise([(0, 0), (1, 0), (0, 1), (2**32 - 1, 0), (0, 2**32 - 1)]).flatten(1)
    assert (torch.corrcoef(drawn) - torch.eye(5)).abs().max() < 4 / drawn.shape[1] ** 0.5


def test_noise_is_the_same_alone_beside_others_and_with_fewer_planes() -> None:
    three = noise([(1, 2), (3, 4), (5, 6)], planes=3)
    assert torch.equal(noise([(3, 4)], planes=3)[0], three[1])
    assert torch.equal(noise([(3, 4)], planes=1)[0], three[1, :1])


@pytest.mark.parametrize("name", ["mri", "ct"])
def test_noise_has_the_strength_that_the_cpu_drew(name: str) -> None:
    """Same sigma, other numbers: the same spread for each sample, and nothing in common."""
    quiet, loud = configured(name, True, noise=0.0), configured(name, True, noise=0.3)
    images = sources(quiet)
    for views in range(2):
        ours = (on_device(loud, images, SQUARE, 1)[views] - on_device(quiet, images, SQUARE, 1)[views]).flatten(1)
        theirs = (on_cpu(loud, images, SQUARE, 1)[views] - on_cpu(quiet, images, SQUARE, 1)[views]).flatten(1)
        torch.testing.assert_close(ours.std(1), theirs.std(1), rtol=5 / SQUARE, atol=1e-4)
        assert theirs.std(1).max() > 0.1
        assert abs(torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1]) < 0.05


# What a view depends on.


@pytest.mark.parametrize("name", MODALITIES)
def test_a_view_is_a_function_of_seed_epoch_and_sample_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modality = configured(name, True, noise=0.2)
    images = sources(modality)
    whole = on_device(modality, images, SQUARE, 3)
    for number, image in enumerate(images):
        alone = on_device(modality, [image], SQUARE, 3, first=number)
        for one, two in zip(alone, whole, strict=True):
            torch.testing.assert_close(one[0], two[number], rtol=0, atol=2e-5)
    for one, two in zip(on_device(modality, images, SQUARE, 3), whole, strict=True):
        assert torch.equal(one, two)
    monkeypatch.setattr(device_views, "MOST_VALUES", 1)  # one image at a time
    for one, two in zip(on_device(modality, images, SQUARE, 3), whole, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5)
    other = on_device(modality, images, SQUARE, 3, epoch=1)
    assert all((one - two).abs().amax((1, 2, 3)).min() > 0.05 for one, two in zip(other, whole, strict=True))
    assert (whole[0] - whole[1]).abs().amax((1, 2, 3)).min() > 0.05


def test_autocast_and_gradients_do_not_reach_it() -> None:
    modality = configured("mri", True)
    images = sources(modality)
    plain = on_device(modality, images, SQUARE, 1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = on_device(modality, images, SQUARE, 1)
    for one, two in zip(plain, cast, strict=True):
        assert torch.equal(one, two)
        assert not two.requires_grad


def test_channels_that_do_not_fit_are_refused() -> None:
    modality = MODALITIES["photo"]
    with pytest.raises(UsageError, match="in_chans is 4, but the store holds 3-channel"):
        on_device(modality, [scan(modality, (40, 40, 3))], SQUARE, 4)


def test_what_renders_is_light_and_can_be_sent() -> None:
    modality = with_windows(configured("ct", True), ("lung", "bone"))
    sent = pickle.dumps(DeviceViews((modality.view,) * 2, SQUARE, modality, 2))
    assert len(sent) < 3000
    assert pickle.loads(sent).channels == 2  # noqa: S301


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "every"), SETTINGS)
def test_a_gpu_makes_the_same_views(name: str, every: bool) -> None:
    modality = configured(name, every, noise=0.2)
    images = [(pixels.astype(np.uint16), intensity) for pixels, intensity in sources(configured("xray", False))]
    views = DeviceViews((modality.view,), WIDE, modality, 1)
    drawn = torch.from_numpy(
        np.stack([views.draw([pixels.shape], seed=0, epoch=0, sample=n)[0] for n, (pixels, _) in enumerate(images)])
    )
    stacked = Images.of(images)
    made = views.render(0, stacked.pin_memory().to("cuda", non_blocking=True), drawn)
    torch.testing.assert_close(made.cpu(), views.render(0, stacked, drawn), rtol=0, atol=1e-3)
