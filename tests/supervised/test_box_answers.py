"""What is written of boxes, number by number, of answers made by hand."""

import csv
import json
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sslmed.artifact import HeadCard
from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.intensity import Intensity
from sslmed.data.scan import NiftiGrid, Scan
from sslmed.evaluation.detected_boxes import Found
from sslmed.evaluation.explain import LABEL_COLOURS
from sslmed.supervised.answered import Answered
from sslmed.supervised.box_answers import BOXES, COCO, COLUMNS, BoxFiles, boxes_on, cells, objects
from sslmed.supervised.model import Model

CLASSES = ("RBC", "WBC")
Box = tuple[float, float, float, float]
NOTHING = dict.fromkeys(COLUMNS[10:17], "")


def model(weak: bool = False) -> Model:
    """Thresholds 0.3 and 0.6."""
    about = HeadCard(
        name="weak_localization" if weak else "localization",
        target="finding",
        kind="class" if weak else "boxes",
        classes=CLASSES,
        config={},
        thresholds=(0.3, 0.6),
        weak=weak,
    )
    card = SimpleNamespace(backbone=SimpleNamespace(name="test_resnet"), slices=1)
    head = SimpleNamespace(locates=weak, located=(1,))
    return Model(cast(Any, card), about, cast(Any, SimpleNamespace(head=head)), None)


def found(*boxes: tuple[Box, float, int]) -> Found:
    return Found(
        np.array([box for box, _, _ in boxes], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in boxes], np.float64),
        np.array([label for _, _, label in boxes], np.int16),
    )


def answered(each: list[Found], name: str = "a.png", size: tuple[int, int] = (20, 30), **scan: Any) -> Answered:
    """An image of 20 x 30 pixels, or a scan of as many slices as there are ``each``."""
    kind = scan.setdefault("kind", "image")
    shape = size if kind == "image" else (len(each), *size)
    spacing = scan.pop("spacing", None)
    whole = Scan(np.zeros(shape, np.uint8), spacing, Path(name), **scan)
    return Answered(name, whole, len(each), PurePosixPath(name).with_suffix(""), found=each)


def written(folder: Path, *scans: Answered, weak: bool = False) -> tuple[list[dict[str, str]], dict[str, Any]]:
    asked = model(weak)
    files = BoxFiles(asked)
    for scan in scans:
        files.add(scan, objects(scan, asked))
    files.write(folder)
    with (folder / BOXES).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((folder / COCO).read_text())


def corners(line: dict[str, str]) -> list[float]:
    return [float(line[edge]) for edge in ("left", "top", "right", "bottom")]


IMAGE = found(((2, 3, 12, 9), 0.9, 1), ((0, 0, 5, 5), 0.59, 1), ((1.5, 4.25, 7, 8), 0.3, 0), ((0, 0, 5, 5), 0.2, 0))


def test_an_image(tmp_path: Path) -> None:
    lines, coco = written(tmp_path, answered([IMAGE]), answered([found()], "b/c.png"))
    assert list(lines[0]) == list(COLUMNS)
    plain = {"file": "a.png", "part": "", "slice_first": "", "slice_last": "", "weak": "no"} | NOTHING
    edges = {"left": "2", "top": "3", "right": "12", "bottom": "9"}
    assert lines[0] == plain | edges | {"class": "WBC", "score": "0.900000"}
    edges = {"left": "1.5", "top": "4.25", "right": "7", "bottom": "8"}
    assert lines[1] == plain | edges | {"class": "RBC", "score": "0.300000"}
    assert len(lines) == 2, "0.59 and 0.2 lie below their thresholds"
    assert coco["images"] == [
        {"id": 1, "file_name": "a.png", "height": 20, "width": 30},
        {"id": 2, "file_name": "b/c.png", "height": 20, "width": 30},
    ]
    assert coco["categories"] == [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}]
    first, second = coco["annotations"]
    assert first == {
        **{"id": 1, "image_id": 1, "category_id": 2, "bbox": [2, 3, 10, 6]},
        **{"area": 60, "score": 0.9, "iscrowd": 0},
    }
    assert (second["id"], second["category_id"], second["bbox"]) == (2, 1, [1.5, 4.25, 5.5, 3.75])
    assert coco["info"]["weak"] is False
    assert "localization on test_resnet" in coco["info"]["description"]


def test_lines_and_counts() -> None:
    asked, scan = model(), answered([IMAGE])
    there = objects(scan, asked)
    assert cells(scan, asked, there) == {
        "boxes:RBC": 1,
        "boxes:WBC": 1,
        "highest:RBC": "0.300000",
        "highest:WBC": "0.900000",
    }
    low = answered([found(((0, 0, 5, 5), 0.25, 0))])
    assert cells(low, asked, objects(low, asked)) == {
        "boxes:RBC": 0,
        "boxes:WBC": 0,
        "highest:RBC": "0.250000",
        "highest:WBC": "",
    }
    files = BoxFiles(asked)
    for each in (scan, low, scan):
        files.add(each, objects(each, asked))
    assert (files.scans, files.holding, dict(files.counts)) == (3, 2, {"WBC": 2, "RBC": 2})


