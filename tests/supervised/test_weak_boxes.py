"""Boxes around the parts of an image that speak for a class."""

import numpy as np
import pytest

from sslmed.supervised.weak_boxes import MOST, boxes_around


def evidence(*parts: tuple[slice, slice, float]) -> np.ndarray:
    plane = np.zeros((1, 20, 30), np.float32)
    for down, across, value in parts:
        plane[0, down, across] = value
    return plane


def test_a_box_around_each_part_scored_by_its_height() -> None:
    plane = evidence(
        (slice(2, 6), slice(3, 10), 4.0), (slice(12, 15), slice(20, 22), 3.0), (slice(0, 2), slice(28, 30), 1.0)
    )
    found = boxes_around(plane, np.array([0.8]), [0], 0.5)
    expected = [[3, 2, 10, 6, 0.8, 0], [20, 12, 22, 15, 0.6, 0]]  # the third is below half of the range
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_parts_that_touch_at_a_corner_are_one() -> None:
    plane = evidence((slice(2, 4), slice(2, 4), 1.0), (slice(4, 6), slice(4, 6), 1.0))
    assert boxes_around(plane, np.array([1.0]), [0], 0.5)[:, :4].tolist() == [[2, 2, 6, 6]]


def test_flat_evidence_has_no_box() -> None:
    assert boxes_around(np.full((1, 5, 5), 3.0, np.float32), np.array([0.9]), [0], 0.5).shape == (0, 6)


def test_only_located_classes_get_boxes() -> None:
    plane = np.concatenate([evidence((slice(2, 4), slice(2, 4), 1.0)), evidence((slice(7, 9), slice(5, 9), 2.0))])
    found = boxes_around(plane, np.array([0.3, 0.7]), [1], 0.5)
    np.testing.assert_allclose(found, [[5, 7, 9, 9, 0.7, 1]], rtol=1e-6)
    assert boxes_around(plane, np.array([0.3, 0.7]), [0, 1], 0.5)[:, 5].tolist() == [1, 0], "by falling score"


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_greater_share_makes_smaller_boxes(share: float) -> None:
    down, across = np.mgrid[:20, :30]
    hill = np.exp(-((down - 10) ** 2 + (across - 15) ** 2) / 18).astype(np.float32)[None]
    (box,) = boxes_around(hill, np.array([1.0]), [0], share)
    radius = np.sqrt(-18 * np.log(share))
    assert abs((box[2] - box[0]) / 2 - radius) < 1


def test_of_many_parts_the_highest_are_kept() -> None:
    plane = np.zeros((1, 60, 60), np.float32)
    plane[0, ::4, ::4] = np.linspace(0.6, 1, 225).reshape(15, 15)
    found = boxes_around(plane, np.array([1.0]), [0], 0.5)
    assert len(found) == MOST
    assert found[:, 4].min() > 0.95
