import numpy as np
import pytest

from sslmed.data.annotations.boxes import Boxes, Drawing, fit
from sslmed.data.readers.refusal import RefusedError


def drawing(*corners: tuple[float, float, float, float], size: tuple[int, int] | None = (100, 200)) -> Drawing:
    return Drawing("x.xml", ("x",), size, corners, ("a",) * len(corners))


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
