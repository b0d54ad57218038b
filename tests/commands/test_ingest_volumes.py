"""Series, volumes and files of many images on their way into a store."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from dicoms import make_dataset
from pydicom.uid import generate_uid

from sslmed.commands.check import check
from sslmed.commands.ingest import IngestResult, ingest
from sslmed.config import DataError
from sslmed.data.identity import load_or_make_key
from sslmed.data.store import Store
from sslmed.data.writers import write_image

REAL = Path(__file__).parents[3] / "shared" / "data"
Write = Callable[..., list[Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a CT series into ``raw/FOLDER``, the last slice first by name; values are 100 times its place."""

    def series(folder: str, patient: str, places: list[float], *, thickness: float = 2, **given: Any) -> list[Path]:
        where = tmp_path / "raw" / folder
        where.mkdir(parents=True, exist_ok=True)
        uid = given.pop("SeriesInstanceUID", generate_uid(entropy_srcs=[folder]))
        paths = []
        for number, place in enumerate(places):
            pixels = np.full((40, 32), 1024 + round(100 * place), np.int16)
            pixels[:10] = 24  # air
            attributes = {
                "Modality": "CT",
                "PatientID": patient,
                "PatientName": "Somebody",
                "StudyInstanceUID": f"1.2.{len(patient)}",
                "SeriesInstanceUID": uid,
                "SliceThickness": thickness,
                "RescaleSlope": 1,
                "RescaleIntercept": -1024,
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "PixelSpacing": [0.5, 0.25],
                "ImagePositionPatient": [-10, 20, place],
            }
            paths.append(where / f"{len(places) - number:03d}")  # files of scanners have no suffix
            make_dataset(pixels, **attributes | given).save_as(paths[-1])
        return paths

    return series


def made(tmp_path: Path, modality: str = "ct", **options: Any) -> tuple[IngestResult, Store]:
    result = ingest(tmp_path / "raw", tmp_path / options.pop("out", "store"), modality=modality, **options)
    return result, Store(result.path)


