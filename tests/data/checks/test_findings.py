"""Every code is provoked by a scan made for it, and none by a clean set."""

import gzip
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from nibabel import Nifti1Image
from pydicom import dcmread
from pydicom.data import get_testdata_file

from sslmed.config import DataError
from sslmed.data.checks.findings import CODES, SEVERITIES, Checker, Finding, refusal_code
from sslmed.data.checks.measured import Measure, Measured
from sslmed.data.identity import SiteKey
from sslmed.data.readers import scans
from sslmed.data.scan import Scan
from sslmed.data.splits import SPLITS

MEASURE = Measure(SiteKey(b"k" * 32))
TRAIN, VAL, TEST, UNLABELLED = (SPLITS.index(name) for name in ("train", "val", "test", "unlabelled"))


def image(seed: int, *, size: int = 32) -> np.ndarray:
    noise = np.random.default_rng(seed).random((8, 8), np.float32)
    return np.rint(np.interp(cv2.resize(noise, (size, size)), (0, 1), (0, 4000))).astype(np.uint16)


def told(pixels: np.ndarray, **about: Any) -> Measured:
    scan = Scan(pixels.copy(), about.pop("spacing", None), Path("x"), **about)
    return MEASURE(scan, pixels)


def clean(count: int = 8, **about: Any) -> Checker:
    checker = Checker("xray")
    for number in range(count):
        measured = told(image(number), **({"spacing": (0.2, 0.2), "orientation": "LP", "annotated": False} | about))
        checker.add(f"{number}.dcm", measured, f"patient {number}")
    return checker


def codes(checker: Checker) -> list[tuple[str, str]]:
    return [(finding.code, finding.severity) for finding in checker.findings()]


def only(checker: Checker) -> Finding:
    (finding,) = checker.findings()
    return finding


def test_a_clean_set_has_no_findings() -> None:
    assert clean().findings() == ()
    assert Checker("xray").findings() == ()
    volumes = Checker("mri")
    for number in range(8):
        pixels = np.stack([image(number + 100 * part) for part in range(3)])
        volumes.add(str(number), told(pixels, kind="volume", spacing=(3, 1, 1), affine=np.eye(4)), str(number), TRAIN)
    assert volumes.findings() == ()


def test_constant() -> None:
    checker = clean()
    checker.add("blank.dcm", told(np.full((32, 32), 7, np.uint8), spacing=(0.2, 0.2)), "p")
    assert only(checker) == Finding("constant", "warning", ("blank.dcm",), "every pixel is 7")


def test_two_constant_images_are_equal_and_never_alike() -> None:
    checker = Checker("xray")
    for number in range(3):
        checker.add(f"{number}", told(np.full((32, 32 + number), number, np.uint8)), f"p{number}")
    assert codes(checker) == [("constant", "warning")] * 3


def test_saturated() -> None:
    pixels = image(20)
    pixels[pixels > np.quantile(pixels, 0.8)] = 4095
    checker = clean()
    checker.add("bright.dcm", told(pixels, spacing=(0.2, 0.2)), "p")
    assert (only(checker).code, only(checker).severity, only(checker).files) == (
        "saturated",
        "warning",
        ("bright.dcm",),
    )
    assert only(checker).detail.startswith("20% of its pixels have the greatest value, 4095")