def test_nothing_found_is_a_table_without_lines(tmp_path: Path) -> None:
    lines, coco = written(tmp_path, answered([found()]))
    assert lines == []
    assert (tmp_path / BOXES).read_text().strip() == ",".join(COLUMNS)
    assert coco["annotations"] == []
    assert len(coco["images"]) == 1


def test_millimetres_of_an_image(tmp_path: Path) -> None:
    (line, _), _ = written(tmp_path, answered([IMAGE], spacing=(0.5, 0.25)))
    assert [float(line[f"{edge}_mm"]) for edge in ("left", "top", "right", "bottom")] == [0.5, 1.5, 3, 4.5]
    assert (float(line["width_mm"]), float(line["height_mm"]), line["depth_mm"]) == (2.5, 3, "")


@pytest.mark.parametrize(
    ("flipped", "expected"),
    [
        ((False, False, False), [2, 3, 12, 9]),
        ((False, True, False), [2, 11, 12, 17]),
        ((False, False, True), [18, 3, 28, 9]),
        ((False, True, True), [18, 11, 28, 17]),
    ],
)
def test_boxes_lie_as_the_file_lies(flipped: tuple[bool, bool, bool], expected: list[float], tmp_path: Path) -> None:
    scan = answered([IMAGE], flipped=flipped, spacing=(1.0, 2.0))
    lines, coco = written(tmp_path, scan)
    assert corners(lines[0]) == expected
    left, top, right, bottom = expected
    assert coco["annotations"][0]["bbox"] == [left, top, right - left, bottom - top]
    assert (float(lines[0]["left_mm"]), float(lines[0]["bottom_mm"])) == (2 * left, bottom)


# Volumes and clips.

DEEP = [
    found(),
    found(((2, 3, 12, 9), 0.7, 1)),
    found(((3, 3, 13, 9), 0.9, 1), ((20, 10, 25, 15), 0.5, 0)),
    found(((20, 10, 25, 15), 0.1, 0)),  # below its threshold
    found(((2, 2, 12, 9), 0.8, 1)),
]


def test_a_volume(tmp_path: Path) -> None:
    lines, coco = written(tmp_path, answered([IMAGE]), answered(DEEP, "v.nii.gz", kind="volume", spacing=(3.0, 0.5, 2)))
    assert [line["file"] for line in lines] == ["a.png", "a.png", "v.nii.gz", "v.nii.gz"]
    white, red = lines[2:]
    assert (white["class"], white["score"], white["slice_first"], white["slice_last"]) == ("WBC", "0.900000", "2", "5")
    assert corners(white) == [2, 2, 13, 9]
    assert [float(white[name]) for name in COLUMNS[10:17]] == [4, 1, 26, 4.5, 22, 3.5, 12]
    assert (red["class"], red["slice_first"], red["slice_last"], red["depth_mm"]) == ("RBC", "3", "3", "3")
    assert [image["file_name"] for image in coco["images"]] == ["a.png", *(f"v.nii.gz#{at}" for at in range(1, 6))]
    own = [(each["image_id"], each["object"], each["score"]) for each in coco["annotations"][2:]]
    assert own == [(3, 1, 0.7), (4, 1, 0.9), (6, 1, 0.8), (4, 2, 0.5)]
    assert "object" not in coco["annotations"][0]
    assert coco["annotations"][4]["bbox"] == [2, 2, 10, 7]


def test_a_nifti_volume_counts_the_files_own_voxels(tmp_path: Path) -> None:
    """The file's first axis runs to the right as the slices' columns do, the others against rows and slices."""
    turn = np.array([[0, 1], [1, -1], [2, -1]], np.int8)
    grid = NiftiGrid((30, 20, 5), turn, np.zeros(25))
    scan = answered(DEEP, "v.nii", kind="volume", flipped=(False, True, True), grid=grid)
    (white, red), coco = written(tmp_path, scan)
    assert (white["slice_first"], white["slice_last"], red["slice_first"]) == ("1", "4", "3")
    assert corners(white) == [2, 11, 13, 18]
    assert corners(red) == [20, 5, 25, 10]
    assert sorted(each["image_id"] for each in coco["annotations"]) == [1, 3, 3, 4]
    voxels = np.zeros((5, 20, 30), bool)
    voxels[1:5, 2:9, 2:13] = True
    i, j, k = np.nonzero(voxels[::-1, ::-1].transpose(2, 1, 0))  # as `writers.write_nifti` turns a mask
    assert [i.min(), j.min(), i.max() + 1, j.max() + 1] == corners(white)
    assert (k.min() + 1, k.max() + 1) == (1, 4)


