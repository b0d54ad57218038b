import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import picture, write_store

from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data.annotations.attach import Report, Sources
from sslmed.data.intensity import Intensity
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store
from sslmed.data.writers import write_image

AFFINE = np.array([[0, 0, 1.0, -5], [0, 1.0, 0, -6], [2.0, 0, 0, -7], [0, 0, 0, 1]])
FILES = ["a.jpg", "p/b.png", "p/c.png", "v/vol.nii", "v/vol.nii", "v/vol.nii", "s/1.dcm", "s/2.dcm"]
SOURCE = [(40, 60), (20, 30), (20, 30), (12, 14), (12, 14), (12, 14), (9, 8), (9, 8)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three pictures (the first shrunk to half), a volume of three slices, and a series of two files."""
    scans = [
        NewScan(np.zeros((20, 30), np.uint8), Intensity(0, 255, 128, 64), "0" * 64, source_size=(40, 60)),
        picture(np.zeros((20, 30), np.uint8), "1" * 64),
        picture(np.zeros((20, 30), np.uint8), "2" * 64),
        NewScan(
            np.zeros((3, 12, 14), np.int16), Intensity(0, 9, 5, 1), "3" * 64, kind="volume", affine=AFFINE,
            spacing=(2.0, 1.0, 1.0),
        ),
        NewScan(np.zeros((2, 9, 8), np.int16), Intensity(0, 9, 5, 1), "4" * 64, kind="volume", affine=AFFINE),
    ]  # fmt: skip
    return write_store(tmp_path / "store", scans, [f"{number:032x}" for number in range(5)]).path


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    (tmp_path / "masks").mkdir()
    return tmp_path / "masks"


def codes(report: Report) -> list[tuple[str, str]]:
    return [(problem.file, problem.code) for problem in report.problems]


def save(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, pixels)
    return pixels


def nifti(path: Path, pixels: np.ndarray, affine: np.ndarray) -> None:
    """(D, H, W) with an affine of (d, h, w), saved with the axes of the file in that order."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(pixels, affine), path)


def values(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)


def test_masks_of_pictures_volumes_and_series(store: Path, masks: Path) -> None:
    large = save(masks / "a_mask.png", values((40, 60)))
    save(masks / "p" / "b.png", values((20, 30)))
    save(masks / "p" / "x.png", values((20, 30)))
    volume = values((3, 12, 14))
    nifti(masks / "v" / "vol_seg.nii.gz", volume, AFFINE)
    series = values((2, 9, 8))
    flipped = AFFINE.copy()
    flipped[:, 3] += flipped[:, 1] * 8
    flipped[:, 1] *= -1
    nifti(masks / "s.nii", series[:, ::-1], flipped)
    report = Sources(masks).attach(store, FILES)
    opened = Store(store)
    np.testing.assert_array_equal(opened.mask(0), large[1::2, 1::2])  # stored at half the size
    for row in range(3):
        np.testing.assert_array_equal(opened.mask(3 + row), volume[row])
    for row in range(2):
        np.testing.assert_array_equal(opened.mask(6 + row), series[row])
    assert opened.mask(2) is None
    assert codes(report) == [("p/x.png", "mask_without_image"), ("p/c.png", "image_without_mask")]
    assert report.masks == 7
    assert opened.verify() == []


def test_a_slice_file_of_a_series_has_a_mask_of_its_own(store: Path, masks: Path) -> None:
    pixels = save(masks / "s" / "2.png", values((9, 8)))
    report = Sources(masks).attach(store, FILES)
    assert Store(store).annotations.masked().tolist() == [False] * 7 + [True]
    np.testing.assert_array_equal(Store(store).mask(7), pixels)
    assert ("s", "image_without_mask") not in codes(report)
    nifti(masks / "s_mask.nii", values((2, 9, 8)), AFFINE)
    with pytest.raises(DataError, match=r"one mask more of 's/[12]\.dcm'"):
        Sources(masks).attach(store, FILES)


def test_parts_of_a_file_have_their_own_masks(tmp_path: Path, masks: Path) -> None:
    scans = [
        NewScan(np.zeros((3, 12, 14), np.int16), Intensity(0, 9, 5, 1), f"{n}" * 64, kind="volume", affine=AFFINE)
        for n in range(2)
    ]
    path = write_store(tmp_path / "parts", scans, ["0" * 32] * 2).path
    files, parts = ["many.nii"] * 6, ["0"] * 3 + ["2"] * 3  # part 1 was refused
    series = values((3, 12, 14, 3))
    nifti(masks / "many.nii", series, AFFINE)
    report = Sources(masks).attach(path, files, parts=parts)
    for row in range(6):
        np.testing.assert_array_equal(Store(path).mask(row), series[row % 3, :, :, 0 if row < 3 else 2])
    assert [problem.reason for problem in report.problems] == [
        f"part '1' of {masks / 'many.nii'} goes with none of its parts in the store"
    ]
    nifti(masks / "many.nii", series[..., 0], AFFINE)
    with pytest.raises(DataError, match="which is one mask, goes with none of its parts"):
        Sources(masks).attach(path, files, parts=parts)


def test_what_does_not_fit_is_listed(store: Path, masks: Path) -> None:
    save(masks / "a.png", values((20, 30)))  # drawn on the shrunk picture
    (masks / "p").mkdir()
    (masks / "p" / "b.png").write_bytes(b"no picture")
    save(masks / "p" / "c.png", values((20, 30)))
    shifted = AFFINE.copy()
    shifted[0, 3] += 1
    nifti(masks / "v" / "vol.nii", values((3, 12, 14)), shifted)
    report = Sources(masks).attach(store, FILES)
    told = {problem.file: problem for problem in report.problems}
    assert {name: told[name].code for name in ("a.jpg", "p/b.png", "v/vol.nii")} == {
        "a.jpg": "mask_mismatch",
        "p/b.png": "mask_unreadable",
        "v/vol.nii": "mask_mismatch",
    }
    assert "has 20 x 30 pixels, but its image has 40 x 60" in told["a.jpg"].reason
    assert "lies up to 1 mm away" in told["v/vol.nii"].reason
    assert "(-4, -6, -7)" in told["v/vol.nii"].reason
    assert "(-5, -6, -7)" in told["v/vol.nii"].reason
    assert [file for file, code in codes(report) if code == "image_without_mask"] == ["s"]
    assert Store(store).annotations.masked().tolist() == [False, False, True] + [False] * 5


def test_nothing_that_fits_is_an_error(store: Path, masks: Path, tmp_path: Path) -> None:
    before = (store / "store.json").read_bytes()
    with pytest.raises(DataError, match="no mask goes with any image: there is none"):
        Sources(masks).attach(store, FILES)
    save(masks / "other.png", values((20, 30)))
    with pytest.raises(DataError, match=r"such as 'other\.png'; images are called such as 'a\.jpg'"):
        Sources(masks).attach(store, FILES)
    save(masks / "a.png", values((2, 3)))
    with pytest.raises(DataError, match="none of the masks fits its image"):
        Sources(masks).attach(store, FILES)
    (tmp_path / "boxes.json").write_text(json.dumps(coco({"zzz.jpg": (40, 60, [])})))
    with pytest.raises(DataError, match=r"no boxes go with any image, such as 'a\.jpg':\n.*zzz\.jpg"):
        Sources(boxes=tmp_path / "boxes.json").attach(store, FILES)
    assert (store / "store.json").read_bytes() == before


def coco(images: dict[str, tuple[int, int, list[list[float]]]]) -> dict[str, Any]:
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    for number, (name, (height, width, corners)) in enumerate(images.items()):
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        content["annotations"] += [{"image_id": number, "category_id": 1, "bbox": bbox} for bbox in corners]
    return content


def test_coco_boxes(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(
        json.dumps(
            coco(
                {
                    "a.jpg": (40, 60, [[10, 20, 30, 10], [59.5, 0, 1, 40]]),
                    "images/p/b.png": (20, 30, []),
                    "p/c.png": (20, 30, [[0, 0, 9, 9], [5, 5, -3, 4]]),
                    "stray.png": (20, 30, []),
                    "vol.nii": (12, 14, []),
                }
            )
        )
    )
    report = Sources(boxes=path).attach(store, FILES)
    opened = Store(store)
    first, second = opened.boxes(0), opened.boxes(1)
    assert first is not None
    assert first.xyxy.tolist() == [[5, 10, 20, 15], [29.75, 0, 30, 20]]  # stored at half the size
    assert second is not None
    assert len(second) == 0
    assert opened.boxes(2) is None
    assert (report.boxes, report.negatives) == (1, 1)
    assert report.notes == ["1 boxes reached up to a pixel out of their images and were clipped"]
    assert codes(report)[:3] == [
        ("boxes.json: p/c.png", "boxes_refused"),
        ("boxes.json: stray.png", "boxes_without_image"),
        ("boxes.json: vol.nii", "boxes_ambiguous"),
    ]
    assert [file for file, code in codes(report) if code == "image_without_boxes"] == ["v/vol.nii", "s"]
    assert "reversed" in report.problems[0].reason
    assert any("boxes_refused: boxes.json: p/c.png" in line for line in report.lines())


VOC = "<annotation><filename>{}</filename><size><width>30</width><height>20</height></size>{}</annotation>"
OBJECT = "<object><name>cell</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"


def test_voc_boxes_by_their_own_name_or_the_name_inside(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "xml" / "p"
    folder.mkdir(parents=True)
    (folder / "b.xml").write_text(VOC.format("nobody.jpg", OBJECT))
    (folder / "17.xml").write_text(VOC.format("c.png", ""))
    Sources(boxes=tmp_path / "xml").attach(store, FILES)
    first = Store(store).boxes(1)
    assert first is not None
    assert first.xyxy.tolist() == [[0, 1, 30, 20]]
    assert Store(store).annotations.boxed().tolist() == [False, True, True] + [False] * 5
    (folder / "b.xml").write_text(VOC.format("c.png", OBJECT))
    (folder / "17.xml").unlink()
    with pytest.raises(DataError, match=r"goes by its name with 'p/b\.png', but names 'p/c\.png'"):
        Sources(boxes=tmp_path / "xml").attach(store, FILES)


def test_two_files_for_one_image_are_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "xml" / "p").mkdir(parents=True)
    (tmp_path / "xml" / "p" / "b.xml").write_text(VOC.format("b.png", OBJECT))
    (tmp_path / "xml" / "b.xml").write_text(VOC.format("b.png", OBJECT))
    with pytest.raises(DataError, match=r"b\.xml and p/b\.xml are both of 'p/b\.png'"):
        Sources(boxes=tmp_path / "xml").attach(store, FILES)


def test_sources_are_checked_before_anything_is_read(masks: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no folder of masks"):
        Sources(tmp_path / "absent")
    with pytest.raises(MissingInputError, match="no boxes at"):
        Sources(boxes=tmp_path / "absent")
    with pytest.raises(UsageError, match="give --masks DIR too"):
        Sources(mask_classes=("a",))
    for names in (("a", " "), ("a", "a"), tuple(map(str, range(256)))):
        with pytest.raises(UsageError, match="at most 255 different names"):
            Sources(masks, names)
    assert not Sources()
    assert Sources(masks).paths == [masks]


def test_a_mistake_is_told_before_images_are_read(masks: Path, tmp_path: Path) -> None:
    (masks / "README.md").write_text("x")
    with pytest.raises(DataError, match=r"no mask in .*: masks are \.png"):
        Sources(masks).check()
    save(masks / "a.png", values((2, 3)))
    Sources(masks).check()
    (tmp_path / "boxes.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        Sources(boxes=tmp_path / "boxes.json").check()
    (tmp_path / "boxes.json").write_text(json.dumps(coco({})))
    with pytest.raises(DataError, match="says nothing of any image"):
        Sources(boxes=tmp_path / "boxes.json").check()


def test_looking_reports_the_same_and_writes_nothing(store: Path, masks: Path) -> None:
    save(masks / "a.png", values((40, 60)))
    save(masks / "stray.png", values((2, 3)))
    before = sorted(path.name for path in store.iterdir())
    looked = Sources(masks).look(Store(store), FILES)
    assert sorted(path.name for path in store.iterdir()) == before
    assert looked == Sources(masks).attach(store, FILES)
    assert looked.masks == 1
