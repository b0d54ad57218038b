import math

import numpy as np
import pytest

from sslmed.data.annotations.boxes import Boxes
from sslmed.data.box_moves import follow, rotated

SIZE = (100, 140)


def about_the_middle(degrees: float) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = SIZE[1] / 2, SIZE[0] / 2
    return np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]])


def boxes(*corners: tuple[float, ...]) -> Boxes:
    return Boxes(np.array(corners, np.float32), np.zeros(len(corners), np.int16))


@pytest.mark.parametrize("degrees", [-70, -20, 0, 33, 45, 90, 170])
def test_the_box_around_a_rotated_ellipse(degrees: float) -> None:
    """Against the points of its outline, and of a disc, whose box keeps its size."""
    given = boxes((50, 40, 86, 52), (70, 40, 90, 60))
    found = rotated(given, SIZE, about_the_middle(degrees))
    turn = np.linspace(0, 2 * np.pi, 20001)
    for (left, top, right, bottom), box in zip(given.xyxy, found.xyxy, strict=True):
        x = (left + right) / 2 + (right - left) / 2 * np.cos(turn)
        y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(turn)
        x, y = about_the_middle(degrees) @ np.stack([x, y, np.ones_like(x)])
        np.testing.assert_allclose(box, [x.min(), y.min(), x.max(), y.max()], atol=1e-4)
    np.testing.assert_allclose(found.xyxy[1, 2:] - found.xyxy[1, :2], 20, atol=1e-4)


def test_what_leaves_the_frame_goes_and_what_is_cut_is_clipped() -> None:
    """A quarter turn of a frame that is wider than high."""
    given = boxes((0, 0, 20, 20), (120, 80, 140, 100), (25, 40, 45, 60), (10, 40, 26, 56))
    found = rotated(given, SIZE, about_the_middle(90))
    np.testing.assert_allclose(found.xyxy, [[60, 75, 80, 95], [60, 94, 76, 100]], atol=1e-4)


def test_a_step_that_is_not_known_is_a_bug() -> None:
    class Shear:
        def get_applied_params(self) -> dict[str, object]:
            return {"shape": SIZE}

    with pytest.raises(KeyError, match="Shear"):
        follow(boxes((0, 0, 5, 5)), [Shear()])
