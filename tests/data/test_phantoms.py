import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from sslmed.config import DataError, OutputExistsError
from sslmed.data.acceptance import accept
from sslmed.data.annotations.box_files import read_boxes
from sslmed.data.annotations.masks import match_masks
from sslmed.data.modality import MODALITIES
from sslmed.data.phantoms import CLASSES, Phantoms, anatomy, phantom, phantom_with_mask, write_phantoms
from sslmed.data.readers import find, read
from sslmed.data.readers.mask import read_masks

PATIENTS = 24


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Phantoms:
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "set", patients=PATIENTS)


def test_all_but_the_two_broken_files_are_xrays(written: Phantoms) -> None:
    failed = []
    depths, shapes = set(), set()
    for path in find(written.folder):
        try:
            pixels = accept(MODALITIES["xray"], read(path).pixels)
        except DataError:
            failed.append(path.relative_to(written.folder).as_posix())
            continue
        depths.add(int(pixels.max()).bit_length())
        shapes.add(pixels.shape)
        assert pixels.std() > 0.1 * pixels.max()
    assert sorted(failed) == sorted(written.broken)
    assert depths == {8, 12, 16}
    assert len(shapes) > 3
    assert any(height != width for height, width in shapes)


def test_the_table_fits_the_files(written: Phantoms) -> None:
    with written.labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "patient", "label:finding", "meta:study"]
    assert sorted(row["file"] for row in rows) == [
        p.relative_to(written.folder).as_posix() for p in find(written.folder)
    ]
    assert len(rows) == written.images + 2
    labels = {row["label:finding"] for row in rows}
    assert labels == {*CLASSES, ""}
    by_patient = {row["patient"]: set() for row in rows}
    for row in rows:
        if row["file"] not in written.broken:
            by_patient[row["patient"]].add(row["label:finding"])
    assert len(by_patient) == written.patients == PATIENTS
    assert all(len(found) == 1 for found in by_patient.values())
    assert sum(found != {""} for found in by_patient.values()) == written.labelled_patients
    for patient in by_patient:
        studies = [row["meta:study"] for row in rows if row["patient"] == patient and row["meta:study"]]
        assert studies == ["1", "1", "2", "2"][: len(studies)]
        assert len(studies) >= 2


def test_no_two_pictures_are_identical(written: Phantoms) -> None:
    contents = [hashlib.sha256(path.read_bytes()).digest() for path in find(written.folder)]
    assert len(set(contents)) == len(contents)


def test_the_seed_decides(tmp_path: Path, written: Phantoms) -> None:
    def bytes_of(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in find(folder)[:9]]

    again = write_phantoms(tmp_path / "again", patients=4)
    same = write_phantoms(tmp_path / "same", patients=4)
    other = write_phantoms(tmp_path / "other", patients=4, seed=1)
    assert bytes_of(again.folder) == bytes_of(same.folder) != bytes_of(other.folder)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(OutputExistsError, match=tmp_path.name):
        write_phantoms(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nodules_are_local_and_faint_but_above_the_noise() -> None:
    changes = []
    for number in range(20):
        ill = anatomy(np.random.default_rng(number), lesion=True)
        well = anatomy(np.random.default_rng(number), lesion=False)
        assert ill.lungs == well.lungs
        assert ill.nodules
        assert not well.nodules
        one, other = (phantom(np.random.default_rng(99), (128, 128), body=body).astype(float) for body in (ill, well))
        change = np.abs(one - other) / 65535
        assert change.max() < 0.4
        assert (change > 0.01).mean() < 0.08
        changes.append(change.max())
    assert np.median(changes) > 0.05


def test_phantom_has_the_size_asked_for() -> None:
    picture = phantom(np.random.default_rng(0), (96, 120), lesion=True)
    assert picture.shape == (96, 120)
    assert picture.dtype == np.uint16


def test_masks_lie_on_the_nodules() -> None:
    for number in range(12):
        body = anatomy(np.random.default_rng(number), lesion=True)
        well = anatomy(np.random.default_rng(number), lesion=False)
        size = (128, 112 + 8 * (number % 4))
        ill, mask = phantom_with_mask(np.random.default_rng(99), size, body=body)
        clear, none = phantom_with_mask(np.random.default_rng(99), size, body=well)
        assert mask.shape == size
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 1}
        assert not none.any()
        assert np.array_equal(ill, phantom(np.random.default_rng(99), size, body=body))
        added = ill.astype(float) - clear
        assert added[mask == 1].min() > added[mask == 0].mean() + 0.2 * added.max()
        assert added[mask == 1].sum() > 0.5 * added.sum(), "half of what the nodules add lies inside"
        radii = [radius for *_, radius, _ in body.nodules]
        discs = sum(np.pi / 4 * (radius * size[1]) ** 2 for radius in radii)
        # zoom and overlap change it; a radius is in half widths
        assert 0.94**2 * 0.9 * discs / len(radii) < mask.sum() < 1.06**2 * 1.1 * discs


def test_masks_are_asked_for_and_change_nothing_else(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    plain = write_phantoms(tmp_path / "plain", patients=12)
    assert plain.boxes is None
    boxed = write_phantoms(tmp_path / "boxed", patients=12, boxes=True)
    assert boxed.boxes == tmp_path / "boxed" / "boxes.json"
    with_boxes = content(boxed.folder)
    assert with_boxes.pop("boxes.json")
    assert with_boxes == content(plain.folder)
    masked = write_phantoms(tmp_path / "masked", patients=12, masks=True)
    assert plain.masks is None
    assert masked.masks == tmp_path / "masked" / "masks"
    with_masks = content(masked.folder)
    assert {name: data for name, data in with_masks.items() if not name.startswith("masks/")} == content(plain.folder)


def test_every_picture_of_a_labelled_patient_has_a_mask(tmp_path: Path) -> None:
    made = write_phantoms(tmp_path / "set", patients=12, masks=True)
    with made.labels.open(newline="") as file:
        label = {row["file"]: row["label:finding"] for row in csv.DictReader(file)}
    assert made.masks is not None
    found = match_masks(made.masks, {name: name for name in label})
    assert found.masks.keys() == {name for name, finding in label.items() if finding}
    assert not found.strays
    for name, path in found.masks.items():
        (mask,) = read_masks(path)
        assert mask.pixels.shape == read(made.folder / name).pixels.shape
        assert mask.pixels.max() == (label[name] == "nodule")


def test_every_picture_of_a_labelled_patient_is_searched_for_boxes(tmp_path: Path) -> None:
    made = write_phantoms(tmp_path / "set", patients=12, boxes=True)
    with made.labels.open(newline="") as file:
        label = {row["file"]: row["label:finding"] for row in csv.DictReader(file)}
    assert made.boxes is not None
    drawn = read_boxes(made.boxes)
    assert drawn.classes == ("nodule",)
    assert [each.names[0] for each in drawn.images] == [name for name, finding in label.items() if finding]
    for each in drawn.images:
        rows, columns = each.size or (0, 0)
        assert (rows, columns) == read(made.folder / each.names[0]).pixels.shape
        assert bool(each.corners) == (label[each.names[0]] == "nodule")
        for left, top, right, bottom in each.corners:  # two that overlap are one
            assert 0.08 * columns < right - left < 0.36 * columns
            assert 0.08 * columns < bottom - top < 0.36 * columns
