import hashlib
import hmac
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from sslmed.config import DataError, DiskError
from sslmed.data.identity import SiteKey, fingerprint, load_or_make_key, seen

KEY = SiteKey(bytes(range(32)))
OTHER = SiteKey(bytes(32))


def test_a_new_key_is_private_and_comes_back(tmp_path: Path) -> None:
    usual = os.umask(0)
    try:
        made = load_or_make_key(tmp_path / "site.key")
    finally:
        os.umask(usual)
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    assert load_or_make_key(tmp_path / "site.key") == made
    assert load_or_make_key(tmp_path / "other.key") != made


def test_the_secret_is_not_printed() -> None:
    assert repr(KEY) == f"SiteKey(id='{KEY.id}')"
    assert KEY.id == hashlib.sha256(bytes(range(32))).hexdigest()[:8]


@pytest.mark.parametrize("content", ["", "hello", "ab" * 31, "zz" * 32, "ab" * 33])
def test_a_file_that_is_no_key_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "site.key"
    path.write_text(content)
    with pytest.raises(DataError, match="is no site key"):
        load_or_make_key(path)
    assert path.read_text() == content


def test_a_key_in_a_missing_folder_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot write the site key"):
        load_or_make_key(tmp_path / "absent" / "site.key")


def test_patient_is_the_hmac_of_the_normalised_id() -> None:
    expected = hmac.new(bytes(range(32)), b"patient\0p 001", hashlib.sha256).hexdigest()[:32]
    assert KEY.patient("P 001") == expected
    for twin in ("p 001", " P  001\t", "P\u00a0001", "\uff30 001"):
        assert KEY.patient(twin) == expected
    assert KEY.patient("P001") != expected
    assert OTHER.patient("P 001") != expected


def test_a_blank_patient_is_refused() -> None:
    with pytest.raises(DataError, match="blank"):
        KEY.patient(" \t")


def test_content_depends_on_values_and_shape_not_on_depth_or_layout() -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(6, 10)
    digest = KEY.content(pixels)
    assert len(digest) == 64
    assert KEY.content(pixels.astype(np.uint16)) == digest
    assert KEY.content(pixels.astype(">u2")) == digest
    assert KEY.content(np.asfortranarray(pixels)) == digest
    assert KEY.content(pixels.reshape(10, 6)) != digest
    changed = pixels.copy()
    changed[3, 3] ^= 1
    assert KEY.content(changed) != digest
    assert OTHER.content(pixels) != digest


def patients(*names: str, key: SiteKey = KEY) -> np.ndarray:
    return np.array([key.patient(name) for name in names], "S32")


def images(*numbers: int, key: SiteKey = KEY) -> np.ndarray:
    return np.array([key.content(np.full((4, 4), number, np.uint8)) for number in numbers], "S64")


def test_fingerprint_is_sorted_unique_and_independent_of_order() -> None:
    names = [f"p{number}" for number in range(50)]
    made = fingerprint(patients(*names, *names[:7]), images(*range(57)))
    assert made.shape == (50 + 57, 8)
    assert made.dtype == np.uint8
    expected = [KEY.patient(name)[:16] for name in names] + [image.decode()[:16] for image in images(*range(57))]
    assert [row.tobytes().hex() for row in made] == sorted(expected)
    np.testing.assert_array_equal(fingerprint(patients(*names[::-1]), images(*range(57))), made)
    assert fingerprint(patients(), images()).shape == (0, 8)


def test_seen_counts_patients_and_never_says_zero_across_keys() -> None:
    known = fingerprint(patients(*(f"p{number}" for number in range(50))), images(*range(50)))
    asked = patients(*[f"P{number} " for number in range(45, 60)] * 2)
    new = images(*range(100, 130))
    assert seen(known, KEY.id, asked, new, KEY.id) == 5
    assert seen(known, KEY.id, patients("new"), images(200), KEY.id) == 0
    assert seen(known, KEY.id, patients(), images(), KEY.id) == 0
    assert seen(fingerprint(patients(), images()), KEY.id, asked, new, KEY.id) == 0
    assert seen(known, KEY.id, patients("p1", key=OTHER), images(1, key=OTHER), OTHER.id) is None


def test_a_patient_under_another_name_is_known_by_the_image() -> None:
    known = fingerprint(patients("scan-001.png", "scan-002.png"), images(1, 2))
    assert seen(known, KEY.id, patients("Smith", "Smith", "Jones"), images(1, 2, 3), KEY.id) == 1
