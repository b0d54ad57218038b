import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sslmed.config import DataError
from sslmed.data.readers import read
from sslmed.data.readers.mask import read_masks
from sslmed.data.writers import write_image

NUMBERS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


def values(path: Path) -> np.ndarray:
    (scan,) = read_masks(path)
    assert scan.pixels.dtype == np.uint8
    return scan.pixels


def png(path: Path, raw: list[bytes], width: int, bits: int, colour: int, extra: bytes = b"") -> Path:
    """A PNG of packed rows, made by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, len(raw), bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in raw))
    parts = [chunk(b"IHDR", header), extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_a_palette_gives_its_indices_not_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(NUMBERS, "P")
    picture.putpalette([10, 20, 30, 250, 0, 0, 0, 99, 0] + [7] * 750)
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(values(tmp_path / "m.png"), NUMBERS)
    assert read(tmp_path / "m.png").pixels.shape == (2, 3, 3)  # as a picture it is in colours
    picture.save(tmp_path / "t.png", transparency=0)
    np.testing.assert_array_equal(values(tmp_path / "t.png"), NUMBERS)


@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize(
    ("bits", "row", "numbers"),
    [(1, b"\xa0", [1, 0, 1]), (2, b"\x6c", [1, 2, 3]), (4, b"\x1f\x70", [1, 15, 7])],
)
def test_few_bits_are_not_stretched(tmp_path: Path, colour: int, bits: int, row: bytes, numbers: list[int]) -> None:
    palette = bytes(range(3 * 2**bits))
    chunk = struct.pack(">I", len(palette)) + b"PLTE" + palette + struct.pack(">I", zlib.crc32(b"PLTE" + palette))
    path = png(tmp_path / "m.png", [row, row], 3, bits, colour, chunk if colour == 3 else b"")
    assert values(path).tolist() == [numbers, numbers]


def test_grey_of_8_and_16_bits_and_equal_channels(tmp_path: Path) -> None:
    write_image(tmp_path / "8.png", NUMBERS)
    write_image(tmp_path / "16.png", NUMBERS.astype(np.uint16))
    write_image(tmp_path / "16.tiff", NUMBERS.astype(np.uint16))
    write_image(tmp_path / "rgb.png", np.repeat(NUMBERS[..., None], 3, axis=2))
    for name in ("8.png", "16.png", "16.tiff", "rgb.png"):
        np.testing.assert_array_equal(values(tmp_path / name), NUMBERS)


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    colours = np.repeat(NUMBERS[..., None], 3, axis=2)
    colours[0, 1, 2] += 1
    write_image(tmp_path / "colour.png", colours)
    write_image(tmp_path / "lossy.jpg", np.zeros((8, 8), np.uint8))
    write_image(tmp_path / "large.png", NUMBERS.astype(np.uint16) * 2)
    (tmp_path / "text.png").write_text("no image")
    cut = png(tmp_path / "cut.png", [b"\xa0"], 3, 1, 0).read_bytes()
    (tmp_path / "cut.png").write_bytes(cut[:-13])
    flipped = bytearray(png(tmp_path / "flip.png", [b"\xa0" * 9], 66, 1, 0).read_bytes())
    flipped[45] ^= 1
    (tmp_path / "flip.png").write_bytes(flipped)
    for name, why in [
        ("colour.png", "in colours"),
        ("lossy.jpg", "is a JPEG"),
        ("large.png", "the value 510"),
        ("text.png", "is no PNG"),
        ("cut.png", "truncated"),
        ("flip.png", "damaged"),
        ("absent.png", "cannot be read"),
    ]:
        with pytest.raises(DataError, match=why):
            values(tmp_path / name)


def nifti(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> Path:
    import nibabel

    image = nibabel.Nifti1Image(volume, np.eye(4) if affine is None else affine)
    nibabel.save(image, path)
    return path


def test_volumes_must_hold_whole_numbers_from_0_to_255(tmp_path: Path) -> None:
    volume = np.arange(24).reshape(2, 3, 4) % 3
    for kind in (np.uint8, np.int16, np.int32, np.float32):
        found = values(nifti(tmp_path / "m.nii.gz", volume.astype(kind)))
        np.testing.assert_array_equal(found, volume.transpose(2, 1, 0))
    for bad, why in [(0.5, "0.5; class numbers are whole"), (-1, "the value -1"), (256, "the value 256")]:
        wrong = volume.astype(np.float32)
        wrong[0, 0, 0] = bad
        with pytest.raises(DataError, match=why):
            values(nifti(tmp_path / "m.nii", wrong))


def test_a_mask_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    picture = Image.fromarray(NUMBERS, "P")
    picture.putpalette([200 - number for number in range(200)])
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(values(tmp_path / "m.png"), NUMBERS[::-1, ::-1])


def test_damaged_bytes_raise_a_data_error_only(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "P")
    picture.putpalette(list(range(256)) * 3)
    picture.save(tmp_path / "m.png")
    whole = (tmp_path / "m.png").read_bytes()
    stream = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        content[stream.integers(len(content))] = stream.integers(256)
        if stream.random() < 0.3:
            del content[stream.integers(len(content)) :]
        (tmp_path / "m.png").write_bytes(content)
        try:
            values(tmp_path / "m.png")
        except DataError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("given", [{"WindowCenter": 0, "WindowWidth": 2}, {"PhotometricInterpretation": "MONOCHROME1"}])
def test_no_window_comes_between_a_dicom_mask_and_its_values(tmp_path: Path, given: dict[str, Any]) -> None:
    from dicoms import make_dataset

    make_dataset(NUMBERS, Modality="OT").save_as(tmp_path / "plain.dcm")
    np.testing.assert_array_equal(values(tmp_path / "plain.dcm"), NUMBERS)
    make_dataset(NUMBERS, Modality="OT", **given).save_as(tmp_path / "shown.dcm")
    with pytest.raises(DataError, match=r"shown\.dcm: is DICOM with a window or inverted"):
        values(tmp_path / "shown.dcm")
