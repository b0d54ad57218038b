"""Names of people and places must not leave the site: canaries in ids and paths are looked for in every byte."""

import contextlib
import csv
import io
from pathlib import Path

import numpy as np
import pytest
from dicoms import make_dataset

from sslmed.cli import run
from sslmed.data.phantoms import write_phantoms
from sslmed.data.writers import write_image

CANARIES = ("CANARYNAME", "CANARYMRN", "CANARYFILE", "CANARYFOLDER")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source whose folder, file names and patient ids hold canaries, and the way taken from it through every verb."""
    home = tmp_path_factory.mktemp("site")
    source = home / "CANARYFOLDER"
    phantoms = write_phantoms(home / "plain", patients=40)
    with phantoms.labels.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    source.mkdir()
    for row in rows:
        new = source / f"CANARYFILE_{Path(row[0]).name}"
        (home / "plain" / row[0]).rename(new)
        row[0], row[1] = new.name, f"CANARYNAME CANARYMRN{row[1]}"
    with (source / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    store, pretrained, model = (str(home / name) for name in ("store", "pretrained", "model"))
    small = ["data.workers=0", "train.max_steps=2", "train.batch_size=8"]
    network = ["backbone.name=test_resnet", "data.size=32"]
    labels = str(source / "labels.csv")
    commands = (
        ["ingest", str(source), "--out", store, "--modality", "xray", "--labels", labels],
        ["pretrain", "xray/simclr_resnet18", "--data", store, "--out", pretrained, *small, *network],
        ["evaluate", pretrained, "--data", store, "--seeds", "1", "--replicates", "100"],
        ["finetune", "xray/classification", "--data", store, "--from", pretrained, "--out", model, *small],
    )
    for command in commands:
        assert run(command) == 0, command
    return home


@pytest.mark.parametrize("folder", ["store", "pretrained", "model"])
def test_no_byte_of_what_may_be_shared_names_anyone(site: Path, folder: str) -> None:
    files = [path for path in (site / folder).rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        content = path.read_bytes()
        found = [canary for canary in CANARIES if canary.encode() in content or canary in path.name]
        assert not found, f"{path.relative_to(site)} holds {found}"


def test_what_may_not_be_shared_is_for_its_owner_alone(site: Path) -> None:
    private = site / "store.private"
    assert private.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in private.iterdir()} == {"data_report.json", "key_table.csv"}
    for path in (*private.iterdir(), site / "site.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert "CANARYMRN" in (private / "key_table.csv").read_text(encoding="utf-8")


TAGS = (
    "PatientName",
    "OtherPatientNames",
    "PatientAddress",
    "PatientComments",
    "AccessionNumber",
    "InstitutionName",
    "ReferringPhysicianName",
    "OperatorsName",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "StationName",
    "DeviceSerialNumber",
)
SECRETS = ("CANARY", "19440606", "1.2.840.9")


def write_series(folder: Path, patient: int) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(10 * patient + number).integers(-1000, 2000, (40, 36), np.int16)
        attributes = {
            "Modality": "CT",
            "PatientID": f"CANARYMRN{patient}",
            "PatientBirthDate": "19440606",
            "StudyInstanceUID": f"1.2.840.99.{patient}",
            "SeriesInstanceUID": f"1.2.840.98.{patient}",
            "FrameOfReferenceUID": f"1.2.840.97.{patient}",
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.5, 0.25],
            "ImagePositionPatient": [-10, 20, 2.5 * number],
        }
        dataset = make_dataset(pixels, **attributes | dict.fromkeys(TAGS, "CANARYTAG"))
        dataset.save_as(folder / f"CANARYFILE{number}.dcm")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """CT series with canaries in every tag that may name someone and in every path, and all that was said of them."""
    home = tmp_path_factory.mktemp("hospital")
    source, masks, labels = home / "CANARYFOLDER", home / "CANARYMASKS", home / "CANARYLABELS.csv"
    for patient in range(10):
        write_series(source / f"CANARYPATH{patient}", patient)
    for path in sorted(source.rglob("*.dcm")):
        where = masks / path.relative_to(source).parent
        where.mkdir(parents=True, exist_ok=True)
        write_image(where / f"{path.stem}.png", np.eye(40, 36, dtype=np.uint8))
    rows = [f"CANARYPATH{number},{'ab'[number % 2]}" for number in range(10)]
    labels.write_text("\n".join(["file,label:finding", *rows]) + "\n")
    sides = [f"CANARYMRN{number},{['train', 'val', 'test'][number % 5 % 3]}" for number in range(10)]
    (home / "split.csv").write_text("\n".join(["patient,split", *sides]) + "\n")
    split = str(home / "split.csv")
    store, pretrained, model = (str(home / name) for name in ("store", "pretrained", "model"))
    small = ["data.workers=0", "train.max_steps=2", "train.batch_size=4"]
    said = []
    for command in (
        ["ingest", str(source), "--modality", "ct", "--out", store, "--masks", str(masks), "--split", split],
        ["label", store, "--labels", str(labels)],
        ["preview", store, "--count", "2"],
        ["pretrain", "ct/simclr_resnet18", "--data", store, "--out", pretrained, *small, "data.size=32"],
        ["finetune", "ct/classification", "--data", store, "--from", pretrained, "--out", model, *small],
        ["verify", store],
    ):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert run(command) == 0, (command, err.getvalue())
        said += [out.getvalue(), err.getvalue()]
    return home, said


@pytest.mark.parametrize("folder", ["store", "store-preview", "pretrained", "model"])
def test_no_tag_of_a_scan_leaves_the_site(hospital: tuple[Path, list[str]], folder: str) -> None:
    files = [path for path in (hospital[0] / folder).rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        found = [secret for secret in SECRETS if secret.encode() in content or secret in path.name]
        assert not found, f"{path.relative_to(hospital[0])} holds {found}"
    if folder == "store":
        assert len(list((hospital[0] / folder).glob("*.h5"))) > 3  # pixels, index, labels, masks


def test_no_tag_of_a_scan_is_said(hospital: tuple[Path, list[str]]) -> None:
    """Only the report and the key table name anyone, for their owner; the commands would name files that they skip."""
    for text in hospital[1]:
        assert not any(secret in text for secret in SECRETS), text
    private = hospital[0] / "store.private"
    assert "CANARYMRN3" in (private / "key_table.csv").read_text(encoding="utf-8")
    assert all(path.stat().st_mode & 0o077 == 0 for path in private.iterdir())
