"""Pixel values against numbers worked out by hand, and against another reader (SimpleITK)."""

import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless

from sslmed.config import DataError, MissingDependencyError
from sslmed.data import readers
from sslmed.data.readers import dicom_pixels, find, read

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)
Make = Callable[..., Path]


def oracle(path: Path) -> np.ndarray:
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    pixels = SimpleITK.GetArrayFromImage(reader.Execute())
    return pixels[0] if len(pixels) == 1 else pixels


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_padded.dcm",
        "JPEG2000.dcm",
        "JPGExtended.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "JPEGLSNearLossless_08.dcm",
        "JPEGLSNearLossless_16.dcm",
        "SC_rgb_rle.dcm",
        "SC_rgb_rle_2frame.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
        "SC_rgb_gdcm_KY.dcm",
        "SC_rgb_small_odd.dcm",
        "examples_rgb_color.dcm",
        "examples_jpeg2k.dcm",
        "dicomdirtests/98892001/CT5N/2062",
        "dicomdirtests/98892003/MR1/4919",
    ],
)
def test_values_are_those_of_another_reader(name: str) -> None:
    np.testing.assert_array_equal(read(SAMPLES / name).pixels, oracle(SAMPLES / name))


def test_padding_of_a_lossy_ct_is_air() -> None:
    ours, theirs = read(SAMPLES / "693_J2KI.dcm").pixels, oracle(SAMPLES / "693_J2KI.dcm")
    blank = theirs == -2000 - 1024
    assert 0 < blank.sum() < 1000
    np.testing.assert_array_equal(ours, np.where(blank, -1024, theirs))


def test_16_bit_colours_are_the_8_bit_ones_in_finer_steps() -> None:
    fine, coarse = (read(SAMPLES / name).pixels for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm"))
    np.testing.assert_array_equal(fine, coarse.astype(np.uint16) * 257)
    palette = read(SAMPLES / "examples_palette.dcm").pixels
    np.testing.assert_array_equal(palette >> 8, oracle(SAMPLES / "examples_palette.dcm"))


def test_lossy_colour_is_that_of_another_reader_but_for_rounding() -> None:
    for name in ("SC_rgb_dcmtk_+eb+cr.dcm", "SC_rgb_jpeg_dcmtk.dcm", "examples_ybr_color.dcm"):
        ours, theirs = read(SAMPLES / name).pixels.astype(int), oracle(SAMPLES / name).astype(int)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).mean() < 2


@pytest.mark.parametrize("compressed", ["RLE", "jp2klossless", "jpeg_ls_lossless", "bigendian", "expb", "implicit"])
def test_every_encoding_of_one_image_reads_alike(compressed: str) -> None:
    plain = read(SAMPLES / "MR_small.dcm")
    np.testing.assert_array_equal(read(SAMPLES / f"MR_small_{compressed}.dcm").pixels, plain.pixels)


def test_ct_is_hounsfield_units_and_knows_its_place() -> None:
    scan = read(SAMPLES / "CT_small.dcm")
    header = pydicom.dcmread(SAMPLES / "CT_small.dcm")
    stored = np.frombuffer(header.PixelData, "<i2", 128 * 128).reshape(128, 128)
    np.testing.assert_array_equal(scan.pixels, stored - 1024)
    assert (scan.kind, scan.unit, scan.modality, scan.pixels.dtype) == ("image", "HU", "CT", np.int16)
    assert scan.spacing == (0.661468, 0.661468)
    assert scan.affine is not None
    place = [float(value) for value in header.ImagePositionPatient]
    np.testing.assert_allclose(scan.affine @ [0, 0, 0, 1], [-place[0], -place[1], place[2], 1])
    np.testing.assert_allclose(
        scan.affine @ [0, 2, 3, 1], [-place[0] - 3 * 0.661468, -place[1] - 2 * 0.661468, place[2], 1]
    )
    assert scan.position == pytest.approx(place[2])
    assert scan.patient == header.PatientID
    assert f"'{header.PatientID}'" not in repr(scan)
    assert header.SeriesInstanceUID not in repr(scan)
    assert scan.identity == (
        *("PatientName", "PatientID", "OtherPatientIDsSequence", "StudyID", "InstitutionName", "StationName"),
    )
    assert (scan.orientation, scan.annotated) == ("LPS", None)
    assert scan.series == header.SeriesInstanceUID


