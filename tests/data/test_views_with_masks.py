import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.data.intensity import STILL, Intensity, Jitter
from sslmed.data.modality import MODALITIES, Bound
from sslmed.data.views import Augment, ViewConfig

SIZE = 32
XRAY = MODALITIES["xray"]
SQUARE: dict[str, Any] = {"crop": (1, 1), "aspect": (1, 1)}
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
RGB = RANDOM.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def to(high: float) -> Intensity:
    """From 0."""
    return Intensity(0, high, high / 2, high / 4)


def as_it_is(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
    return pixels.astype(np.float32)


def normalised(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
    return (pixels.astype(np.float32) / np.float32(intensity.high) - np.float32(jitter.level)) / np.float32(
        jitter.width
    )


def places(height: int, width: int) -> np.ndarray:
    """Each pixel's row and column."""
    return np.stack(np.mgrid[:height, :width], axis=-1).astype(np.uint16)


@st.composite
def legal_views(draw: st.DrawFn, name: str) -> ViewConfig:
    """Any settings that are legal for a modality."""

    def number(bound: Bound) -> float:
        return draw(st.one_of(st.sampled_from(bound), st.floats(*bound)))

    knobs: dict[str, Any] = {}
    for knob, bound in MODALITIES[name].legal.items():
        both = isinstance(getattr(ViewConfig(), knob), tuple)
        knobs[knob] = tuple(sorted((number(bound), number(bound)))) if both else number(bound)
    return ViewConfig(**knobs)


@pytest.mark.parametrize("name", MODALITIES)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_masks_are_never_blurred(name: str, data: st.DataObject) -> None:
    """Values of the mask that comes out are values of the one that went in: classes are not mixed, void stays void."""
    modality = MODALITIES[name]
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]))
    planes = data.draw(st.sampled_from([(), (3,)] if 3 in modality.channels else [(), (3,), (5,), (9,)]))
    height, width = data.draw(st.tuples(st.integers(17, 70), st.integers(17, 70)))
    size = data.draw(st.sampled_from([16, 33, (16, 24), (40, 17)]))
    tile = data.draw(st.booleans()) and min(height, width) >= 40
    values = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=4, unique=True))
    stream = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = (stream.random((height, width, *planes)) * 250).astype(dtype)
    mask = stream.choice(np.array(values, np.uint8), (height, width))
    augment = Augment((data.draw(legal_views(name)),) * 2, size, modality.normalise, seed=0, tile=tile)
    made, moved = augment.with_mask(pixels, mask, modality.intensity(pixels), epoch=1, sample=2)
    shape = size if isinstance(size, tuple) else (size, size)
    assert len(made) == len(moved) == 2
    for view, part in zip(made, moved, strict=True):
        assert (view.shape, view.dtype) == ((*shape, *planes), np.float32)
        assert (part.shape, part.dtype) == (shape, np.uint8)
        assert set(np.unique(part)) <= set(np.unique(mask))
    if not tile:  # the mask does not decide what is seen
        alone = augment(pixels, modality.intensity(pixels), epoch=1, sample=2)
        assert all(np.array_equal(one, two) for one, two in zip(alone, made, strict=True))


def ellipse(height: int, width: int) -> np.ndarray:
    """255 inside, off the middle, 0 outside."""
    rows, columns = np.mgrid[:height, :width]
    away = ((rows - 0.45 * height) / (0.3 * height)) ** 2 + ((columns - 0.55 * width) / (0.3 * width)) ** 2
    return np.where(away < 1, 255, 0).astype(np.uint8)


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return float(2 * (one & two).sum() / (one.sum() + two.sum()))


GEOMETRY = {"crop", "aspect", "hflip", "vflip", "rot90", "rotate"}
TURNING: dict[str, Any] = {"hflip": 0.5, "vflip": 0.5, "rot90": 0.8, "rotate": 40}


