import pickle
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import label

from sslmed.data.annotations.boxes import KEPT_SHARE, KEPT_SIDE, Boxes
from sslmed.data.intensity import STILL, Intensity, Jitter
from sslmed.data.modality import MODALITIES
from sslmed.data.views import Augment, ViewConfig

BRIGHT = Intensity(0, 255, 128, 64)
STILL_VIEW: dict[str, Any] = {"crop": (1, 1), "aspect": (1, 1)}
MOVES: dict[str, dict[str, Any]] = {
    "nothing": STILL_VIEW,
    "crop": {"crop": (0.2, 0.9), "aspect": (1, 1)},
    "aspect": {"crop": (0.4, 0.8), "aspect": (0.5, 2)},
    "hflip": STILL_VIEW | {"hflip": 0.5},
    "vflip": STILL_VIEW | {"vflip": 0.5},
    "rot90": STILL_VIEW | {"rot90": 0.8},
    "all": {"crop": (0.3, 0.9), "aspect": (0.6, 1.6), "hflip": 0.5, "vflip": 0.5, "rot90": 0.8},
}


def as_it_is(pixels: np.ndarray, intensity: Intensity, jitter: Jitter = STILL) -> np.ndarray:
    return pixels.astype(np.float32)


def drawn(stream: np.random.Generator, shape: tuple[int, int], count: int = 3, margin: int = 0) -> Boxes:
    """Boxes with corners between pixels, of the classes 0, 1, ..."""
    corners = []
    for _ in range(count):
        ends = [np.sort(stream.choice(np.arange(margin, side - margin), 2, replace=False)) for side in shape]
        corners.append([ends[1][0], ends[0][0], ends[1][1] + 1, ends[0][1] + 1])
    return Boxes(np.array(corners, np.float32), np.arange(count, dtype=np.int16))


def painted(boxes: Boxes, shape: tuple[int, int], round_: bool = False) -> np.ndarray:
    """A plane for each box (H, W, n), 255 inside it, or inside its ellipse, else 0."""
    y, x = (axis + 0.5 for axis in np.mgrid[: shape[0], : shape[1]])
    planes = []
    for left, top, right, bottom in boxes.xyxy:
        across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
        inside = np.hypot(across, down) < 1 if round_ else np.maximum(np.abs(across), np.abs(down)) < 1
        planes.append(np.where(inside, 255, 0))
    return np.stack(planes, axis=2).astype(np.uint8)


def around(plane: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of what is bright, to parts of a pixel: an edge covers what its pixel has of it."""
    ends = []
    for axis in (0, 1):
        profile = plane.max(axis=axis) / 255
        bright = np.flatnonzero(profile > 0.02)
        if not len(bright):
            return np.zeros(4)
        first, last = bright[0], bright[-1]
        ends.append((first + 1 - min(profile[first], 1), last + min(profile[last], 1)))
    return np.array([ends[0][0], ends[1][0], ends[0][1], ends[1][1]])


@pytest.mark.parametrize("size", [64, (48, 80), (120, 72)])
@pytest.mark.parametrize("name", MOVES)
def test_boxes_move_with_what_they_are_around(name: str, size: Any) -> None:
    stream = np.random.default_rng(3)
    augment = Augment((ViewConfig(**MOVES[name]),), size, as_it_is, seed=0)
    seen, gone, moved = 0, 0, 0
    for sample in range(24):
        shape = (int(stream.integers(60, 140)), int(stream.integers(60, 140)))
        boxes = drawn(stream, shape, 4)
        pixels = np.concatenate([painted(boxes, shape), places(shape)], axis=2, dtype=np.float32)
        (view,), (found,) = augment.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=sample)
        kept = dict(zip(found.classes.tolist(), found.xyxy, strict=True))
        assert list(kept) == sorted(kept)
        for number, corners in enumerate(boxes.xyxy):
            plane = view[..., number]
            area = (corners[2] - corners[0]) * (corners[3] - corners[1]) * stretch(view[..., -2:])
            share, end = plane.sum() / 255 / area, around(plane)
            side = min(end[2] - end[0], end[3] - end[1])
            if number in kept:
                seen += 1
                assert np.abs(kept[number] - end).max() < 1.5
                moved += np.abs(kept[number] - corners).max() > 3
                assert share > KEPT_SHARE - 0.06
                assert side > KEPT_SIDE - 1
            else:
                gone += 1
                assert share < KEPT_SHARE + 0.06 or side < KEPT_SIDE + 1
    assert seen > 40
    assert moved > 20
    assert gone > (5 if name in ("crop", "aspect", "all") else -1)


def places(shape: tuple[int, int]) -> np.ndarray:
    """Each pixel's row and column."""
    return np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1)


def stretch(places: np.ndarray) -> float:
    """How much larger areas are in a view of `places`."""
    (down_rows, down_columns), (across_rows, across_columns) = (
        np.median(np.gradient(places, axis=axis), axis=(0, 1)) for axis in (0, 1)
    )
    return float(1 / abs(down_rows * across_columns - down_columns * across_rows))


