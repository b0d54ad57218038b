import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslmed.config import DataError, MissingInputError
from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.annotations.boxes import Drawings

COCO: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 200, "height": 100},
        {"id": 2, "file_name": "sub\\b.jpg", "width": 64, "height": 48},
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [10, 20, 30.5, 40], "area": 1, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 200, 100]},
        {"id": 3, "image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ],
    "categories": [{"id": 7, "name": "wbc"}, {"id": 3, "name": "RBC"}],
}

VOC = """<?xml version="1.0"?>
<annotation>
  <folder>x</folder><filename>other.jpg</filename>
  <size><width>200</width><height>100</height><depth>3</depth></size>
  <object><name>RBC</name><difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>200</xmax><ymax>100</ymax></bndbox>
    <part><name>rim</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>6</xmax><ymax>6</ymax></bndbox></part></object>
  <object><name>WBC &amp; co</name>
    <bndbox><xmax>30.5</xmax><xmin>10</xmin><ymin>20</ymin><ymax>40</ymax></bndbox></object>
</annotation>"""


def coco(folder: Path, content: object) -> Drawings:
    path = folder / "boxes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_boxes(path)


def voc(folder: Path, text: str | bytes) -> Drawings:
    path = folder / "x.xml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_boxes(path)


def changed(*path: str | int, value: object) -> dict[str, Any]:
    content = copy.deepcopy(COCO)
    place: Any = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


def test_objects_of_images_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    found = coco(tmp_path, changed("annotations", 0, "image_id", value=99))
    assert (found.strays, len(found.images[0].corners)) == (1, 1)


def test_an_image_of_nothing_but_a_crowd_is_no_negative(tmp_path: Path) -> None:
    content = changed("annotations", 2, "image_id", value=2)
    assert [image.names for image in coco(tmp_path, content).images] == [("a.jpg",)]


def test_coco_in_exact_numbers(tmp_path: Path) -> None:
    found = coco(tmp_path, COCO)
    first, second = found.images
    assert (found.classes, found.crowds) == (("RBC", "wbc"), 1)
    assert (first.names, first.size, first.fault) == (("a.jpg",), (100, 200), "")
    assert first.corners == ((10, 20, 40.5, 60), (0, 0, 200, 100))
    assert first.classes == ("wbc", "RBC")
    assert (second.names, second.corners) == (("sub/b.jpg",), ())  # a negative


def test_voc_counts_from_one_and_both_ends_belong_to_the_box(tmp_path: Path) -> None:
    (drawing,) = voc(tmp_path, VOC).images
    assert (drawing.names, drawing.size) == (("x.xml", "other.jpg"), (100, 200))
    assert drawing.corners == ((0, 0, 200, 100), (9, 19, 30.5, 40))
    assert drawing.classes == ("RBC", "WBC & co")
    assert voc(tmp_path, VOC).classes == ("RBC", "WBC & co")