def test_a_clip_has_frames_and_no_millimetres(tmp_path: Path) -> None:
    lines, coco = written(tmp_path, answered(DEEP, "c.tif", kind="clip", spacing=(0.5, 2.0)))
    assert (lines[0]["slice_first"], lines[0]["slice_last"]) == ("2", "5")
    assert {lines[0][name] for name in COLUMNS[10:17]} == {""}
    assert coco["annotations"][0]["object"] == 1


def test_parts_of_a_file_have_names_of_their_own(tmp_path: Path) -> None:
    one, two = (answered([IMAGE], "m.npz", part=part) for part in ("train/1", "train/2"))
    lines, coco = written(tmp_path, one, two, answered([found()] * 2, "m.npz", kind="volume", part="3"))
    assert [line["part"] for line in lines] == ["train/1", "train/1", "train/2", "train/2"]
    names = [image["file_name"] for image in coco["images"]]
    assert names == ["m.npz#train/1", "m.npz#train/2", "m.npz#3#1", "m.npz#3#2"]


# Pictures.


def shown(count: int) -> list[tuple[Any, Intensity]]:
    """Slices of 60 x 90, each a little brighter than the one before."""
    return [(np.full((60, 90), 10 * at, np.uint8), Intensity(0, 100, 50, 10)) for at in range(count)]


def test_the_picture_lies_as_the_file_lies() -> None:
    scan = answered([found(((10, 20, 40, 50), 0.9, 1))], size=(60, 90), flipped=(False, True, True))
    pixels = np.full((60, 90), 20, np.uint8)
    pixels[:5, :5] = 70
    picture = boxes_on(scan, model(), [(pixels, Intensity(0, 100, 50, 10))])
    edges = np.zeros((60, 90), bool)
    edges[10:40, 50:80] = True
    edges[11:39, 51:79] = False
    assert (picture[edges] == LABEL_COLOURS[1]).all()
    edges[3:10, 50:83] = True  # the words above
    assert (picture[:55, :85][~edges[:55, :85]] == 51).all()
    assert (picture[55:, 85:] == round(0.7 * 255)).all()


def test_the_picture_is_the_slice_with_the_highest_score() -> None:
    volume = answered(DEEP, "v.nii", (60, 90), kind="volume", flipped=(False, True, True))
    picture = boxes_on(volume, model(), shown(5))
    assert (picture[40:] == round(0.2 * 255)).all(), "the third slice"
    assert (picture[8, 3:13] == LABEL_COLOURS[1]).all(), "of a volume a slice is shown as viewers show it"


def test_the_picture_without_a_box_is_the_middle_slice_as_it_is() -> None:
    low = [found(((2, 3, 12, 9), 0.1, 1)), *[found()] * 4]
    picture = boxes_on(answered(low, "v.nii", (60, 90), kind="volume"), model(), shown(5))
    assert (picture == round(0.2 * 255)).all()


# Boxes from labels alone.


def test_weak_boxes_say_so_in_every_file(tmp_path: Path) -> None:
    scan = answered([found(((2, 3, 12, 9), 0.9, 1))])
    (line,), coco = written(tmp_path, scan, weak=True)
    assert line["weak"] == "yes"
    assert coco["info"]["weak"] is True
    assert "boxes come from class labels alone" in coco["info"]["description"]
    asked = model(weak=True)
    assert list(cells(scan, asked, objects(scan, asked))) == ["boxes:WBC", "highest:WBC"], "of classes it looks for"


# What others read.


def test_the_json_is_read_as_boxes_of_its_images(tmp_path: Path) -> None:
    exact = found(((0.1, 0.2, 29.9, 20.0), 0.9, 1), ((1 / 3, 1 / 7, 29.999998, 19.3), 0.4, 0))
    written(tmp_path, answered([exact]), answered([found()], "b.png"))
    drawings = read_boxes(tmp_path / COCO)
    assert drawings.classes == CLASSES
    first, second = drawings.images
    assert (first.names, first.size, first.classes) == (("a.png",), (20, 30), ("WBC", "RBC"))
    np.testing.assert_array_equal(np.array(first.corners, np.float32), exact.xyxy)
    assert max(box[2] for box in first.corners) <= 30
    assert (second.corners, second.fault) == ((), "")


def test_the_json_is_read_as_results(tmp_path: Path) -> None:
    coco_eval = pytest.importorskip("faster_coco_eval")
    _, coco = written(tmp_path, answered([IMAGE]), answered(DEEP, "v.nii", kind="volume"))
    expected = coco_eval.COCO(str(tmp_path / COCO))
    results = expected.loadRes(coco["annotations"])
    evaluation = coco_eval.COCOeval_faster(expected, results, "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1), "found in itself"
