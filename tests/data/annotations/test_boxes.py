import numpy as np
import pytest

from sslmed.data.annotations.boxes import KEPT_SHARE, KEPT_SIDE, Boxes, Drawing, fit
from sslmed.data.readers.refusal import RefusedError


def drawing(*corners: tuple[float, float, float, float], size: tuple[int, int] | None = (100, 200)) -> Drawing:
    return Drawing("x.xml", ("x",), size, corners, ("a",) * len(corners))


def made(*corners: tuple[float, float, float, float]) -> Boxes:
    """Boxes of the classes 0, 1, ..."""
    return Boxes(np.array(corners, np.float32).reshape(-1, 4), np.arange(len(corners), dtype=np.int16))


def test_boxes_are_held_as_they_are() -> None:
    boxes, clipped = fit(drawing((0, 0, 200, 100), (1.5, 2, 3, 4.25)), (100, 200), {"a": 3})
    assert boxes.xyxy.tolist() == [[0, 0, 200, 100], [1.5, 2, 3, 4.25]]
    assert (boxes.classes.tolist(), clipped, len(boxes)) == ([3, 3], 0, 2)
    with pytest.raises(ValueError, match="read-only"):
        boxes.xyxy[0] = 1


def test_up_to_a_pixel_outside_is_clipped_and_counted() -> None:
    boxes, clipped = fit(drawing((-1, -0.5, 201, 101), (5, 5, 9, 9)), (100, 200), {"a": 0})
    assert (boxes.xyxy.tolist(), clipped) == ([[0, 0, 200, 100], [5, 5, 9, 9]], 1)


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ((-1.1, 0, 9, 9), "leads out of the image of 100 x 200"),
        ((0, 0, 9, 101.5), "leads out"),
        ((9, 0, 5, 9), "reversed"),
        ((0, 9, 5, 8), "reversed"),
        ((3, 0, 3, 9), "without area"),
        ((0, 0, float("nan"), 9), "not finite"),
        ((0, 0, float("inf"), 9), "not finite"),
        ((200.2, 5, 200.9, 9), "without area inside"),
        ((1e8, 0, 1e8 + 1, 9), "leads out"),
        ((5.0, 0, 5.0 + 1e-12, 9), "without area inside"),
    ],
)
def test_what_is_no_box_is_refused(box: tuple[float, float, float, float], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        fit(drawing((1, 1, 2, 2), box), (100, 200), {"a": 0})


def test_the_size_must_be_the_images() -> None:
    with pytest.raises(RefusedError, match=r"of 200 x 100 pixels .* has 100 x 200; it was drawn .* EXIF"):
        fit(drawing(size=(200, 100)), (100, 200), {})
    with pytest.raises(RefusedError, match=r"has 100 x 200$"):
        fit(drawing(size=(100, 199)), (100, 200), {})
    assert len(fit(drawing(size=None), (100, 200), {})[0]) == 0  # an image of which is said that it holds none


def test_boxes_scale_with_the_image_and_stay_inside() -> None:
    boxes = Boxes(np.array([[0, 0, 640, 480], [64, 48, 128, 96]], np.float32), np.array([0, 1], np.int16))
    for target in [(240, 320), (224, 299), (17, 16)]:
        scaled = boxes.scaled((480, 640), target)
        np.testing.assert_allclose(scaled.xyxy[1], np.array([0.1, 0.1, 0.2, 0.2]) * (target[::-1] * 2), rtol=1e-6)
        assert scaled.xyxy[0].tolist() == [0, 0, target[1], target[0]]


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ((3, 0, 3, 9), "no area"),
        ((0, 4, 3, 4), "no area"),
        ((9, 0, 5, 9), "reversed"),
        ((0, 9, 5, 8), "reversed"),
        ((0, 0, float("nan"), 9), "not finite"),
        ((0, 0, 5, float("inf")), "not finite"),
        ((float("-inf"), 0, 5, 5), "not finite"),
    ],
)
def test_there_are_no_other_boxes(box: tuple[float, float, float, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        made((0, 0, 1, 1), box)
    assert len(made()) == 0


def test_rounding_takes_no_area() -> None:
    """Of boxes thinner than float32 tells apart at the other side of the image, or at another scale."""
    thin = made((0, 0, 1e-7, 4), (0, 0, 4, 1e-7), (639, 0, np.nextafter(np.float32(639), np.float32(640)), 4))
    every = [thin.flipped((480, 640), down, across) for down in (False, True) for across in (False, True)]
    every += [thin.turned((480, 640), turns) for turns in range(4)]
    every += [thin.scaled((480, 640), target) for target in ((1, 1), (97, 333), (4801, 6401))]
    every += [made((0, 0, 1e-45, 4)).scaled((480, 640), (1, 1))]
    for boxes in every:
        assert len(boxes) in (1, 3)  # and they were made: they have an area
        assert boxes.xyxy.min() >= 0


def test_quarter_turns_are_those_of_the_image() -> None:
    picture = np.zeros((40, 60), np.uint8)
    picture[5:12, 20:50] = 1
    for turns in range(-1, 6):
        rows, columns = np.nonzero(np.rot90(picture, turns))
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert made((20, 5, 50, 12)).turned((40, 60), turns).xyxy.tolist() == [expected]


def test_a_window_shifts_scales_and_clips() -> None:
    boxes = made((10, 20, 30, 50), (0, 0, 100, 200), (35, 60, 45, 70))
    seen = boxes.within(15, 5, 50, 40)
    assert seen.xyxy.tolist() == [[5, 5, 25, 35], [30, 45, 40, 50]]  # the large one shows 2000 of 20000 square pixels
    assert seen.classes.tolist() == [0, 2]
    seen = boxes.within(15, 5, 50, 40, (100, 20))
    assert seen.xyxy.tolist() == [[2.5, 10, 12.5, 70], [15, 90, 20, 100]]
    assert len(boxes.within(300, 300, 10, 10)) == 0
    assert len(made().within(0, 0, 10, 10)) == 0


def test_what_a_window_shows_too_little_of_is_left_out() -> None:
    whole = made((0, 0, 16, 16))
    assert KEPT_SHARE == 0.25
    assert whole.within(8, 8, 64, 64).xyxy.tolist() == [[0, 0, 8, 8]]  # a quarter is just enough
    assert len(whole.within(8, 8.1, 64, 64)) == 0
    assert len(whole.within(0, 12, 64, 64)) == 1
    assert len(whole.within(0, 12.1, 64, 64)) == 0
    assert KEPT_SIDE == 2
    assert len(whole.within(0, 0, 64, 64, (8, 8))) == 1  # 2 x 2 pixels of what is seen
    assert len(whole.within(0, 0, 64, 64, (8, 7))) == 0
    assert len(whole.within(0, 0, 64, 64, (7, 8))) == 0
    assert len(made((0, 0, 5, 50)).within(0, 3.1, 64, 64)) == 0  # 38 % of it, 1.9 pixels wide