def test_a_folder_of_voc_files_lists_those_that_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.xml").write_text(VOC)
    (tmp_path / "b.xml").write_text(VOC[:300])
    (tmp_path / "notes.txt").write_text("x")
    bad, good = read_boxes(tmp_path).images
    assert bad.fault.startswith("is no XML")
    assert (good.origin, good.names, good.fault) == ("sub/a.xml", ("sub/a.xml", "sub/other.jpg"), "")
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.txt").write_text("x")
    with pytest.raises(DataError, match=r"no Pascal VOC XML file under .*: found \.txt"):
        read_boxes(tmp_path / "only")
    with pytest.raises(MissingInputError):
        read_boxes(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON|nests too deeply"),
        ("[1, 2]", "is not COCO's"),
        ('{"images": [], "annotations": [], "categories": {}}', "is not COCO's"),
        ('{"images": [1], "annotations": [], "categories": []}', "images holds something that is no object"),
        (json.dumps(COCO).replace("30.5", "NaN"), "holds NaN"),
        (json.dumps(COCO).replace("30.5", "-Infinity"), "holds -Infinity"),
        (json.dumps(COCO).replace("30.5", "9" * 10_000), "is no JSON"),
        (changed("categories", 0, "name", value=" "), "category 7 without a name"),
        (changed("categories", 0, "name", value="RBC"), "the name 'RBC' twice"),
        (changed("categories", 0, "id", value=3), "category 3"),
        (changed("categories", 0, "id", value=[1]), r"category's id is '\[1\]'"),
        (changed("images", 0, "id", value=2), "image 2 twice"),
        (changed("images", 0, "file_name", value=""), "image 1 without a file_name"),
        (changed("images", 0, "id", value=None), "image's id is 'None'"),
        (changed("annotations", 0, "image_id", value={}), "image_id"),
    ],
)
def test_what_is_not_cocos_is_refused(tmp_path: Path, content: object, why: str) -> None:
    with pytest.raises(DataError, match=why) as caught:
        coco(tmp_path, content)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"bbox": None}, "without a bbox"),
        ({"bbox": [1, 2, 3]}, "no list of four numbers"),
        ({"bbox": [1, 2, 3, "4"]}, "no list of four numbers"),
        ({"bbox": [1, 2, 3, True]}, "no list of four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "not finite"),
        ({"category_id": 12}, "category 12, which is not among the categories"),
    ],
)
def test_a_fault_stays_with_its_image(tmp_path: Path, entry: dict[str, object], why: str) -> None:
    content = copy.deepcopy(COCO)
    content["annotations"][0] |= entry
    first, second = coco(tmp_path, content).images
    assert why in first.fault
    assert second.fault == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no XML"),
        ("<annotation>", "is no XML"),
        ("<html/>", "begins with <html>"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "DOCTYPE"),
        ('<!DOCTYPE annotation SYSTEM "file:///etc/passwd"><annotation/>', "DOCTYPE"),
        ("<annotation>" + "<a>" * 1000 + "</a>" * 1000 + "</annotation>", "nests more than 32"),
        (VOC.replace("RBC", " "), "without a class name"),
        ("\ufeff<annotation/>x".encode("utf-16"), "is no XML"),
    ],
)
def test_hostile_xml_is_refused(tmp_path: Path, text: str | bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        voc(tmp_path, text)


def test_voc_numbers_that_are_none_are_a_fault(tmp_path: Path) -> None:
    assert "without four numbers" in voc(tmp_path, VOC.replace("<xmin>10</xmin>", "")).images[0].fault
    assert "without four numbers" in voc(tmp_path, VOC.replace("30.5", "x")).images[0].fault
    assert voc(tmp_path, VOC.replace("<height>100", "<height>0")).images[0].size is None
    assert voc(tmp_path, VOC.replace("<height>100", "<height>nan")).images[0].size is None
    assert voc(tmp_path, VOC.replace(">30.5<", ">9<")).images[0].corners[1] == (10, 20, 9, 40)  # stays reversed


def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    for name, size in (("x.xml", 2**24 + 1), ("x.json", 2**29 + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        with pytest.raises(DataError, match="bytes; allowed"):
            read_boxes(tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["id", "file_name", "bbox", "image_id", "category_id", "name", "iscrowd", "width", "height"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)
LISTS = st.fixed_dictionaries({name: st.lists(JSON, max_size=4) | JSON for name in COCO})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=LISTS)
def test_any_json_is_read_or_refused(tmp_path: Path, content: object) -> None:
    with contextlib.suppress(DataError):
        coco(tmp_path, json.dumps(content))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, len(VOC) - 1), cut=st.integers(0, 40), junk=st.text(max_size=10))
def test_any_xml_is_read_or_refused(tmp_path: Path, place: int, cut: int, junk: str) -> None:
    with contextlib.suppress(DataError):
        voc(tmp_path, VOC[:place] + junk + VOC[place + cut :])
