"""TIFFs of several pages: clips, volumes where their text says so, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from sslmed.config import DataError
from sslmed.data.readers import read, scans

RNG = np.random.default_rng(0)
STACK = RNG.integers(0, 4096, (3, 20, 30), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)


def save(folder: Path, pixels: np.ndarray, **options: Any) -> Path:
    tifffile.imwrite(folder / "a.tif", pixels, **options)
    return folder / "a.tif"


def edited(path: Path, old: str, new: str) -> Path:
    """With one part of its text another of the same length."""
    content = path.read_bytes()
    assert content.count(old.encode()) == 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old.encode(), new.encode()))
    return path


@pytest.mark.parametrize("pixels", [STACK, COLOUR, STACK.astype(np.float32)], ids=["grey", "colour", "float"])
def test_pages_of_one_size_are_a_clip(tmp_path: Path, pixels: np.ndarray) -> None:
    path = save(tmp_path, pixels, photometric="rgb" if pixels.ndim == 4 else "minisblack")
    (scan,) = scans(path)
    assert (scan.kind, scan.spacing, scan.affine, scan.part) == ("clip", None, None, "")
    assert scan.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(scan.pixels, pixels)


def test_each_page_is_turned_and_inverted(tmp_path: Path) -> None:
    path = save(tmp_path, STACK, photometric="miniswhite", extratags=[(274, 3, 1, 6, False)])
    scan = read(path)
    np.testing.assert_array_equal(scan.pixels, np.stack([np.rot90(65535 - page, -1) for page in STACK]))


def test_smaller_copies_are_passed_over_and_other_pages_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(STACK[0], photometric="minisblack", subifds=1)
        file.write(STACK[0, ::2, ::2], photometric="minisblack", subfiletype=1)
        file.write(STACK[0, ::4, ::4], photometric="minisblack", subfiletype=1)
    scan = read(tmp_path / "a.tif")
    assert scan.kind == "image"
    np.testing.assert_array_equal(scan.pixels, STACK[0])
    for other in (STACK[0, ::2], (STACK[0] >> 4).astype(np.uint8), np.dstack([STACK[0]] * 3)):
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for page in (STACK[0], other):
                file.write(page, photometric="rgb" if page.ndim == 3 else "minisblack", metadata=None)
        with pytest.raises(DataError, match="2 pages that differ"):
            read(tmp_path / "a.tif")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"bigtiff": True, "byteorder": ">"}])
def test_a_clip_that_is_cut_is_never_a_shorter_one(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(tmp_path, STACK, photometric="minisblack", **options)
    content = path.read_bytes()
    for size in [*range(8, len(content), 97), *range(len(content) - 700, len(content), 7), len(content) - 1]:
        path.write_bytes(content[:size])
        try:
            scan = read(path)
        except DataError:
            continue
        np.testing.assert_array_equal(scan.pixels, STACK)  # what was cut off says nothing of the pixels


def test_pages_without_end_are_refused_before_any_is_read(tmp_path: Path) -> None:
    pages = b"".join(bytes(2) + (14 + 6 * page).to_bytes(4, "little") for page in range(10_001))  # without a tag
    (tmp_path / "a.tif").write_bytes(b"II*\0" + (8).to_bytes(4, "little") + pages + bytes(6))
    with pytest.raises(DataError, match="more than 10000 pages"):
        read(tmp_path / "a.tif")


def test_pages_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, STACK[:2], photometric="minisblack", metadata=None)
    content = bytearray(path.read_bytes())
    first = int.from_bytes(content[4:8], "little")
    with tifffile.TiffFile(path) as file:
        last = file.pages[1].offset
    end = last + 2 + 12 * int.from_bytes(content[last : last + 2], "little")
    assert content[end : end + 4] == bytes(4)
    content[end : end + 4] = first.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="leads nowhere"):
        read(path)


def test_many_pages_of_one_strip_cannot_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    # many pages that all point at the same strip: small file, large claim
    with tifffile.TiffWriter(path) as file:
        for _ in range(3):
            file.write(np.zeros((4000, 4000), np.uint8), photometric="minisblack", compression="zlib", metadata=None)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        offsets = [page.tags[code].valueoffset for page in file.pages for code in (256, 257)]
    for offset in offsets:
        content[offset : offset + 2] = (16000).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match="claims 3 x 16000 x 16000 pixels; allowed: at most"):
        read(path)
    for offset in offsets:
        content[offset : offset + 2] = (9000).to_bytes(2, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"claims 3 x \(9000, 9000\) pixels, more than"):
        read(path)


def test_a_header_that_stands_for_many_pages_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, STACK, photometric="minisblack", truncate=True)
    with pytest.raises(DataError, match="describes only the first of its pages"):
        read(path)


SIZES = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 250.0, "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 2.0}


def test_ome_depth_is_a_volume_with_its_spacing_in_mm(tmp_path: Path) -> None:
    path = save(tmp_path, STACK, ome=True, metadata={"axes": "ZYX", **SIZES})
    scan = read(path)
    assert (scan.kind, scan.affine) == ("volume", None)
    assert scan.spacing == pytest.approx((0.002, 0.00025, 0.0005))
    np.testing.assert_array_equal(scan.pixels, STACK)
    assert read(edited(path, 'PhysicalSizeZ="2.0"', 'PhysicalSizeZ="0.0"')).spacing is None


def test_ome_time_is_a_clip_and_one_plane_an_image(tmp_path: Path) -> None:
    scan = read(save(tmp_path, STACK, ome=True, metadata={"axes": "TYX", **SIZES}))
    assert (scan.kind, scan.spacing) == ("clip", pytest.approx((0.00025, 0.0005)))
    scan = read(save(tmp_path, STACK[0], ome=True, metadata={"axes": "YX", **SIZES}))
    assert (scan.kind, scan.spacing) == ("image", pytest.approx((0.00025, 0.0005)))
    turned = {"extratags": [(274, 3, 1, 6, True)]}
    scan = read(save(tmp_path, STACK[0], ome=True, metadata={"axes": "YX", **SIZES}, **turned))
    assert (scan.pixels.shape, scan.spacing) == ((30, 20), pytest.approx((0.0005, 0.00025)))
    scan = read(save(tmp_path, COLOUR[0], ome=True, metadata={"axes": "YXS"}, photometric="rgb"))
    assert (scan.kind, scan.pixels.shape, scan.spacing) == ("image", (20, 30, 3), None)
    clip = read(save(tmp_path, COLOUR, ome=True, metadata={"axes": "TYXS"}, photometric="rgb"))
    np.testing.assert_array_equal(clip.pixels, COLOUR)


@pytest.mark.parametrize(
    ("pixels", "axes", "words"),
    [
        (STACK, "CYX", "has 3 channels"),
        (np.stack([STACK, STACK]), "TZYX", "has 3 slices at 2 times"),
        (np.stack([STACK, STACK]), "ZCYX", "has 3 channels"),
        (COLOUR, "ZYXS", "is a volume in colour"),
    ],
)
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_channels_and_depth_in_time_are_refused(
    tmp_path: Path, kind: str, pixels: np.ndarray, axes: str, words: str
) -> None:
    photometric = "rgb" if "S" in axes else "minisblack"
    path = save(tmp_path, pixels, **{kind: True}, metadata={"axes": axes}, photometric=photometric)
    with pytest.raises(DataError, match=words):
        read(path)


def test_ome_pages_in_another_order(tmp_path: Path) -> None:
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        '<Pixels ID="P" DimensionOrder="XYZCT" Type="uint16" SizeX="30" SizeY="20" SizeZ="3" SizeC="1" SizeT="1">'
        '<TiffData IFD="0" FirstZ="2"/><TiffData IFD="1" FirstZ="0" PlaneCount="2"/></Pixels></Image></OME>'
    )
    path = save(tmp_path, STACK, photometric="minisblack", description=text, metadata=None)
    np.testing.assert_array_equal(read(path).pixels, STACK[[1, 2, 0]])
    for old, new, words in (
        ('IFD="1"', 'IFD="0"', "leaves planes out"),
        ('IFD="1"', 'IFD="2"', "pages that it does not have"),
        ('SizeZ="3"', 'SizeZ="4"', "4 planes in 3 pages"),
        ('SizeZ="3"', 'SizeZ="x"', "damaged"),
        ("</Pixels>", "</Pixelz>", "is no XML"),
        ('SizeZ="3" SizeC="1"', 'SizeC="3" SizeZ="1"', "3 channels"),
    ):
        save(tmp_path, STACK, photometric="minisblack", description=text, metadata=None)
        with pytest.raises(DataError, match=words):
            read(edited(path, old, new))
    several = text.replace("</Image>", '</Image><Image ID="Image:1"><Pixels ID="Q"/></Image>')
    with pytest.raises(DataError, match="of 2 images"):
        read(save(tmp_path, STACK, photometric="minisblack", description=several, metadata=None))
    names = "".join(f'<TiffData IFD="{k}"><UUID FileName="../{k}.tif">urn:uuid:{k}</UUID></TiffData>' for k in range(3))
    spread = text[: text.index("<TiffData")] + names + "</Pixels></Image></OME>"
    with pytest.raises(DataError, match="spread over 3 files"):
        read(save(tmp_path, STACK, photometric="minisblack", description=spread, metadata=None))


@pytest.mark.parametrize("word", ["<!DOCTYPE a [", "<!ENTITY b "])
def test_ome_text_with_entities_is_refused_before_it_is_parsed(tmp_path: Path, word: str) -> None:
    nested = "".join(f'<!ENTITY e{k} "{f"&e{k - 1};" * 10}">' for k in range(1, 12))
    text = f'<?xml version="1.0"?>{word}<!ENTITY e0 "aaaaaaaaaa">{nested}]><OME>&e11;</OME>'
    with pytest.raises(DataError, match="defines entities"):
        read(save(tmp_path, STACK[0], photometric="minisblack", description=text, metadata=None))


def test_imagej_stacks(tmp_path: Path) -> None:
    scale = {"spacing": 2.5, "unit": "um"}
    scan = read(save(tmp_path, STACK, imagej=True, metadata={"axes": "ZYX", **scale}, resolution=(4, 5)))
    assert (scan.kind, scan.spacing) == ("volume", pytest.approx((0.0025, 0.0002, 0.00025)))
    np.testing.assert_array_equal(scan.pixels, STACK)
    scan = read(save(tmp_path, STACK, imagej=True, metadata={"axes": "TYX", **scale}, resolution=(4, 5)))
    assert (scan.kind, scan.spacing) == ("clip", pytest.approx((0.0002, 0.00025)))
    for unit in ("pixel", "inch?", ""):
        path = save(tmp_path, STACK, imagej=True, metadata={"axes": "ZYX", "spacing": 2.5, "unit": unit})
        assert read(path).spacing is None
    path = save(tmp_path, STACK, imagej=True, metadata={"axes": "ZYX"})
    with pytest.raises(DataError, match="ImageJ TIFF of 7 images in 3 pages"):
        read(edited(path, "images=3", "images=7"))
