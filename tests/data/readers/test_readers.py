import random
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslmed.config import DataError
from sslmed.data.readers import PIXEL_LIMIT, read
from sslmed.data.writers import write_image

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (40, 56), dtype=np.uint8)
GREY16 = RNG.integers(0, 4096, (40, 56), dtype=np.uint16)
RGB8 = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (40, 56, 3), dtype=np.uint16)
SMOOTH = (np.add.outer(np.arange(40), np.arange(56)) * 2).astype(np.uint8)
FORMATS = {"png": GREY16, "jpg": SMOOTH, "tif": GREY16}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("valid")
    for suffix, pixels in FORMATS.items():
        write_image(folder / f"a.{suffix}", pixels)
    return {suffix: (folder / f"a.{suffix}").read_bytes() for suffix in FORMATS}


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("pixels", [GREY8, GREY16, RGB8, RGB16], ids=["grey8", "grey16", "rgb8", "rgb16"])
def test_lossless_formats_come_back_exactly(tmp_path: Path, suffix: str, pixels: np.ndarray) -> None:
    path = tmp_path / f"Ünïcödé 图.{suffix}"
    write_image(path, pixels)
    scan = read(path)
    assert scan.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(scan.pixels, pixels)
    assert scan.spacing is None
    assert scan.source == path


@pytest.mark.parametrize("colour", [False, True])
def test_jpeg_comes_back_nearly(tmp_path: Path, colour: bool) -> None:
    pixels = np.dstack([SMOOTH, SMOOTH // 2, 255 - SMOOTH]) if colour else SMOOTH
    write_image(tmp_path / "a.jpg", pixels)
    read_back = read(tmp_path / "a.jpg").pixels
    assert read_back.shape == pixels.shape
    assert np.abs(read_back.astype(int) - pixels).max() < 12


def test_a_scan_cannot_be_changed(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", GREY8)
    with pytest.raises(ValueError, match="read-only"):
        read(tmp_path / "a.png").pixels[0, 0] = 1


def test_the_content_says_the_format(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", GREY8)
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg").pixels, GREY8)


@pytest.mark.parametrize("percent", [0, 10, 50, 90, 99])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_file_is_refused(tmp_path: Path, valid: dict[str, bytes], suffix: str, percent: int) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(valid[suffix][: len(valid[suffix]) * percent // 100])
    with pytest.raises(DataError, match=path.name):
        read(path)


def test_every_flipped_byte_of_a_png_is_found(tmp_path: Path, valid: dict[str, bytes]) -> None:
    path = tmp_path / "a.png"
    for position in random.Random(0).sample(range(len(valid["png"])), 60):
        content = bytearray(valid["png"])
        content[position] ^= 1 << (position % 8)
        path.write_bytes(content)
        with pytest.raises(DataError):
            read(path)


def test_uncompressed_tiff_cut_in_its_last_strip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, GREY16, photometric="minisblack")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="truncated"):
        read(path)


def _mutate(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    changed = bytearray(content)
    for kind, where, value in edits:
        position = int(where * len(changed))
        if kind == "flip" and position < len(changed):
            changed[position] ^= value
        elif kind == "insert":
            changed[position:position] = bytes([value]) * (1 + value % 5)
        elif kind == "delete":
            del changed[position : position + 1 + value % 9]
        elif kind == "truncate":
            del changed[position:]
    return bytes(changed)


EDIT = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "truncate"]),
    # half of the edits near the start, where the headers are
    st.one_of(st.floats(0, 0.05), st.floats(0, 1)),
    st.integers(1, 255),
)


@pytest.mark.parametrize("suffix", FORMATS)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_reader_raises_nothing_but_data_error(
    tmp_path: Path, valid: dict[str, bytes], suffix: str, edits: list[tuple[str, float, int]]
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(_mutate(valid[suffix], edits))
    try:
        pixels = read(path).pixels
    except DataError:
        return
    assert pixels.ndim in (2, 3)
    assert pixels.dtype in (np.uint8, np.uint16)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"this is text", "is no PNG, JPEG or TIFF"), (b"\x89PNG\r\n\x1a\n", "truncated")],
)
def test_what_is_no_image_is_called_so(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read(path)


def test_unreadable_paths_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "absent.png")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(header: bytes, *chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(chunks) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height", "words"), [(2**20, 2**20, "allowed"), (16000, 16000, "can hold"), (0, 10, "claims")]
)
def test_a_png_bomb_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int, words: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png(struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), _chunk(b"IDAT", b"\0" * 50)))
    started = time.monotonic()
    with pytest.raises(DataError, match=words):
        read(path)
    assert time.monotonic() - started < 2


def test_jpeg_and_tiff_bombs_are_refused_before_they_are_decoded(tmp_path: Path, valid: dict[str, bytes]) -> None:
    jpeg = bytearray(valid["jpg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    assert PIXEL_LIMIT < 65000 * 65000
    tiff = bytearray(valid["tif"])
    (tmp_path / "a.tif").write_bytes(tiff)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        offsets = [file.pages.first.tags[code].valueoffset for code in (256, 257)]
    for offset in offsets:
        tiff[offset : offset + 2] = struct.pack("<H", 65000)
    (tmp_path / "a.tif").write_bytes(tiff)
    for name in ("a.jpg", "a.tif"):
        with pytest.raises(DataError, match="allowed: at most"):
            read(tmp_path / name)


def test_a_jpeg_claims_no_more_than_its_bytes_can_hold(tmp_path: Path, valid: dict[str, bytes]) -> None:
    path = tmp_path / "a.jpg"
    jpeg = bytearray(valid["jpg"])
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 16000, 16000)
    path.write_bytes(jpeg)
    with pytest.raises(DataError, match="claims 16000 x 16000 pixels, more than"):
        read(path)
    blank = np.zeros((3000, 3000), np.uint8)  # nothing is smaller than one bit a block
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_QUALITY, 1]
    path.write_bytes(cv2.imencode(".jpg", blank, options)[1].tobytes())
    assert read(path).pixels.shape == (3000, 3000)