def test_linear_window_at_its_edges(make: Make) -> None:
    # c = 2048, w = 1000: 0 up to 2047.5 - 499.5 = 1548, full above 2547 (PS3.3, C.11.2.1.2.1)
    shown = read(make(RAMP, BitsStored=12, WindowCenter=2048, WindowWidth=1000)).pixels.reshape(-1)
    assert shown.dtype == np.uint16
    assert shown[:1549].max() == 0
    assert shown[1549] == round(1 / 999 * 65535)
    assert shown[2000] == round((2000 - 1548) / 999 * 65535)
    assert shown[2546] == round(998 / 999 * 65535)
    assert shown[2547:].min() == 65535


def test_linear_exact_and_sigmoid(make: Make) -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 1000}
    exact = read(make(RAMP, BitsStored=12, VOILUTFunction="LINEAR_EXACT", **window)).pixels.reshape(-1)
    assert exact[[1548, 1549, 2048, 2548]].tolist() == [0, round(65.535), round(65535 / 2), 65535]
    sigmoid = read(make(RAMP, BitsStored=12, VOILUTFunction="SIGMOID", **window)).pixels.reshape(-1)
    assert sigmoid[2048] == round(65535 / 2)
    assert sigmoid[2298] == round(65535 / (1 + np.exp(-1.0)))
    assert sigmoid[0] == round(65535 / (1 + np.exp(4 * 2.048)))


def test_the_window_is_applied_to_rescaled_values_and_the_first_counts(make: Make) -> None:
    path = make(RAMP, BitsStored=12, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[101, 5], WindowWidth=[201, 9])
    shown = read(path).pixels.reshape(-1)  # 0 at 2x - 100 = 0.5, full at 200.5
    assert shown[50] == 0
    assert shown[51] == round(1.5 / 200 * 65535)
    assert shown[100] == round(99.5 / 200 * 65535)
    assert shown[151] == 65535


def test_monochrome1_is_inverted_last_on_the_output(make: Make) -> None:
    # Inverting the stored values first would move the window from the dark to the bright half.
    window = {"BitsStored": 12, "WindowCenter": 512, "WindowWidth": 1023}
    plain = read(make(RAMP, **window)).pixels
    inverted = read(make(RAMP, PhotometricInterpretation="MONOCHROME1", **window)).pixels
    np.testing.assert_array_equal(inverted, 65535 - plain)
    assert inverted[0, 0] == 65535
    assert inverted[-1, -1] == 0


def test_without_a_window_the_range_is_that_of_the_bits(make: Make) -> None:
    np.testing.assert_array_equal(read(make(RAMP, BitsStored=12)).pixels, RAMP)
    inverted = read(make(RAMP, BitsStored=12, PhotometricInterpretation="MONOCHROME1")).pixels
    np.testing.assert_array_equal(inverted, 4095 - RAMP)
    falling = read(make(RAMP, BitsStored=12, RescaleSlope=-1, RescaleIntercept=4095)).pixels
    np.testing.assert_array_equal(falling, 4095 - RAMP)
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    np.testing.assert_array_equal(read(make(signed, BitsStored=12)).pixels, RAMP)


def test_signed_12_bit_with_rubbish_in_the_unused_bits(make: Make) -> None:
    values = np.array([[-2048, -1, 0, 2047]], np.int16)
    rubbish = (values.view(np.uint16) & 0x0FFF | 0x5000).view(np.int16)
    scan = read(make(rubbish, BitsStored=12, Modality="CT", RescaleSlope=1, RescaleIntercept=0))
    np.testing.assert_array_equal(scan.pixels, values)


def test_a_fractional_slope_stays_a_fraction(make: Make) -> None:
    scan = read(make(RAMP, Modality="CT", RescaleSlope=0.5, RescaleIntercept=-10.25))
    assert scan.pixels.dtype == np.float32
    np.testing.assert_array_equal(scan.pixels, RAMP * np.float32(0.5) - np.float32(10.25))


def test_padding_is_masked_before_rescaling(make: Make) -> None:
    pixels = np.array([[-2000, -1990, 0, 1000]], np.int16)
    scan = read(
        make(
            pixels,
            Modality="CT",
            RescaleSlope=2,
            RescaleIntercept=-7,
            PixelPaddingValue=-2000,
            PixelPaddingRangeLimit=-1985,
        )
    )
    assert scan.pixels.tolist() == [[-1024, -1024, -7, 1993]]
    shown = read(make(RAMP, BitsStored=12, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)).pixels
    assert shown[0, :3].tolist() == [0, 4094, 4093]  # black, not the white that inversion would make of it


