"""NumPy arrays and the archives of MedMNIST."""

import struct
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.readers import read, scans

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(-900, 900, (4, 5, 6)).astype(np.int16)


def save(folder: Path, values: Any, **options: Any) -> Path:
    np.save(folder / "a.npy", values, **options)
    return folder / "a.npy"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["<u1", "<u2", ">u2", "<i2", ">i2", "<f4", ">f4"])
@pytest.mark.parametrize(("shape", "means"), [((40, 50), "image"), ((4, 5, 6), "volume"), ((20, 30, 5), "volume")])
def test_arrays_keep_their_values(tmp_path: Path, shape: tuple[int, ...], means: str, kind: str, order: Any) -> None:
    values = np.asarray(RNG.integers(0, 200, shape), kind, order=order)
    scan = read(save(tmp_path, values))
    assert (scan.kind, scan.spacing, scan.affine, scan.grid) == (means, None, None, None)
    assert scan.pixels.dtype == np.dtype(kind).newbyteorder("=")
    assert scan.pixels.dtype.isnative
    np.testing.assert_array_equal(scan.pixels, values)


def test_three_unsigned_channels_are_colour(tmp_path: Path) -> None:
    for kind in (np.uint8, np.uint16):
        values = RNG.integers(0, 256, (20, 30, 3)).astype(kind)
        scan = read(save(tmp_path, values))
        assert (scan.kind, scan.pixels.dtype) == ("image", kind)
        np.testing.assert_array_equal(scan.pixels, values)
    assert read(save(tmp_path, VOLUME[..., :1])).pixels.shape == (4, 5)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.array([[0, 1], [1, 0]], bool), np.uint8),
        (np.array([[-128, 127]], np.int8), np.int16),
        (np.array([[0, 127]], np.int8), np.int16),
        (np.array([[0, 65535]], np.int64), np.uint16),
        (np.array([[-32768, 32767]], np.int32), np.int16),
        (np.array([[0, 9]], np.uint64), np.uint16),
        (np.array([[0.5, -2]], np.float16), np.float32),
        (np.array([[0.5, -2e30]], np.float64), np.float32),
    ],
)
def test_other_numbers_are_converted_when_they_fit(tmp_path: Path, values: np.ndarray, kind: type) -> None:
    pixels = read(save(tmp_path, values)).pixels
    assert pixels.dtype == kind
    np.testing.assert_array_equal(pixels, values.astype(kind))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1, 65535]]), "from -1 to 65535 in int64"),
        (np.array([[0, 2**40]]), "allowed: what fits 16 bits"),
        (np.array([[0, np.nan], [np.inf, 1]]), "2 values that are NaN"),
        (np.array([[1e300]]), "beyond the range"),
        (np.zeros((2, 2), np.complex64), "holds complex64"),
        (np.zeros((2, 2), np.longdouble), "holds float128"),
        (np.array([["a"]]), "holds <U1"),
        (np.zeros((2, 2), [("a", "u1")]), "holds"),
        (np.zeros((20, 20, 3), np.float32), "last axis of 3 in float32"),
        (np.zeros((20, 20, 4), np.uint8), "last axis of 4"),
        (np.zeros(5, np.uint8), r"of shape \(5,\)"),
        (np.zeros((), np.uint8), r"of shape \(\)"),
        (np.zeros((0, 3), np.uint8), r"of shape \(0, 3\)"),
        (np.zeros((2, 2, 2, 2), np.uint8), r"of shape \(2, 2, 2, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_refused_by_name(tmp_path: Path, values: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(save(tmp_path, values))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (open, ("exploded", "w"))  # what loading it would do


def test_objects_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, np.array([[Bomb()]], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.array([[Bomb()]], object), allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match="Python objects"):
            read(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_claims_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    path = save(tmp_path, VOLUME)
    content = path.read_bytes()
    for changed, words in (
        (content[:-1], "240 bytes is claimed, 239 bytes are there"),
        (content + b"\0", "240 bytes is claimed, 241 bytes are there"),
        (content.replace(b"(4, 5, 6), }    ", b"(400, 500, 6), }"), "2400000 bytes is claimed"),
        (content.replace(b"(4, 5, 6), }     ", b"(90000, 90000), }"), "allowed: at most"),
        (content[:6] + b"\3" + content[7:], r"version \(3, 0\)"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=words):
            read(path)


def medmnist(folder: Path, **changed: Any) -> Path:
    members: dict[str, Any] = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        members[f"{split}_images"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        members[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None]
    members |= changed
    np.savez_compressed(folder / "a.npz", **{name: value for name, value in members.items() if value is not None})
    return folder / "a.npz"


def test_medmnist_comes_image_by_image(tmp_path: Path) -> None:
    path = medmnist(tmp_path)
    found = list(scans(path))
    stored = np.load(path)
    assert [scan.part for scan in found] == [
        f"{split}/{number}" for split, count in (("train", 5), ("val", 2), ("test", 3)) for number in range(count)
    ]
    for scan in found:
        split, _, number = scan.part.partition("/")
        np.testing.assert_array_equal(scan.pixels, stored[f"{split}_images"][int(number)])
        assert (scan.kind, scan.split, scan.labels, scan.patient) == ("image", split, {"label": number}, "")
    with pytest.raises(DataError, match="holds 10 images, and one is expected"):
        read(path)


def test_medmnist_in_colour_in_depth_and_with_many_labels(tmp_path: Path) -> None:
    colour = RNG.integers(0, 256, (5, 28, 28, 3), dtype=np.uint8)
    depth = RNG.integers(0, 256, (2, 28, 28, 28), dtype=np.uint8)
    many = RNG.integers(0, 2, (5, 14))
    path = medmnist(tmp_path, train_images=colour, train_labels=many, val_images=depth, val_labels=None)
    found = {scan.part: scan for scan in scans(path)}
    assert (found["train/4"].kind, found["val/1"].kind) == ("image", "volume")
    np.testing.assert_array_equal(found["train/4"].pixels, colour[4])
    np.testing.assert_array_equal(found["val/1"].pixels, depth[1])
    assert found["train/4"].labels == {f"label{number}": str(value) for number, value in enumerate(many[4])}
    assert found["val/1"].labels == {}
    only_train = medmnist(tmp_path, **{f"{s}_{w}": None for s in ("val", "test") for w in ("images", "labels")})
    assert len(list(scans(only_train))) == 5


def test_an_archive_of_one_array_is_that_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", VOLUME)
    scan = read(tmp_path / "a.npz")
    assert (scan.kind, scan.part, scan.split) == ("volume", "", "")
    np.testing.assert_array_equal(scan.pixels, VOLUME)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"masks": np.zeros(3)}, "holds the arrays masks, test_images"),
        ({"val_images": None}, "holds val_labels without images"),
        ({"train_labels": np.zeros((4, 1))}, r"train_labels of shape \(4, 1\) for 5 images"),
        ({"train_labels": np.full((5, 1), 0.5)}, "no whole numbers"),
        ({"train_images": np.zeros((5, 9), np.uint8)}, r"train_images of shape \(5, 9\)"),
        ({"train_images": np.asfortranarray(np.zeros((5, 9, 9), np.uint8))}, "Fortran order"),
    ],
)
def test_other_archives_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        next(scans(medmnist(tmp_path, **changed)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_of_other_things(tmp_path: Path) -> None:
    for names, words in (
        (["notes.txt"], "'notes.txt' in it"),
        ([], r"holds the arrays \(none\)"),
        (["a.npy", "a.npy"], "holds 'a' twice"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in names:
                archive.writestr(name, b"")
        with pytest.raises(DataError, match=words):
            read(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", VOLUME)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="is encrypted"):
        read(tmp_path / "a.npz")


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = medmnist(tmp_path)
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # the size that the directory claims
    path.write_bytes(content)
    with pytest.raises(DataError, match="claims 2147483648 bytes of 'train_images', more than"):
        next(scans(path))
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 28, 28)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", header.getvalue() + bytes(1000))
    with pytest.raises(DataError, match="claims 862017116176384 bytes, 1000 are there"):
        next(scans(path))


def test_damage_is_an_error_at_once_or_midway(tmp_path: Path) -> None:
    path = medmnist(tmp_path, train_images=RNG.integers(0, 256, (300, 28, 28), dtype=np.uint8), train_labels=None)
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 0xFF  # in the middle of the first member: noise does not compress
    path.write_bytes(content)
    found = []
    with pytest.raises(DataError, match=r"a\.npz: damaged"):
        found.extend(scans(path))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.npz: damaged"):
        list(scans(path))


def test_an_archive_is_streamed(tmp_path: Path) -> None:
    images = np.zeros((3000, 100, 100), np.uint8)  # 30 MB
    images[:, 0, 0] = np.arange(3000) % 256
    path = medmnist(tmp_path, train_images=images, train_labels=None)
    for scan in scans(path):  # libraries are imported, caches filled
        assert scan.part == "train/0"
        break
    tracemalloc.start()
    for number, scan in enumerate(scans(path)):
        assert number >= 3000 or scan.pixels[0, 0] == number % 256
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 3004
    assert peak < 2**21
