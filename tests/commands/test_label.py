import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.ingest import ingest
from sslmed.commands.label import label
from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data.store import Store
from sslmed.data.writers import write_image

REAL = Path(__file__).parents[3] / "shared" / "data"
real = pytest.mark.real


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Ten patients with two images each, in a folder a patient."""
    for patient in range(10):
        folder = tmp_path / "raw" / f"p{patient}"
        folder.mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng([patient, number]).integers(0, 256, (24, 20), np.uint8)
            write_image(folder / f"{number}.png", pixels)
    ingest(tmp_path / "raw", tmp_path / "store", modality="photo", patient="^([^/]+)/")
    return tmp_path / "store"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_come_after_the_images_and_pixels_stay(store: Path, tmp_path: Path) -> None:
    before = {
        path.name: path.read_bytes() for path in store.iterdir() if path.suffix == ".h5" and "label" not in path.name
    }
    old = Store(store)
    table = write(
        tmp_path / "later.csv",
        "file,label:finding,meta:age\np0/0.png,x,3\np0/1.png,y,\nraw/p1,x,7\np3/9.png,x,1\np2/0.png,,\n",
    )
    shutil.rmtree(tmp_path / "raw")  # the images themselves may be gone
    result = label(store, labels=table)
    new = Store(store)
    assert {name: (store / name).read_bytes() for name in before} == before
    with (tmp_path / "store.private" / "key_table.csv").open() as file:
        rows = {line["file"]: int(line["sample"]) for line in csv.DictReader(file)}
    numbers = new.target("finding")
    assert new.classes("finding") == ("x", "y")
    assert {file: numbers[row] for file, row in rows.items() if numbers[row] >= 0} == {
        "p0/0.png": 0,
        "p0/1.png": 1,
        "p1/0.png": 0,
        "p1/1.png": 0,
    }
    np.testing.assert_array_equal(
        new.meta("age")[[rows["p0/0.png"], rows["p1/1.png"], rows["p2/0.png"]]], [3, 7, np.nan]
    )
    assert new.split_digest == old.split_digest
    np.testing.assert_array_equal(new.index.split, old.index.split)
    assert new.verify() == []
    assert result.absent == ("p3/9.png",)
    assert sum(result.labels["finding"]["x"].values()) == 3
    assert json.loads(result.report.read_text())["absent"] == ["p3/9.png"]
    assert result.report.stat().st_mode & 0o077 == 0
    assert any("not in the store, such as 'p3/9.png'" in line for line in result.lines())
    assert json.loads(json.dumps(result.as_dict()))["rows"] == 20


def test_more_cells_and_other_values(store: Path, tmp_path: Path) -> None:
    label(store, labels=write(tmp_path / "1.csv", "file,label:finding\np0/0.png,x\n"))
    label(store, labels=write(tmp_path / "2.csv", "file,label:finding,label:more\np0/1.png,y,1\n"))
    assert list(Store(store).labels) == ["finding", "more"]
    assert (Store(store).target("finding") >= 0).sum() == 2
    third = write(tmp_path / "3.csv", "file,label:finding\np0/0.png,z\n")
    with pytest.raises(DataError, match=r"label 'finding' already: 'x' of p0/0\.png, not 'z'.*--replace"):
        label(store, labels=third)
    assert Store(store).classes("finding") == ("x", "y")
    label(store, labels=third, replace=True)
    assert Store(store).classes("finding") == ("y", "z")


def test_patients_must_agree_and_splits_are_not_read(store: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", "file,patient,split,label:x\np0/0.png, P0 ,test,1\np1/0.png,,,0\n")
    result = label(store, labels=good)
    assert any("a store's splits never change" in warning for warning in result.warnings)
    bad = write(tmp_path / "bad.csv", "file,patient,label:y\np0/0.png,p1,1\n")
    with pytest.raises(DataError, match=r"line 2 .*'p0/0\.png' another patient than"):
        label(store, labels=bad)
    assert list(Store(store).labels) == ["x"]


def test_nothing_that_matches_is_an_error(store: Path, tmp_path: Path) -> None:
    for text, why in [
        ("file,label:x\nother.png,1\n", r"names none of the images of the store, such as 'p0/0\.png'; .*'other\.png'"),
        ("file,label:x\n", "names no image"),
        ("file,note\np0/0.png,1\n", "no label column"),
        ("file,label:x\n../../etc/passwd,1\n", "leads out of"),
    ]:
        with pytest.raises(DataError, match=why):
            label(store, labels=write(tmp_path / "labels.csv", text))
    assert Store(store).labels == {}


def test_wrong_use(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to add"):
        label(store)
    with pytest.raises(UsageError, match="give --labels CSV too"):
        label(store, masks=tmp_path, label_columns=["x"])
    with pytest.raises(MissingInputError, match="no folder of masks"):
        label(store, masks=tmp_path / "absent")
    with pytest.raises(MissingInputError, match="no store at"):
        label(tmp_path / "absent", masks=tmp_path)
    table = tmp_path / "store.private" / "key_table.csv"
    whole = table.read_text()
    for text, why in [
        (whole[: len(whole) // 2].rsplit("\n", 1)[0], r"tells \d+ of the 20 images"),
        ("file,patient\na,b\n", "cannot be read"),
        (whole + "x,y,99,z,,0\n", "cannot be read"),
    ]:
        table.write_text(text)
        with pytest.raises(DataError, match=why):
            label(store, labels=write(tmp_path / "l.csv", "file,label:x\np0/0.png,1\n"))
    table.unlink()
    with pytest.raises(MissingInputError, match=r"no key table at .*store\.private"):
        label(store, labels=tmp_path / "l.csv")


def test_masks_and_boxes_come_with_counts_by_split(store: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    for patient in range(10):
        (masks / f"p{patient}").mkdir(parents=True)
        pixels = np.zeros((24, 20), np.uint8)
        pixels[:5] = 255 * (patient % 2)
        write_image(masks / f"p{patient}" / "0_mask.png", pixels)
    write_image(masks / "stray.png", pixels)
    boxes = {
        "images": [{"id": 1, "file_name": "p0/1.png", "width": 20, "height": 24}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "cell"}],
    }
    result = label(
        store,
        masks=masks,
        mask_classes=["background", "nerve"],
        boxes=write(tmp_path / "boxes.json", json.dumps(boxes)),
    )
    opened = Store(store)
    assert opened.mask_classes == ("background", "nerve")
    assert {name: sum(by.values()) for name, by in result.masks.items()} == {"background": 10, "nerve": 5}
    for name, by in result.masks.items():
        held = opened.annotations.mask_presence()[:, opened.mask_classes.index(name)]
        for split, count in by.items():
            assert held[opened.rows(split)].sum() == count
    assert [sum(by.values()) for by in result.boxes.values()] == [1]
    found = {problem["code"] for problem in result.problems}
    assert found == {"mask_without_image", "image_without_mask", "image_without_boxes"}
    assert any(line.startswith("mask_without_image: stray.png") for line in result.lines())


# Real images. What is counted here was counted by other means: PIL, nibabel and ElementTree over the files.


def _set(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no {name} beside the repository")
    return REAL / name


@real
def test_ultrasound_masks_are_the_palettes_indices(tmp_path: Path) -> None:
    from PIL import Image

    source = _set("ultrasound_nerve")
    ingest(source / "images", tmp_path / "store", modality="ultrasound", size=128)
    result = label(tmp_path / "store", masks=source / "masks", mask_classes=["background", "one", "two"])
    files = sorted((source / "masks").iterdir())
    pixels = [np.asarray(Image.open(file)) for file in files]
    expected = {name: sum((each == number).any() for each in pixels) for number, name in enumerate(result.masks)}
    assert {name: sum(by.values()) for name, by in result.masks.items()} == pytest.approx(expected, abs=2)
    assert result.problems == ()
    opened = Store(tmp_path / "store")
    for row, each in enumerate(pixels):
        np.testing.assert_array_equal(opened.mask(row), each[1::2, 1::2])


@real
def test_hippocampus_labels_lie_on_their_volumes(tmp_path: Path) -> None:
    import nibabel

    source = _set("mri_hippocampus")
    ingest(source / "images", tmp_path / "store", modality="mri")
    result = label(tmp_path / "store", masks=source / "labels")
    assert result.problems == ()
    opened = Store(tmp_path / "store")
    voxels = np.zeros(3, int)
    found = np.zeros(3, int)
    for file in sorted((source / "labels").iterdir()):
        voxels += np.bincount(np.asarray(nibabel.load(file).dataobj).astype(int).ravel(), minlength=3)
    for row in range(len(opened)):
        found += np.bincount(opened.mask(row).ravel(), minlength=3)
    assert found.tolist() == voxels.tolist()
    first = nibabel.as_closest_canonical(nibabel.load(sorted((source / "labels").iterdir())[0]))
    np.testing.assert_array_equal(opened.mask(10), np.asarray(first.dataobj)[::-1, ::-1, 10].T)


@real
def test_blood_cell_boxes(tmp_path: Path) -> None:
    source = _set("blood_cells")
    ingest(source / "images", tmp_path / "store", modality="photo", size=240)
    result = label(tmp_path / "store", boxes=source / "annotations")
    assert {name: sum(by.values()) for name, by in result.boxes.items()} == {"Platelets": 292, "RBC": 3350, "WBC": 301}
    assert result.problems == ()
    first = Store(tmp_path / "store").boxes(0)
    assert first is not None
    names = Store(tmp_path / "store").box_classes
    assert names[first.classes[0]] == "WBC"
    np.testing.assert_allclose(first.xyxy[0], np.array([259, 176, 491, 376]) / 2)