def test_a_voi_table_comes_before_a_window(make: Make, sequence_item: Callable[..., Any]) -> None:
    table = sequence_item(LUTDescriptor=[256, 100, 12], LUTData=[4095 - 16 * value for value in range(256)])
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = make(RAMP, BitsStored=12, VOILUTSequence=[table], WindowCenter=5, WindowWidth=9)
    shown = read(path).pixels.reshape(-1)
    assert shown[[0, 100, 101, 355, 356, 4095]].tolist() == [4095, 4095, 4079, 15, 15, 15]
    # an 8-bit table with inputs that lie more than 8 bits beyond it
    small = sequence_item(LUTDescriptor=[4, 0, 8], LUTData=[7, 8, 9, 200])
    small["LUTDescriptor"].VR = small["LUTData"].VR = "US"
    shown = read(make(RAMP, BitsStored=12, VOILUTSequence=[small])).pixels.reshape(-1)
    assert (shown.dtype, shown[:5].tolist(), shown[256], shown[-1]) == (np.uint8, [7, 8, 9, 200, 200], 200, 200)


def test_a_modality_table(make: Make, sequence_item: Callable[..., Any]) -> None:
    table = sequence_item(LUTDescriptor=[4096, 0, 16], LUTData=[15 * value for value in range(4096)])
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    table.ModalityLUTType = "OD"
    np.testing.assert_array_equal(read(make(RAMP, BitsStored=12, ModalityLUTSequence=[table])).pixels, RAMP * 15)


def test_palette_colours(make: Make) -> None:
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = {}
    for number, colour in enumerate(("Red", "Green", "Blue")):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 2, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = struct.pack("<4H", *(1000 * number + k for k in range(4)))
    pixels = read(make(indices, PhotometricInterpretation="PALETTE COLOR", Modality="US", **palette)).pixels
    assert pixels[0, 0].tolist() == [0, 1000, 2000]  # below the first: the first
    assert pixels[0, 3].tolist() == [1, 1001, 2001]
    assert pixels[3, 3].tolist() == [3, 1003, 2003]  # beyond the last: the last


def test_palette_colours_in_segments(make: Make) -> None:
    def colours(segments: list[int]) -> Any:
        palette: dict[str, Any] = {}
        for colour in ("Red", "Green", "Blue"):
            palette[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
            data = struct.pack(f"<{len(segments)}H", *segments)
            palette[f"Segmented{colour}PaletteColorLookupTableData"] = data
        indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
        return read(make(indices, PhotometricInterpretation="PALETTE COLOR", Modality="US", **palette)).pixels

    assert colours([0, 2, 5, 10, 1, 2, 30])[..., 0].tolist() == [[5, 10], [20, 30]]
    for bomb in ([0, 1, 0, *[1, 65535, 0] * 1000], [0, 1, 0, 2, 9, 0, 0]):  # in 6 bytes 65535 entries, or others again
        with pytest.raises(DataError, match="indirect segments, or of more than 65536 entries"):
            colours(bomb)


def test_colour_spaces_become_rgb_once(make: Make) -> None:
    red = np.full((2, 2, 3), [76, 85, 255], np.uint8)  # YBR of pure red (PS3.3, C.7.6.3.1.2)
    pixels = read(make(red, PhotometricInterpretation="YBR_FULL")).pixels
    np.testing.assert_allclose(pixels, np.full((2, 2, 3), [255, 0, 0]), atol=1)


def test_a_cine_is_a_clip(make: Make) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 8), dtype=np.uint8)
    scan = read(make(frames, Modality="US"))
    assert (scan.kind, scan.modality) == ("clip", "US")
    np.testing.assert_array_equal(scan.pixels, frames)
    colour = read(SAMPLES / "examples_ybr_color.dcm")
    assert (colour.kind, colour.pixels.shape) == ("clip", (30, 240, 320, 3))


def enhanced(item: Callable[..., Any], along: list[float]) -> dict[str, Any]:
    frames = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, place])],
            PixelValueTransformationSequence=[item(RescaleSlope=number + 1, RescaleIntercept=-3, RescaleType="US")],
        )
        for number, place in enumerate(along)
    ]
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[item(PixelSpacing=[2, 3])],
    )
    return {
        "Modality": "MR",
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": frames,
    }