def test_alpha_is_dropped_when_opaque_and_refused_otherwise(tmp_path: Path) -> None:
    opaque = np.dstack([RGB8, np.full(GREY8.shape, 255, np.uint8)])
    cv2.imwrite(str(tmp_path / "a.png"), opaque[..., [2, 1, 0, 3]])
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, RGB8)
    opaque[3, 4, 3] = 254
    cv2.imwrite(str(tmp_path / "a.png"), opaque)
    with pytest.raises(DataError, match="transparent"):
        read(tmp_path / "a.png")


def test_grey_with_alpha_stays_grey(tmp_path: Path) -> None:
    rows = b"".join(b"\0" + np.dstack([row, np.full_like(row, 255)]).tobytes() for row in GREY8)
    header = struct.pack(">IIBBBBB", 56, 40, 8, 4, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(_png(header, _chunk(b"IDAT", zlib.compress(rows))))
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, GREY8)


def test_palette_becomes_rgb(tmp_path: Path) -> None:
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in GREY8)
    header = struct.pack(">IIBBBBB", 56, 40, 8, 3, 0, 0, 0)
    chunks = (_chunk(b"PLTE", palette.tobytes()), _chunk(b"IDAT", zlib.compress(rows)))
    (tmp_path / "a.png").write_bytes(_png(header, *chunks))
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, palette[GREY8])


TURNED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_is_applied_alike_by_jpeg_png_and_tiff(tmp_path: Path, orientation: int) -> None:
    exif = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + b"\0\0\0\0"
    write_image(tmp_path / "a.jpg", SMOOTH)
    plain = read(tmp_path / "a.jpg").pixels
    content = (tmp_path / "a.jpg").read_bytes()
    segment = b"Exif\0\0" + exif
    (tmp_path / "a.jpg").write_bytes(
        content[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + content[2:]
    )
    np.testing.assert_array_equal(read(tmp_path / "a.jpg").pixels, TURNED[orientation](plain))

    rows = b"".join(b"\0" + row.tobytes() for row in GREY8)
    header = struct.pack(">IIBBBBB", 56, 40, 8, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(_png(header, _chunk(b"eXIf", exif), _chunk(b"IDAT", zlib.compress(rows))))
    np.testing.assert_array_equal(read(tmp_path / "a.png").pixels, TURNED[orientation](GREY8))

    tifffile.imwrite(tmp_path / "a.tif", GREY16, photometric="minisblack", extratags=[(274, 3, 1, orientation, True)])
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, TURNED[orientation](GREY16))


def test_white_is_zero_is_inverted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", GREY8, photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, 255 - GREY8)


def test_planar_rgb_tiff(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(RGB16, 2, 0), photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read(tmp_path / "a.tif").pixels, RGB16)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_signed_and_float_tiffs_keep_their_values(tmp_path: Path, kind: type, byteorder: str) -> None:
    values = (GREY16.astype(np.float32) * 1.5 - 3000).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack", byteorder=byteorder)
    pixels = read(tmp_path / "a.tif").pixels
    assert (pixels.dtype, pixels.dtype.isnative) == (kind, True)
    np.testing.assert_array_equal(pixels, values)


@pytest.mark.parametrize(
    ("pixels", "options", "words"),
    [
        (GREY8.astype(np.float64), {"photometric": "minisblack"}, "64-bit float64"),
        (GREY8.astype(np.int32), {"photometric": "minisblack"}, "32-bit int32"),
        (RGB8.astype(np.int16), {"photometric": "rgb"}, "int16 that is not plain grey"),
        (np.full((4, 5), np.nan, np.float32), {"photometric": "minisblack"}, "20 values that are NaN"),
        (GREY8, {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "PALETTE"),
    ],
    ids=["double", "int32", "signed colour", "nan", "palette"],
)
def test_other_tiffs_are_refused_by_name(tmp_path: Path, pixels: np.ndarray, options: dict, words: str) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "a.tif")


def test_trailing_bytes_after_the_end_marker_are_allowed(tmp_path: Path, valid: dict[str, bytes]) -> None:
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(valid[suffix] + b"\0" * 64)
        assert read(path).pixels.shape == (40, 56)


def test_progressive_jpeg_and_restart_markers(tmp_path: Path) -> None:
    for option in (cv2.IMWRITE_JPEG_PROGRESSIVE, cv2.IMWRITE_JPEG_RST_INTERVAL):
        content = cv2.imencode(".jpg", SMOOTH, [option, 1])[1].tobytes()
        (tmp_path / "a.jpg").write_bytes(content)
        assert read(tmp_path / "a.jpg").pixels.shape == (40, 56)
        (tmp_path / "a.jpg").write_bytes(content[:-2])
        with pytest.raises(DataError, match="end marker"):
            read(tmp_path / "a.jpg")


def test_write_image_refuses_what_the_format_cannot_hold(tmp_path: Path) -> None:
    for name, pixels in (
        ("a.jpg", GREY16),
        ("a.png", GREY8.astype(np.float32)),
        ("a.bmp", GREY8),
        ("a.tif", RGB8[..., :2]),
    ):
        with pytest.raises(ValueError, match=name):
            write_image(tmp_path / name, pixels)
    assert not list(tmp_path.iterdir())