@pytest.mark.parametrize("size", [96, (72, 110)])
def test_boxes_are_those_of_rotated_ellipses(size: Any) -> None:
    stream = np.random.default_rng(5)
    height, width = size if isinstance(size, tuple) else (size, size)
    shape = (height * 2, width * 2)
    turned: dict[str, Any] = STILL_VIEW | {"rotate": 180, "hflip": 0.5, "vflip": 0.5}
    turned["rot90"] = 0.5 * (height == width)  # else the crop after it would cut them
    augment = Augment((ViewConfig(**turned),), size, as_it_is, seed=0)
    compared = 0
    for sample in range(40):
        boxes = drawn(stream, shape, 3, margin=int(0.2 * min(shape)))
        pixels = painted(boxes, shape, round_=True)
        (view,), (found,) = augment.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=sample)
        for corners, number in zip(found.xyxy, found.classes, strict=True):
            if corners[:2].min() < 2 or (corners[2:] > (width - 2, height - 2)).any():
                continue  # cut, and reflected beside it
            if (boxes.xyxy[number, 2:] - boxes.xyxy[number, :2]).min() < 12:
                continue  # its tips are too thin to be painted
            pieces, _ = label(view[..., number] > 127)  # the others are reflections
            middle = (corners[:2] + corners[2:]).astype(int) // 2
            assert pieces[middle[1], middle[0]]
            rows, columns = np.nonzero(pieces == pieces[middle[1], middle[0]])
            expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(corners - expected).max() < 1.5
            compared += 1
    assert compared > 40


def test_reflections_have_no_box() -> None:
    """A square whose corners are turned out of sight: what fills the view's corners is a mirror image."""
    whole = (100, 100)
    boxes = Boxes(np.array([[0, 0, 12, 12], [44, 0, 56, 12]], np.float32), np.array([0, 1], np.int16))
    augment = Augment((ViewConfig(**STILL_VIEW, rotate=60),), 100, as_it_is, seed=0)
    hidden = 0
    for sample in range(40):
        (view,), (found,) = augment.with_boxes(painted(boxes, whole), boxes, BRIGHT, epoch=0, sample=sample)
        assert found.classes.tolist() in ([0, 1], [1])
        if 0 not in found.classes:
            hidden += 1
        for corners, number in zip(found.xyxy, found.classes, strict=True):
            left, top, right, bottom = corners.astype(int)
            assert view[top : bottom + 1, left : right + 1, number].mean() > 100
    assert hidden > 5


@pytest.mark.parametrize("name", MODALITIES)
def test_views_are_those_of_a_call_without_boxes(name: str) -> None:
    modality = MODALITIES[name]
    stream = np.random.default_rng(0)
    shape = (70, 90, 3) if modality.channels == (3,) else (70, 90)
    pixels = stream.integers(0, 200, shape).astype(np.uint8)
    loud = modality.view.model_copy(update={"rotate": 20.0, "rot90": 0.5, "hflip": 0.5, "vflip": 0.5})
    augment = Augment((loud, modality.view, loud), (40, 56), modality.normalise, seed=1)
    boxes = drawn(stream, shape[:2], 5)
    none = Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int16))
    for sample in range(5):
        plain = augment(pixels, modality.intensity(pixels), epoch=2, sample=sample)
        for given in (boxes, none):
            views, found = augment.with_boxes(pixels, given, modality.intensity(pixels), epoch=2, sample=sample)
            assert len(views) == len(found) == 3
            assert all(np.array_equal(one, two) for one, two in zip(plain, views, strict=True))
        assert [len(each) for each in found] == [0, 0, 0]


def test_some_of_the_views_and_their_boxes() -> None:
    augment = Augment((ViewConfig(crop=(0.3, 0.6), rotate=30, hflip=0.5),) * 3, 48, as_it_is, seed=0)
    boxes = drawn(np.random.default_rng(1), (80, 80), 6)
    pixels = painted(boxes, (80, 80))
    every, moved = augment.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=5)
    again = pickle.loads(pickle.dumps(augment))  # noqa: S301
    (last,), (some,) = again.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=5, which=slice(2, None))
    np.testing.assert_array_equal(last, every[2])
    np.testing.assert_array_equal(some.xyxy, moved[2].xyxy)
    assert len({each.xyxy.tobytes() for each in moved}) == 3


def test_sides_are_measured_in_the_view() -> None:
    """A box 3 pixels wide is left out of a view of half the size, and one 4 pixels wide is not."""
    boxes = Boxes(np.array([[10, 10, 13, 60], [20, 10, 24, 60]], np.float32), np.array([0, 1], np.int16))
    augment = Augment((ViewConfig(**STILL_VIEW),), 64, as_it_is, seed=0)
    _, (found,) = augment.with_boxes(np.zeros((128, 128), np.uint8), boxes, BRIGHT, epoch=0, sample=0)
    assert found.classes.tolist() == [1]
    assert found.xyxy.tolist() == [[10, 5, 12, 30]]


@pytest.mark.parametrize("size", [48, (32, 64)])
def test_boxes_of_tiles_are_moved_by_all_that_moves_the_tile(size: Any) -> None:
    stream = np.random.default_rng(2)
    boxes = drawn(stream, (120, 150), 4)
    pixels = painted(boxes, (120, 150))
    knobs: dict[str, Any] = {"hflip": 0.5, "vflip": 0.5, "rot90": 0.8}
    augment = Augment((ViewConfig(**knobs),), size, as_it_is, seed=0, tile=True)
    turning = Augment((ViewConfig(**knobs, rotate=45),), size, as_it_is, seed=0, tile=True)
    seen, corners = 0, set()
    for sample in range(40):
        (view,), (found,) = augment.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=sample)
        for corner, number in zip(found.xyxy, found.classes, strict=True):
            np.testing.assert_array_equal(corner, around(view[..., number]))
            seen += 1
        _, (turned,) = turning.with_boxes(pixels, boxes, BRIGHT, epoch=0, sample=sample)
        height, width = size if isinstance(size, tuple) else (size, size)
        assert (turned.xyxy >= 0).all()
        assert (turned.xyxy <= (width, height, width, height)).all()
        corners.add(turned.xyxy.tobytes())
    assert seen > 20
    assert len(corners) > 10