def test_enhanced_frames_are_rescaled_one_by_one_and_sorted(make: Make, sequence_item: Callable[..., Any]) -> None:
    frames = np.stack([np.full((4, 5), 10 * number, np.int16) for number in range(1, 4)])
    scan = read(make(frames, **enhanced(sequence_item, [8.0, 4.0, 12.0])))
    assert (scan.kind, scan.spacing) == ("volume", (4.0, 2.0, 3.0))
    assert scan.pixels[:, 0, 0].tolist() == [20 * 2 - 3, 10 * 1 - 3, 30 * 3 - 3]
    assert scan.affine is not None
    np.testing.assert_allclose(scan.affine @ [2, 1, 1, 1], [-3, -2, 12, 1])
    with pytest.raises(DataError, match="at a position of another"):
        read(make(frames, **enhanced(sequence_item, [8.0, 8.0, 12.0])))
    with pytest.raises(DataError, match="does not say where each lies"):
        read(make(frames, Modality="MR"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"Modality": "CT"}, "without rescale"),
        ({"Modality": "SEG"}, "is a segmentation"),
        ({"Modality": "RTDOSE"}, "is a dose grid"),
        ({"Modality": "MR", "PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME1"),
        ({"HighBit": 11, "BitsStored": 8}, "lowest bits"),
        ({"PhotometricInterpretation": "HSV"}, "HSV photometric"),
        ({"SamplesPerPixel": 3}, "3 samples"),
        ({"Rows": 65000, "Columns": 65000}, "allowed: at most"),
        ({"Rows": 65}, "is truncated: 8320 bytes"),
        ({"NumberOfFrames": 2**30}, "allowed: at most"),
        ({"Rows": 0}, "claims 0 x 64"),
        ({"PixelData": None}, "without an image"),
        ({"WindowCenter": 5, "WindowWidth": 0}, "LINEAR window"),
        ({"WindowCenter": 50000, "WindowWidth": 2}, "every pixel looks the same"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescale slope of 0"),
        ({"Modality": "MR", "ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "read"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_by_name(make: Make, given: dict[str, Any], words: str) -> None:
    path = make(RAMP, **given)
    if words == "read":  # an orientation alone places nothing
        assert read(path).affine is None
        return
    with pytest.raises(DataError, match=words):
        read(path)


def test_compressed_frames_must_be_whole_and_of_the_claimed_size(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(SAMPLES / "MR_small_jp2klossless.dcm")
    dataset.Rows = 32
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError, match="the header says 32 x 64"):
        read(tmp_path / "a.dcm")
    content = (SAMPLES / "MR_small_jpeg_ls_lossless.dcm").read_bytes()
    end = content.rindex(b"\xff\xd9")
    (tmp_path / "b.dcm").write_bytes(content[:end] + b"\0\0" + content[end + 2 :])
    with pytest.raises(DataError, match="no end marker"):
        read(tmp_path / "b.dcm")


def test_a_deflate_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslmed.data.readers.dicom._INFLATED_LIMIT", 2**20)
    content = (SAMPLES / "image_dfl.dcm").read_bytes()
    assert read(SAMPLES / "image_dfl.dcm").pixels.shape == (512, 512)
    start = 144 + int.from_bytes(content[140:144], "little")
    packer = zlib.compressobj(9, wbits=-15)
    (tmp_path / "a.dcm").write_bytes(content[:start] + packer.compress(bytes(2**22)) + packer.flush())
    with pytest.raises(DataError, match="inflates to more"):
        read(tmp_path / "a.dcm")


def test_a_missing_decoder_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {JPEG2000Lossless: ("pylibjpeg", "no_such_module", "pylibjpeg pylibjpeg-openjpeg")}
    monkeypatch.setattr(dicom_pixels, "DECODERS", dicom_pixels.DECODERS | absent)
    with pytest.raises(MissingDependencyError, match="pip install pylibjpeg pylibjpeg-openjpeg"):
        read(SAMPLES / "MR_small_jp2klossless.dcm")


def test_no_warning_leaks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("MR_small_padded.dcm", "JPEG2000.dcm", "examples_jpeg2k.dcm"):
            read(SAMPLES / name)


def test_big_endian_12_bit_window(tmp_path: Path, make: Make) -> None:
    dataset = pydicom.dcmread(make(RAMP, BitsStored=12, WindowCenter=2048, WindowWidth=1000))
    plain = read(tmp_path / "a.dcm").pixels
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dataset.PixelData = RAMP.astype(">u2").tobytes()
    pydicom.dcmwrite(tmp_path / "b.dcm", dataset, little_endian=False, implicit_vr=False, force_encoding=True)
    np.testing.assert_array_equal(read(tmp_path / "b.dcm").pixels, plain)


def test_files_of_other_names_are_found_by_their_magic(tmp_path: Path, make: Make) -> None:
    names = ["1.2.840.10008.5", "1.2.840.5_anon", "IM000001", "MR.0001.IMA", "a.dicom"]
    for name in names:
        make(RAMP, name)
    (tmp_path / "README").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image" * 99)
    (tmp_path / "empty").touch()
    assert [path.name for path in find(tmp_path)] == names


def test_importing_the_readers_imports_no_format_library() -> None:
    code = "import sys, sslmed.data.readers; print({'pydicom', 'nibabel', 'cv2', 'tifffile', 'gdcm'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert {".dcm", ".png"} <= readers.SUFFIXES