def table(result: IngestResult) -> list[dict[str, str]]:
    with (result.private / "key_table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_series_is_one_scan_in_the_order_of_its_places(write: Write, tmp_path: Path) -> None:
    write("one", "A1", [0, 2, 4, 6])
    write("two", "B22", [10, 13, 16])
    result, store = made(tmp_path)
    assert (result.scans, result.images, result.patients) == (2, 7, 2)
    assert [int(store.pixels(row)[20, 5]) for row in range(7)] == [0, 200, 400, 600, 1000, 1300, 1600]
    assert int(store.pixels(3)[0, 0]) == -1000  # the front of the patient comes first
    assert store.scans.spacing.tolist() == [[2, 0.5, 0.25], [3, 0.5, 0.25]]
    assert len({store.intensity(row) for row in range(7)}) == 1  # HU: the same for all
    np.testing.assert_allclose(store.volume(1).affine @ [0, 0, 0, 1], [10, -20, 10, 1])
    assert store.meta("series").tolist() == [1] * 4 + [2] * 3
    assert store.meta("position").tolist() == [0, 2, 4, 6, 0, 3, 6]
    assert store.meta("study").tolist() == [1] * 4 + [2] * 3
    rows = table(result)
    assert [row["file"] for row in rows] == [f"one/{n:03d}" for n in (4, 3, 2, 1)] + [f"two/{n:03d}" for n in (3, 2, 1)]
    assert [row["slice"] for row in rows] == list("0123012")


def test_patients_are_those_of_the_files_unless_somebody_says_otherwise(write: Write, tmp_path: Path) -> None:
    write("p7/one", "A1", [0, 2])
    write("p7/two", "a1 ", [0, 2])
    write("p8/three", "", [0, 2])
    key = load_or_make_key(tmp_path / "site.key")
    result, store = made(tmp_path)
    expected = [key.patient("A1")] * 4 + [key.patient("study 1.2.0")] * 2
    assert [patient.decode() for patient in store.index.patient.tolist()] == expected
    assert any(warning.startswith("1 of 3 scans have no PatientID") for warning in result.warnings)
    assert result.labels == {}  # folders of scans are no classes
    _, store = made(tmp_path, out="other", patient=r"p\d")
    assert [patient.decode() for patient in store.index.patient.tolist()] == [key.patient("p7")] * 4 + [
        key.patient("p8")
    ] * 2
    for path in store.path.iterdir():
        assert not any(word in path.read_bytes() for word in (b"Somebody", b"three", b"p7"))


def test_labels_of_slices_of_folders_and_of_nobody(write: Write, tmp_path: Path) -> None:
    write("one", "A", [0, 2, 4])
    write("two", "B", [0, 2, 4])
    write("three", "C", [0, 2])
    labels = tmp_path / "raw" / "labels.csv"
    labels.write_text("file,patient,label:bleeding\none/001,A,1\none/003,A,0\ntwo,B,1\n")
    result, store = made(tmp_path, labels=labels)
    assert store.target("bleeding").tolist() == [0, -1, 1, -1, -1, 1, 1, 1]  # one (by place), three, two
    assert [row["file"] for row in table(result)][3:5] == ["three/002", "three/001"]
    labels.write_text("file,patient,label:bleeding\none/001,A,1\none/002,other,0\n")
    with pytest.raises(DataError, match="slices of one series"):
        made(tmp_path, labels=labels, out="contradiction")


def test_blocks_of_another_thickness_are_volumes_of_their_own(write: Write, tmp_path: Path) -> None:
    write("head", "A", [0, 4, 8], thickness=4, SeriesInstanceUID="1.2.3")
    write("head2", "A", [10, 17, 24], thickness=7, SeriesInstanceUID="1.2.3")
    result, store = made(tmp_path)
    assert (result.scans, result.skipped) == (2, ())
    assert store.scans.spacing[:, 0].tolist() == [4, 7]


def test_a_series_that_is_refused_names_the_slice_that_is_damaged(write: Write, tmp_path: Path) -> None:
    write("good", "A", [0, 2, 4])
    damaged = write("bad", "B", [0, 2, 4])[1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    result, _ = made(tmp_path)
    assert [(skipped.file, skipped.files) for skipped in result.skipped] == [("bad/002", 3)]
    assert any(line.startswith("skipped 3 files;") for line in result.lines())
    assert any(line.startswith("  bad/002: is truncated") and "(one of 3 slices)" in line for line in result.lines())
    assert result.skipped[0].reason.startswith("is truncated")


def test_a_series_that_is_refused_says_so_once(write: Write, tmp_path: Path) -> None:
    write("good", "A", [0, 2])
    write("gap", "B", [0, 2, 9])
    tilted = np.radians(15)
    orientation = [1, 0, 0, 0, float(np.cos(tilted)), float(np.sin(tilted))]
    write("tilted", "C", [0, 2, 4], ImageOrientationPatient=orientation)
    result, _ = made(tmp_path)
    assert [(skipped.file, skipped.files) for skipped in result.skipped] == [("gap/001", 3), ("tilted/001", 3)]
    assert "uneven gaps" in result.skipped[0].reason
    assert "tilted gantry (15.0 degrees)" in result.skipped[1].reason
    assert "--resample-tilt" in result.skipped[1].reason
    result, store = made(tmp_path, out="resampled", resample_tilt=True)
    assert [skipped.file for skipped in result.skipped] == ["gap/001"]
    assert (result.scans, store.pixels(2).dtype) == (2, np.float32)


def test_workers_make_the_same_store(write: Write, tmp_path: Path) -> None:
    for number in range(5):
        write(f"s{number}", f"P{number}", [0, 2, 4.0 + number % 2])  # every second one has an uneven gap
    alone, store = made(tmp_path, size=20)
    helped, other = made(tmp_path, size=20, workers=2, out="helped")
    assert store.fingerprint == other.fingerprint
    assert alone.skipped == helped.skipped
    assert len(alone.skipped) == 2
    assert store.pixels(0).shape == (25, 20)
    assert store.scans.spacing[0].tolist() == [2, 0.8, 0.4]


def test_a_file_of_several_volumes_is_one_patient(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    values = np.random.default_rng(0).integers(0, 900, (20, 22, 5, 3), np.int16)
    values[..., 1] *= 7
    nibabel.Nifti1Image(values, np.diag([-1, -1, 2, 1])).to_filename(tmp_path / "raw" / "four.nii.gz")
    result, store = made(tmp_path, "mri")
    assert (result.scans, result.images, result.patients) == (3, 15, 1)
    assert [row["part"] for row in table(result)] == ["0"] * 5 + ["1"] * 5 + ["2"] * 5
    assert store.intensity(5).high == pytest.approx(7 * store.intensity(0).high, rel=0.05)
    np.testing.assert_array_equal(store.pixels(7), values[..., 2, 1].T)


def test_an_npz_brings_labels_and_splits(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    stream = np.random.default_rng(0)
    sides = {"train": 20, "val": 2, "test": 3}  # a worker hands over 16
    arrays: dict[str, np.ndarray] = {}
    for side, count in sides.items():
        arrays[f"{side}_images"] = stream.integers(0, 255, (count, 28, 28), np.uint8)
        arrays[f"{side}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    np.savez_compressed(tmp_path / "raw" / "mnist.npz", **arrays)
    for workers in (0, 2):
        result, store = made(tmp_path, "xray", workers=workers, out=f"store{workers}")
        assert {name: count["images"] for name, count in result.splits.items()} == sides
        assert (result.patients, store.labels["label"].kind) == (25, "binary")
        rows = store.rows("test")
        assert store.target("label")[rows].tolist() == [0, 1, 0]
        np.testing.assert_array_equal(store.pixels(int(rows[1])), arrays["test_images"][1])


def test_links_that_lead_out_are_listed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in ("raw", "elsewhere"):
        np.save(tmp_path / folder / f"{folder}.npy", np.random.default_rng(0).integers(0, 99, (30, 30), np.uint8))
    (tmp_path / "raw" / "file.npy").symlink_to(tmp_path / "elsewhere" / "elsewhere.npy")
    (tmp_path / "raw" / "folder").symlink_to(tmp_path / "elsewhere")
    result, _ = made(tmp_path, "xray")
    assert result.images == 1
    assert [skipped.file for skipped in result.skipped] == ["file.npy", "folder"]
    assert all("leads out" in skipped.reason for skipped in result.skipped)


def test_series_of_which_the_csv_says_nothing_follow_their_patient(write: Write, tmp_path: Path) -> None:
    for series in ("one", "two"):
        write(series, "A1 ", [0, 2])
    write("three", "B22", [0, 2])
    labels = tmp_path / "raw" / "labels.csv"
    labels.write_text("file,patient,label:x\none,PX,1\n")
    result, store = made(tmp_path, labels=labels)
    patients = store.index.patient.tolist()
    assert patients[0] == patients[4]  # one, three, two
    assert len(set(patients)) == result.patients == 2


def test_a_study_without_a_patient_is_one_patient(write: Write, tmp_path: Path) -> None:
    for series in ("one", "two"):
        write(series, "", [0, 2], StudyInstanceUID="1.2.3")
    write("three", "", [0, 2], StudyInstanceUID="1.2.4")
    result, _ = made(tmp_path)
    assert (result.scans, result.patients) == (3, 2)


def test_the_check_and_the_ingest_agree_on_splits_by_slice(write: Write, tmp_path: Path) -> None:
    for number, series in enumerate(("one", "two", "three")):
        write(series, series, [number, number + 2])
    split = tmp_path / "split.csv"
    split.write_text("file,split\none/001,train\ntwo/001,val\nthree/001,test\n")
    result, _ = made(tmp_path, split=split)
    assert len(result.splits) == 3
    assert check(tmp_path / "raw", modality="ct", split=split).errors == 0
    split.write_text("file,split\none/001,train\none/002,test\n")
    with pytest.raises(DataError, match="1 patient on two sides"):
        made(tmp_path, split=split, out="leak")
    codes = [finding.code for finding in check(tmp_path / "raw", modality="ct", split=split).findings]
    assert "leakage" in codes


def test_boxes_of_slices_that_were_sheared_are_refused(write: Write, tmp_path: Path) -> None:
    tilted = np.radians(15)
    orientation = [1, 0, 0, 0, float(np.cos(tilted)), float(np.sin(tilted))]
    paths = write("tilted", "C", [0, 2, 4], ImageOrientationPatient=orientation)
    paths += write("straight", "D", [0, 2])
    boxes: dict[str, list[dict[str, Any]]] = {"categories": [{"id": 1, "name": "air"}], "images": [], "annotations": []}
    for number, path in enumerate(paths):
        boxes["images"].append({"id": number, "file_name": f"{path.parent.name}/{path.name}"})
        boxes["annotations"].append({"id": number, "image_id": number, "category_id": 1, "bbox": [2, 3, 8, 10]})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    result, _ = made(tmp_path, boxes=tmp_path / "boxes.json", resample_tilt=True)
    assert result.boxes == 2
    refused = [problem.reason for problem in result.problems if problem.code == "boxes_refused"]
    assert len(refused) == 3
    assert all("--resample-tilt" in reason for reason in refused)


def test_a_stack_that_is_not_placed_is_no_mask_of_a_volume_that_is(write: Write, tmp_path: Path) -> None:
    write("one", "A", [0, 2, 4])
    write("two", "B", [0, 2])
    (tmp_path / "masks" / "two").mkdir(parents=True)
    np.save(tmp_path / "masks" / "one.npy", np.zeros((3, 40, 32), np.uint8))
    for name in ("001", "002"):
        write_image(tmp_path / "masks" / "two" / f"{name}.png", np.eye(40, 32, dtype=np.uint8))
    result, store = made(tmp_path, masks=tmp_path / "masks")
    assert result.masks == 2
    assert any("order of their slices" in problem.reason for problem in result.problems)
    assert store.mask(0) is None


def test_what_is_drawn_on_the_files_pixels_is_turned_round_with_them(write: Write, tmp_path: Path) -> None:
    """Masks and boxes of DICOM slices, as pictures and COCO JSON, where columns go to the patient's right."""
    across = {"ImageOrientationPatient": [-1, 0, 0, 0, 1, 0]}
    paths = write("one", "A", [4, 2, 0], **across)  # the first ten rows are air; the normal goes to the feet
    names = [f"one/{path.name}" for path in paths]
    boxes = {"categories": [{"id": 1, "name": "air"}], "images": [], "annotations": []}
    (tmp_path / "masks" / "one").mkdir(parents=True)
    for number, name in enumerate(names):
        mask = np.zeros((40, 32), np.uint8)
        mask[:10, : 8 + number] = 1
        write_image(tmp_path / "masks" / f"{name}.png", mask)
        boxes["images"].append({"id": number, "file_name": name, "width": 32, "height": 40})
        boxes["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 8 + number, 10]}
        )
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    options = {"masks": tmp_path / "masks", "boxes": tmp_path / "boxes.json"}
    for size, shrink in ((None, 1), (16, 2)):
        _, store = made(tmp_path, out=f"store{size}", size=size, **options)
        for row in range(3):
            mask, pixels = store.mask(row), store.pixels(row)
            assert mask.shape == pixels.shape == (40 // shrink, 32 // shrink)
            assert (pixels[mask == 1] == -1000).all()
            assert (mask[0, -1], mask[-1, 0]) == (1, 0)
            box = store.boxes(row).xyxy[0] * shrink
            np.testing.assert_allclose(box, [32 - 8 - (2 - row), 0, 32, 10])


@pytest.mark.real
def test_real_volumes(tmp_path: Path) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    ct = ingest(REAL / "ct_dicom", tmp_path / "ct", modality="ct")
    assert (ct.scans, ct.images) == (2, 9)  # the last slice of the head is thicker: a scan by itself
    assert [(skipped.file, skipped.files) for skipped in ct.skipped] == [
        ("SOURCE.md", 1),
        ("head_gantry_tilt/09.dcm", 6),
    ]
    assert "tilted gantry (18.5 degrees)" in ct.skipped[1].reason
    resampled = ingest(REAL / "ct_dicom", tmp_path / "resampled", modality="ct", resample_tilt=True, workers=2)
    assert (resampled.scans, resampled.images) == (3, 15)
    mri = ingest(REAL / "mri_dicom", tmp_path / "mri", modality="mri")
    assert (mri.scans, mri.images, mri.patients) == (1, 22, 1)
    hippocampus = ingest(
        REAL / "mri_hippocampus" / "images",
        tmp_path / "hippocampus",
        modality="mri",
        masks=REAL / "mri_hippocampus" / "labels",
        mask_classes=("background", "anterior", "posterior"),
    )
    assert (hippocampus.scans, hippocampus.images) == (40, 1413)
    assert hippocampus.masks == 1413
    assert Store(hippocampus.path).mask_classes == ("background", "anterior", "posterior")


@pytest.mark.real
def test_hippocampus_labels_lie_where_they_lay_after_the_round_trip(tmp_path: Path) -> None:
    """Store, writer, NIfTI: the affine, the shape and every value of the source, and the image beside them."""
    from sslmed.data.writers import write_nifti

    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    source = REAL / "mri_hippocampus"
    result = ingest(source / "images", tmp_path / "store", modality="mri", masks=source / "labels")
    store = Store(result.path)
    names = [row["file"] for row in table(result)]
    for scan, first in enumerate(store.scans.first.tolist()):
        volume = store.volume(scan)
        labels = np.stack([store.mask(first + number) for number in range(volume.shape[0])])
        for kind, values in (("images", volume.whole()), ("labels", labels)):
            write_nifti(tmp_path / "out.nii.gz", values, volume.grid, None)
            given, back = nibabel.load(source / kind / names[first]), nibabel.load(tmp_path / "out.nii.gz")
            assert back.shape == given.shape
            np.testing.assert_array_equal(back.affine, given.affine)
            np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(given.dataobj))
