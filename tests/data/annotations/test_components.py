import numpy as np

from sslmed.data.annotations.components import boxes_around


def test_each_piece_of_each_class_has_a_box() -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[0:4, 0:3] = 3
    mask[10:12, 5:25] = 1
    mask[15:20, 28:30] = 1
    mask[11, 8:10] = 255  # leaves a gap, not two pieces
    mask[13, 2] = 255  # counts for nothing
    boxes = boxes_around(mask)
    assert boxes.xyxy.tolist() == [[5, 10, 25, 12], [28, 15, 30, 20], [0, 0, 3, 4]]
    assert boxes.classes.tolist() == [0, 0, 2]


def test_pixels_that_touch_at_a_corner_hang_together() -> None:
    mask = np.diag([2, 2, 2, 0, 2, 2]).astype(np.uint8)
    assert boxes_around(mask).xyxy.tolist() == [[0, 0, 3, 3], [4, 4, 6, 6]]
    mask[1, 1] = 1  # of another class: what is left of the first piece is specks
    assert boxes_around(mask).xyxy.tolist() == [[4, 4, 6, 6]]
    assert boxes_around(mask).classes.tolist() == [1]


def test_specks_get_no_box() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[1, 1] = mask[3, 2:8] = mask[5:8, 0] = 1  # a pixel, and lines of one
    mask[5:7, 4:6] = 1
    assert boxes_around(mask).xyxy.tolist() == [[4, 5, 6, 7]]


def test_what_shows_nothing_has_no_boxes() -> None:
    for value in (0, 255):
        boxes = boxes_around(np.full((5, 6), value, np.uint8))
        assert boxes.xyxy.shape == (0, 4)
        assert boxes.classes.dtype == np.int16