def test_white_glass_is_not_saturated_unless_it_is_all_there_is() -> None:
    for share, found in ((0.3, []), (0.7, [("saturated", "warning")])):
        pixels = np.repeat((image(1) // 20).astype(np.uint8)[..., None], 3, axis=2)
        pixels[image(1) > np.quantile(image(1), 1 - share)] = 255
        checker = Checker("histology")
        checker.add("tile", told(pixels), "p")
        assert codes(checker) == found


@pytest.mark.parametrize(("shape", "found"), [((15, 40), True), ((40, 15), True), ((16, 16), False)])
def test_tiny(shape: tuple[int, int], found: bool) -> None:
    checker = Checker("xray")
    checker.add("a", told(image(3, size=40)[: shape[0], : shape[1]]), "p")
    assert codes(checker) == ([("tiny", "warning")] if found else [])


@pytest.mark.parametrize(("patient", "severity"), [("patient 0", "note"), ("other", "warning")])
def test_duplicate(patient: str, severity: str) -> None:
    checker = clean()
    checker.add("again.png", told(image(0), spacing=(0.2, 0.2)), patient)
    assert (only(checker).code, only(checker).severity) == ("duplicate", severity)
    assert only(checker).files == ("0.dcm", "again.png")
    assert ("2 patients" in only(checker).detail) == (severity == "warning")


def test_a_duplicate_in_another_depth_is_one() -> None:
    checker = Checker("xray")
    checker.add("8.png", told((image(0) // 16).astype(np.uint8)), "a")
    checker.add("16.png", told((image(0) // 16).astype(np.uint16)), "a")
    assert codes(checker) == [("duplicate", "note")]


@pytest.mark.parametrize(("patient", "found"), [("patient 0", False), ("other", True)])
def test_near_duplicate_counts_between_patients(patient: str, found: bool) -> None:
    coded = cv2.imencode(".jpg", (image(0) // 16).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    checker = clean()
    checker.add("copy.jpg", told(cv2.imdecode(coded, cv2.IMREAD_UNCHANGED), spacing=(0.2, 0.2)), patient)
    assert codes(checker) == ([("near-duplicate", "warning")] if found else [])
    if found:
        assert only(checker).files == ("0.dcm", "copy.jpg")


def test_thousands_of_near_duplicates_are_summed_up() -> None:
    checker = Checker("xray")
    for number in range(30):
        pixels = image(0)
        pixels[0, 0] = number  # not equal, only near
        checker.add(f"{number}", told(pixels), f"p{number}")
    *shown, rest = checker.findings()
    assert len(shown) == 20
    assert all(finding.code == rest.code == "near-duplicate" for finding in shown)
    assert "435 pairs in all look alike: 30 scans in 1 groups, the largest of 30" in rest.detail


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        ((0.2, 0.8), "across 0.8 mm, where 0.2 is usual"),
        ((0.02, 0.02), "down 0.02 mm, where 0.2 is usual; across 0.02 mm, where 0.2 is usual"),
    ],
)
def test_spacing_outlier(spacing: tuple[float, float], words: str) -> None:
    checker = clean()
    checker.add("odd.dcm", told(image(30), spacing=spacing), "p")
    assert only(checker) == Finding("spacing-outlier", "warning", ("odd.dcm",), words)


def test_missing_spacing_where_others_have_it() -> None:
    checker = clean()
    checker.add("bare.dcm", told(image(30)), "p")
    assert only(checker) == Finding("spacing-outlier", "warning", ("bare.dcm",), "no spacing, where 8 others have one")
    mostly_bare = clean(6, spacing=None)
    mostly_bare.add("one.dcm", told(image(30), spacing=(0.2, 0.2)), "p")
    assert mostly_bare.findings() == ()


def test_volumes_and_images_are_not_compared() -> None:
    checker = clean()
    pixels = np.stack([image(40), image(41)])
    checker.add("volume.nii", told(pixels, kind="volume", spacing=(5, 3, 3)), "p")
    assert checker.findings() == ()


def test_orientation_flip() -> None:
    checker = clean()
    checker.add("turned.dcm", told(image(30), spacing=(0.2, 0.2), orientation="RP"), "p")
    checker.add("silent.png", told(image(31), spacing=(0.2, 0.2)), "q")
    words = "axes point RP, in 8 of 9 scans LP"
    assert only(checker) == Finding("orientation-flip", "warning", ("turned.dcm",), words)


def test_burned_in_text() -> None:
    checker = clean()
    checker.add("text.dcm", told(image(30), spacing=(0.2, 0.2), annotated=True), "p")
    assert (only(checker).code, only(checker).severity, only(checker).files) == ("burned-in", "warning", ("text.dcm",))


@pytest.mark.parametrize(
    ("modality", "kind", "found"), [("xray", "CR", 0), ("xray", "SC", 1), ("ultrasound", None, 1), ("photo", None, 0)]
)
def test_where_text_is_usual_silence_is_noted(modality: str, kind: str | None, found: int) -> None:
    checker = Checker(modality)
    for number in range(3):
        checker.add(f"{number}", told(image(number), modality=kind), f"p{number}")
    assert codes(checker) == [("burned-in", "note")] * found
    for finding in checker.findings():
        assert len(finding.files) == 3


def test_identity_is_told_by_name_and_never_by_value() -> None:
    checker = Checker("xray")
    for number in range(3):
        about = {"patient": "Lovelace^Ada", "identity": ("PatientName", "PatientID")[: 1 + number % 2]}
        checker.add(f"{number}", told(image(number), **about), "Lovelace^Ada")
    finding = only(checker)
    assert (finding.code, finding.severity, finding.files) == ("identity", "note", ("0", "1", "2"))
    assert "PatientName in 3, PatientID in 1 scans" in finding.detail
    assert "Lovelace" not in repr(finding)


def test_leakage_of_a_patient() -> None:
    checker = Checker("xray")
    for number, (patient, side) in enumerate([("a", TRAIN), ("a", TEST), ("b", TRAIN), ("b", UNLABELLED), ("c", VAL)]):
        checker.add(f"{number}", told(image(number)), patient, side)
    assert only(checker) == Finding("leakage", "error", ("0", "1"), "one patient in train and test")


def test_leakage_of_an_image() -> None:
    checker = Checker("xray")
    checker.add("one", told(image(0)), "a", UNLABELLED)
    checker.add("other", told(image(0)), "b", VAL)
    leak, twin = checker.findings()
    assert leak == Finding("leakage", "error", ("one", "other"), "one and the same image in train and val")
    assert twin.code == "duplicate"


def test_without_a_split_nothing_leaks() -> None:
    checker = Checker("xray")
    for number in range(2):
        checker.add(f"{number}", told(image(number)), "a")
    assert checker.findings() == ()


def test_what_others_found_is_told_too() -> None:
    checker = clean(1)
    checker.refused("odd.dcm", "is a slice of a series", by_modality=True)
    checker.tell("label-mismatch", "warning", ("mask.png",), "a mask without an image")
    assert codes(checker) == [("not-for-this-modality", "error"), ("label-mismatch", "warning")]
    for code, severity in (("odd", "error"), ("tiny", "fatal")):
        with pytest.raises(ValueError, match=code):
            checker.tell(code, severity, (), "")  # type: ignore[arg-type]


def test_errors_come_first_then_codes_in_their_order() -> None:
    checker = clean()
    checker.add("blank", told(np.zeros((32, 32), np.uint8)), "p")
    checker.add("small", told(image(50)[:5]), "p")
    checker.tell("identity", "note", (), "")
    checker.refused("bad", "is damaged")
    found = checker.findings()
    keys = [(SEVERITIES.index(one.severity), CODES.index(one.code)) for one in found]
    assert keys == sorted(keys)
    assert len(found) == 5


def test_a_record_is_small() -> None:
    measured = told(image(0, size=512))
    assert not [value for value in (getattr(measured, name) for name in measured.__slots__) if hasattr(value, "nbytes")]
    assert replace(measured) == measured


# What the readers say of files that are made for it.


def encoded(suffix: str) -> bytes:
    return cv2.imencode(suffix, (image(0) // 16).astype(np.uint8))[1].tobytes()


def tiff() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image(0))
    return file.getvalue()


def nifti(value: float = 1.0) -> bytes:
    values = np.random.default_rng(0).random((16, 15, 14), np.float32)
    values[0, 0, 0] = value
    return Nifti1Image(values, np.eye(4)).to_bytes()


def numpy_file(pixels: np.ndarray, archive: bool = False) -> bytes:
    file = io.BytesIO()
    if archive:
        np.savez(file, train_images=pixels[None])
    else:
        np.save(file, pixels)
    return file.getvalue()


def small_dicom() -> bytes:
    path = get_testdata_file("CT_small.dcm", download=False)
    return Path(str(path)).read_bytes()


def unscaled_dicom() -> bytes:
    file = io.BytesIO()
    dataset = dcmread(io.BytesIO(small_dicom()))
    del dataset.RescaleSlope
    dataset.save_as(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("empty.png", lambda: b"", "truncated"),
        ("half.png", lambda: encoded(".png")[:-200], "truncated"),
        ("half.jpg", lambda: encoded(".jpg")[:-200], "truncated"),
        ("half.tif", lambda: tiff()[:-200], "truncated"),
        ("half.dcm", lambda: small_dicom()[:-200], "truncated"),
        ("half.nii", lambda: nifti()[:-20], "truncated"),
        ("half.nii.gz", lambda: gzip.compress(nifti())[:-20], "truncated"),
        ("half.npy", lambda: numpy_file(image(0))[:-200], "truncated"),
        ("half.npz", lambda: numpy_file(image(0), archive=True)[:-200], "truncated"),
        ("nan.npy", lambda: numpy_file(np.full((20, 20), np.nan, np.float32)), "nan"),
        ("nan.nii", lambda: nifti(np.nan), "nan"),
        ("infinite.nii", lambda: nifti(np.inf), "nan"),
        ("text.png", lambda: b"hello", "unreadable"),
        ("flipped.png", lambda: encoded(".png").replace(b"IDAT", b"IDAX"), "unreadable"),
        ("unscaled.dcm", unscaled_dicom, "unreadable"),
    ],
)
def test_a_file_that_cannot_be_read_has_a_code(name: str, make: Callable[[], bytes], code: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(DataError) as caught:
        list(scans(path))
    reason = str(caught.value).removeprefix(f"{path}: ")
    assert refusal_code(reason) == code, reason
    checker = Checker("xray")
    checker.refused(name, reason)
    assert only(checker) == Finding(code, "error", (name,), reason)


def test_every_code_is_explained() -> None:
    page = (Path(__file__).parents[3] / "docs" / "checks.md").read_text(encoding="utf-8")
    assert [code for code in CODES if f"| `{code}` |" not in page] == []