@pytest.mark.parametrize("name", MODALITIES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_mask_moves_with_its_image(name: str, data: st.DataObject) -> None:
    """An image that equals its mask still does, but for what is interpolated at edges."""
    knobs = data.draw(legal_views(name)).model_dump(include=GEOMETRY)
    knobs["crop"] = tuple(max(0.3, end) for end in knobs["crop"])  # so that most of the shape is seen
    height, width = data.draw(st.tuples(st.integers(60, 300), st.integers(60, 300)))
    size = data.draw(st.sampled_from([64, 128, (96, 64), (64, 96)]))
    shape = ellipse(height, width)
    augment = Augment((ViewConfig(**knobs),), size, as_it_is, seed=0)
    for pixels in (shape, shape.astype(np.uint16), shape.astype(np.int16), np.dstack([shape] * 5)):
        (view,), (mask,) = augment.with_mask(pixels, shape, to(255), epoch=0, sample=data.draw(st.integers(0, 99)))
        first = view.reshape(*view.shape[:2], -1)[..., 0]
        assert mask.any()
        assert dice(first > 127, mask > 0) > 0.97


@pytest.mark.parametrize("shape", [(200, 260), (48, 40)], ids=["reduced", "enlarged"])
def test_a_mask_lies_where_its_image_does(shape: tuple[int, int]) -> None:
    """OpenCV's plain nearest neighbour would read it up to half a pixel off, always in one direction."""
    whole = ellipse(*shape)
    augment = Augment((ViewConfig(crop=(0.6, 0.8), aspect=(1, 1)),), 64, as_it_is, seed=0)
    away = []
    for sample in range(60):
        (view,), (mask,) = augment.with_mask(whole, whole, to(255), epoch=0, sample=sample)
        centres = [[(grid * each).sum() / each.sum() for grid in np.mgrid[:64, :64]] for each in (view, mask / 1.0)]
        away.append(np.subtract(*centres))
    assert np.abs(np.mean(away, axis=0)).max() < 0.1


def test_a_mask_is_reflected_at_the_border_as_its_image_is() -> None:
    whole = np.full((40, 40), 200, np.uint8)
    augment = Augment((ViewConfig(**SQUARE, rotate=45),), SIZE, as_it_is, seed=0)
    for sample in range(10):
        (view,), (mask,) = augment.with_mask(whole, whole, to(255), epoch=0, sample=sample)
        assert (mask == 200).all()
        assert (view == 200).all()


def test_intensity_steps_do_not_see_the_mask() -> None:
    loud = {"brightness": 4, "contrast": 1, "gamma": 1, "blur": 1, "noise": 1, "solarize": 1, "window": 0.5}
    mask = RANDOM.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    augment = Augment((ViewConfig(**SQUARE, **loud, stain=0.5, colour=1, grey=1),), SIZE, normalised, seed=0)
    (view,), (same,) = augment.with_mask(RGB, mask, to(255), epoch=0, sample=0)
    assert not np.allclose(view, normalised(RGB, to(255)), atol=0.1)
    np.testing.assert_array_equal(same, mask)


def test_some_of_the_views_and_their_masks() -> None:
    augment = Augment((XRAY.view,) * 3, SIZE, XRAY.normalise, seed=0)
    mask = RANDOM.integers(0, 3, GREY.shape, dtype=np.uint8)
    every, parts = augment.with_mask(GREY, mask, to(65535), epoch=0, sample=5)
    (last,), (part,) = augment.with_mask(GREY, mask, to(65535), epoch=0, sample=5, which=slice(2, None))
    np.testing.assert_array_equal(last, every[2])
    np.testing.assert_array_equal(part, parts[2])


# Tiles.


def tiled(config: dict[str, Any], size: Any = SIZE) -> Augment:
    return Augment((ViewConfig(**config),), size, as_it_is, seed=0, tile=True)


def test_a_tile_is_seen_at_the_resolution_of_the_image() -> None:
    pixels = places(90, 120)
    mask = (pixels.sum(axis=2) % 251).astype(np.uint8)
    for config in ({}, {"crop": (0.1, 0.2), "aspect": (2, 2)}):  # which are for crops
        corners = set()
        for sample in range(20):
            (view,), (part,) = tiled(config, (32, 48)).with_mask(pixels, mask, to(255), epoch=0, sample=sample)
            top, left = (int(value) for value in view[0, 0])
            place = slice(top, top + 32), slice(left, left + 48)
            np.testing.assert_array_equal(view, pixels[place])
            np.testing.assert_array_equal(part, mask[place])
            corners.add((top, left))
        assert len(corners) == 20


def test_tiles_are_keyed_and_need_no_mask() -> None:
    pixels = places(90, 120)[..., 1]
    augment = tiled({"rotate": 10, "hflip": 0.5})
    made = [augment(pixels, to(65535), epoch=epoch, sample=sample)[0] for epoch in range(3) for sample in range(3)]
    assert len({view.tobytes() for view in made}) == 9
    again = pickle.loads(pickle.dumps(augment))(pixels, to(65535), epoch=2, sample=1)[0]  # noqa: S301
    np.testing.assert_array_equal(again, made[7])


@pytest.mark.parametrize("size", [48, (32, 64)])
def test_tiles_are_turned_and_their_masks_with_them(size: Any) -> None:
    shape = ellipse(120, 150)
    for sample in range(20):
        (view,), (mask,) = tiled(TURNING, size).with_mask(shape, shape, to(255), epoch=0, sample=sample)
        assert view.shape == mask.shape == (size if isinstance(size, tuple) else (size, size))
        if min(mask.mean(), 255 - mask.mean()) > 25:  # else there is little to compare
            assert dice(view > 127, mask > 0) > 0.97


def test_tiles_are_flipped() -> None:
    pixels = places(64, 64)[..., 1]
    made = np.stack([tiled({"hflip": 0.5})(pixels, to(65535), epoch=0, sample=sample)[0] for sample in range(60)])
    flipped = np.diff(made, axis=2).mean(axis=(1, 2)) < 0
    assert 0.3 < flipped.mean() < 0.7
