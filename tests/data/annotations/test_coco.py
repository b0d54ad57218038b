from pathlib import Path

import numpy as np

from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.annotations.boxes import Boxes, fit
from sslmed.data.annotations.coco import write_coco


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    corners = np.array([[0, 1.5, 20, 30], [3.25, 4, 5, 40]], np.float32)
    images = {
        "a/1.png": ((40, 20), Boxes(corners, np.array([1, 0], np.int16))),
        "a/2.png": ((30, 50), Boxes(np.empty((0, 4), np.float32), np.empty(0, np.int16))),
        "b/1.png": ((60, 60), Boxes(corners[:1], np.array([0], np.int16))),
    }
    write_coco(tmp_path / "boxes.json", images, ("nerve", "cell"))
    found = read_boxes(tmp_path / "boxes.json")
    assert found.classes == ("cell", "nerve")
    assert (found.crowds, found.strays) == (0, 0)
    assert {drawing.names[0]: drawing.size for drawing in found.images} == {
        key: size for key, (size, _) in images.items()
    }
    for drawing in found.images:
        size, boxes = images[drawing.names[0]]
        again, clipped = fit(drawing, size, {"nerve": 0, "cell": 1})
        np.testing.assert_array_equal(again.xyxy, boxes.xyxy)
        np.testing.assert_array_equal(again.classes, boxes.classes)
        assert not clipped
