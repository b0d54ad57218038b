"""The check finds what ingest would trip over, in files made for it, and leaves no trace."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nibabel import Nifti1Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from sslmed import cli
from sslmed.commands.check import CheckResult, check
from sslmed.config import DataError, MissingInputError, UsageError
from sslmed.data.checks.findings import SEVERITIES, Finding
from sslmed.data.phantoms import phantom
from sslmed.data.writers import write_image

REAL = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight clean radiographs of eight patients."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        write_image(folder / f"p{number}.png", phantom(np.random.default_rng(number), (64, 48)))
    return folder


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def codes(result: CheckResult) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in result.findings]


def dicom(path: Path, seed: int, **about: Any) -> None:
    """A radiograph with a header."""
    dataset = dcmread(str(get_testdata_file("CT_small.dcm", download=False)))
    pixels = phantom(np.random.default_rng(seed), (64, 48)) >> 4
    dataset.Rows, dataset.Columns, dataset.PixelData = 64, 48, pixels.astype("<u2").tobytes()
    dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit, dataset.Modality = 0, 12, 11, "CR"
    del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PixelPaddingValue
    dataset.PatientID, dataset.PatientName = f"id{seed}", "Lovelace^Ada"
    dataset.SeriesInstanceUID = dataset.SOPInstanceUID = f"1.2.{seed}"
    for name, value in about.items():
        setattr(dataset, name, value)
    dataset.save_as(path)


def volume(path: Path, seed: int, shape: tuple[int, int, int] = (20, 18, 6), step: float = 1.0) -> None:
    values = phantom(np.random.default_rng(seed), (64, 48)).astype(np.int32)[: shape[0], : shape[1], None]
    values = (values // 8 + 100 * np.arange(shape[2])).astype(np.int16)
    Nifti1Image(values, np.diag([step, 1.0, 1.0, 1.0])).to_filename(path)


def test_a_clean_set(source: Path) -> None:
    result = check(source, modality="xray")
    assert (result.scans, result.files, result.findings, result.errors) == (8, 8, (), 0)
    assert result.next.startswith(f"sslmed ingest {source} --out STORE --modality xray")
    (remark,) = result.remarks
    assert remark.startswith("nobody says whose 8 of 8 scans are")
    assert check(source, modality="xray", patient=r"p\d").remarks == ()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_written(source: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "bad.png").write_bytes((source / "p0.png").read_bytes()[:500])
    (source / "labels.csv").write_text("file,patient,label:x\np0.png,a,1\np1.png,b,0\n")
    monkeypatch.chdir(source.parent)
    before = files_below(source.parent)
    result = check("images", modality="xray", labels="images/labels.csv", workers=workers)
    assert files_below(source.parent) == before
    assert ("label-mismatch", "warning") in codes(result)  # the files that the CSV does not name


def test_workers_find_the_same(source: Path) -> None:
    (source / "bad.png").write_bytes(b"no picture")
    shutil.copy(source / "p1.png", source / "twin.png")
    assert check(source, modality="xray", workers=2) == check(source, modality="xray")


def test_bad_files_are_errors_and_the_rest_is_still_looked_at(source: Path) -> None:
    (source / "half.png").write_bytes((source / "p0.png").read_bytes()[:500])
    (source / "text.png").write_bytes(b"no picture")
    shutil.copy(source / "p1.png", source / "twin.png")
    write_image(source / "colour.png", np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    result = check(source, modality="xray")
    found = {finding.code: finding.files for finding in result.findings}
    assert found["truncated"] == ("half.png",)
    assert found["unreadable"] == ("text.png",)
    assert found["not-for-this-modality"] == ("colour.png",)
    assert found["duplicate"] == ("p1.png", "twin.png")
    assert (result.errors, result.scans, result.files) == (3, 9, 12)
    assert "--check" in result.next


def test_other_files_are_noted(source: Path) -> None:
    (source / "README.txt").write_text("about")
    (source / "notes.doc").write_text("about")
    (finding,) = check(source, modality="xray").findings
    assert (finding.code, finding.severity, finding.files) == ("not-read", "note", ("README.txt", "notes.doc"))


def test_a_link_that_leads_out_is_a_warning(source: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "outside.png", phantom(np.random.default_rng(9), (64, 48)))
    (source / "link.png").symlink_to(tmp_path / "outside.png")
    (finding,) = check(source, modality="xray").findings
    assert (finding.code, finding.severity, finding.files) == ("not-read", "warning", ("link.png",))


def test_a_labels_csv_that_cannot_be_used_is_an_error_and_the_rest_is_still_looked_at(source: Path) -> None:
    (source / "labels.csv").write_text("file,patient\np0.png,a\nabsent.png,b\n")
    (source / "text.png").write_bytes(b"no picture")
    result = check(source, modality="xray", labels=source / "labels.csv")
    assert codes(result) == [("unreadable", "error"), ("label-mismatch", "error")]
    assert "'absent.png'" in result.findings[1].detail


def test_leakage_of_a_given_split(source: Path) -> None:
    (source / "labels.csv").write_text(
        "file,patient,split\n"
        + "".join(f"p{number}.png,{'Ada' if number < 2 else number},train\n" for number in range(8))
    )
    (source / "split.csv").write_text("file,split\np0.png,train\np1.png,test\n")
    clean = check(source, modality="xray", labels=source / "labels.csv")
    assert clean.errors == 0
    result = check(source, modality="xray", labels=source / "labels.csv", split=source / "split.csv")
    (finding,) = result.findings
    assert finding == Finding("leakage", "error", ("p0.png", "p1.png"), "one patient in train and test")


def test_leakage_of_a_split_column_and_of_the_splits_of_an_archive(source: Path, tmp_path: Path) -> None:
    (source / "labels.csv").write_text("file,patient,split\np0.png,a,train\np1.png,a,val\np2.png,b,test\n")
    leak = next(f for f in check(source, modality="xray", labels=source / "labels.csv").findings if f.code == "leakage")
    assert (leak.files, leak.detail) == (("p0.png", "p1.png"), "one patient in train and val")
    pictures = np.stack([phantom(np.random.default_rng(number), (32, 32)) >> 8 for number in range(4)]).astype(np.uint8)
    (tmp_path / "archive").mkdir()
    np.savez(tmp_path / "archive" / "set.npz", train_images=pictures, test_images=pictures[:1])
    (leak,) = (f for f in check(tmp_path / "archive", modality="xray").findings if f.code == "leakage")
    assert leak.detail == "one and the same image in train and test"
    assert [name.partition("#")[2] for name in leak.files] == ["train/0", "test/0"]


def test_a_split_file_that_contradicts_itself_does_not_name_the_patient(source: Path) -> None:
    (source / "split.csv").write_text("patient,split\nLovelace,train\nLovelace,test\n")
    result = check(source, modality="xray", split=source / "split.csv")
    assert codes(result) == [("label-mismatch", "error")]
    assert "a patient is in train and in test" in result.findings[0].detail
    assert "Lovelace" not in json.dumps(result.as_dict())


def test_identity_and_text_of_dicom_files(tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    folder.mkdir()
    for number in range(6):
        dicom(folder / f"{number}.dcm", number, BurnedInAnnotation="YES" if number == 3 else "NO")
    result = check(folder, modality="xray")
    burned, identity = (
        next(finding for finding in result.findings if finding.code == code) for code in ("burned-in", "identity")
    )
    assert (burned.severity, burned.files) == ("warning", ("3.dcm",))
    assert (identity.severity, len(identity.files)) == ("note", 6)
    assert "PatientName in 6, PatientID in 6" in identity.detail
    shown = json.dumps(result.as_dict()) + "\n".join(result.lines())
    for value in ("Lovelace", "id3", "1.2.3"):
        assert value not in shown


def test_the_patient_of_a_dicom_file_counts(tmp_path: Path) -> None:
    for number in range(2):
        dicom(tmp_path / f"{number}.dcm", number, PatientID="one")
    (tmp_path / "split.csv").write_text("file,split\n0.dcm,train\n1.dcm,val\n")
    result = check(tmp_path, modality="xray", split=tmp_path / "split.csv")
    assert ("leakage", "error") in codes(result)


def test_spacing_and_orientation_of_volumes(tmp_path: Path) -> None:
    for number in range(7):
        volume(tmp_path / f"{number}.nii.gz", number, step=4.0 if number == 6 else 1.0)
    turned = Nifti1Image(np.asarray(Nifti1Image.from_filename(tmp_path / "5.nii.gz").dataobj), np.diag([-1.0, 1, 1, 1]))
    turned.to_filename(tmp_path / "5.nii.gz")
    found = {finding.code: finding for finding in check(tmp_path, modality="mri").findings}
    assert found["spacing-outlier"].files == ("6.nii.gz",)
    assert "4 mm, where 1 is usual" in found["spacing-outlier"].detail
    assert found["orientation-flip"].files == ("5.nii.gz",)


def test_masks_that_do_not_fit_and_orphans_on_either_side(source: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(5):
        write_image(masks / f"p{number}.png", np.eye(64, 48, dtype=np.uint8))
    write_image(masks / "p4.png", np.eye(60, 48, dtype=np.uint8))
    write_image(masks / "stray.png", np.eye(64, 48, dtype=np.uint8))
    result = check(source, modality="xray", masks=masks)
    found = {(finding.severity, finding.files) for finding in result.findings if finding.code == "label-mismatch"}
    assert ("error", ("p4.png",)) in found
    assert ("warning", ("stray.png",)) in found
    assert any(severity == "note" and {"p5.png", "p6.png", "p7.png"} <= set(files) for severity, files in found)
    assert result.errors == 1


def test_masks_of_volumes_are_held_against_their_place(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(3):
        volume(tmp_path / "images" / f"{number}.nii.gz", number)
        moved = np.eye(4)
        moved[0, 3] = 5.0 * (number == 2)
        labels = np.zeros((20, 18, 6), np.uint8)
        labels[5:9] = 1
        Nifti1Image(labels, moved).to_filename(tmp_path / "masks" / f"{number}.nii.gz")
    result = check(tmp_path / "images", modality="mri", masks=tmp_path / "masks")
    errors = [finding for finding in result.findings if finding.severity == "error"]
    assert [(finding.code, finding.files) for finding in errors] == [("label-mismatch", ("2.nii.gz",))]
    assert "5 mm away" in errors[0].detail


def test_boxes_that_lead_out(source: Path, tmp_path: Path) -> None:
    def box(number: int, right: int) -> dict[str, Any]:
        return {"id": number, "image_id": number, "category_id": 1, "bbox": [4, 4, right - 4, 20]}

    coco = {
        "images": [{"id": number, "file_name": f"p{number}.png", "height": 64, "width": 48} for number in range(8)],
        "categories": [{"id": 1, "name": "nodule"}],
        "annotations": [box(number, 90 if number == 3 else 40) for number in range(8)],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(coco))
    result = check(source, modality="xray", boxes=tmp_path / "boxes.json")
    assert codes(result)[0] == ("label-mismatch", "error")
    assert result.errors == 1


def test_what_must_be_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        check(tmp_path / "nowhere", modality="xray")
    with pytest.raises(MissingInputError):
        check(tmp_path / "nowhere", modality="xray", labels=tmp_path / "labels.csv")
    with pytest.raises(MissingInputError):
        check(source, modality="xray", masks=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="allowed: "):
        check(source, modality="xrya")
    with pytest.raises(UsageError, match="--labels"):
        check(source, modality="xray", label_columns=("x",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        check(tmp_path / "empty", modality="xray")


def test_the_table_is_aligned_and_short(source: Path) -> None:
    for number in range(9):
        (source / f"bad{number}.png").write_bytes(b"no picture")
    shutil.copy(source / "p1.png", source / "twin.png")
    result = check(source, modality="xray")
    first, header, *rows = result.lines()[:8]
    assert first == f"9 xray scans in 18 files of {source}: 9 errors, 1 warning, 0 notes"
    column = header.index("first")
    assert [row[column:].split(":")[0] for row in rows[:4]] == ["bad0.png", "bad1.png", "bad2.png", "and 6 more"]
    assert rows[0].split()[:3] == ["error", "unreadable", "9"]
    assert rows[4].split()[:3] == ["warning", "duplicate", "2"]
    assert all(not row[:column].strip() for row in rows[1:4])


def test_as_dict_has_everything(source: Path) -> None:
    (source / "bad.png").write_bytes(b"no picture")
    told = json.loads(json.dumps(check(source, modality="xray").as_dict()))
    assert told["counts"] == {"error": 1, "warning": 0, "note": 0}
    (finding,) = told["findings"]
    assert (finding["code"], finding["severity"], finding["files"]) == ("unreadable", "error", ["bad.png"])
    assert tuple(told["counts"]) == SEVERITIES


def test_the_command_line_ends_with_65_after_the_table(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ingest", str(source), "--modality", "xray", "--check"]) == 0
    (source / "bad.png").write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.run(["ingest", str(source), "--modality", "xray", "--check", "--json"]) == 65
    assert json.loads(capsys.readouterr().out)["counts"]["error"] == 1


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "modality", "errors", "warnings"),
    [
        ("ultrasound_nerve/images", "ultrasound", 0, {"duplicate", "near-duplicate"}),
        ("mri_hippocampus/images", "mri", 0, set()),
        ("ct_dicom", "ct", 1, set()),
    ],
)
def test_real_sets(name: str, modality: str, errors: int, warnings: set[str]) -> None:
    if not REAL.is_dir():
        pytest.skip(f"{REAL} is not there")
    result = check(REAL / name, modality=modality)
    assert result.errors == errors
    assert {finding.code for finding in result.findings if finding.severity == "warning"} == warnings
