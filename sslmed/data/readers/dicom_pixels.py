"""The stored values of a DICOM file, decoded by a decoder that is chosen here and not by what happens to be installed.

Sizes are checked before anything is allocated: what the header claims against the limits and, uncompressed, against the
bytes that are there; what each compressed frame claims against the header.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from sslmed.config import MissingDependencyError
from sslmed.data.readers.refusal import BYTE_LIMIT, Pixels, RefusedError, check_size

if TYPE_CHECKING:
    from pydicom import Dataset

NATIVE = {
    "1.2.840.10008.1.2": "implicit little endian",
    "1.2.840.10008.1.2.1": "explicit little endian",
    "1.2.840.10008.1.2.1.99": "deflated",
    "1.2.840.10008.1.2.2": "big endian",
}
# Transfer syntax -> pydicom's name of the plugin, the module it needs, the package that has it.
_PILLOW, _GDCM = ("pillow", "PIL", "pillow"), ("gdcm", "gdcm", "python-gdcm")
_CHARLS, _OPENJPEG = ("pyjpegls", "jpeg_ls", "pyjpegls"), ("pylibjpeg", "openjpeg", "pylibjpeg pylibjpeg-openjpeg")
DECODERS = {
    "1.2.840.10008.1.2.4.50": _PILLOW,  # JPEG baseline, 8 bit
    "1.2.840.10008.1.2.4.51": _PILLOW,  # JPEG extended, 8 bit; 12 bit: see _decode_12_bit
    "1.2.840.10008.1.2.4.57": _GDCM,  # JPEG lossless
    "1.2.840.10008.1.2.4.70": _GDCM,  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": _CHARLS,  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": _CHARLS,  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90": _OPENJPEG,  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": _OPENJPEG,  # JPEG 2000
    "1.2.840.10008.1.2.4.201": _OPENJPEG,  # high-throughput JPEG 2000 lossless
    "1.2.840.10008.1.2.4.202": _OPENJPEG,
    "1.2.840.10008.1.2.4.203": _OPENJPEG,
    # RLE: pydicom's own. pylibjpeg-rle is faster, but panics on damaged files, which no `except Exception` stops.
    "1.2.840.10008.1.2.5": ("pydicom", "pydicom", "pydicom"),
}
_RLE = "1.2.840.10008.1.2.5"
_RLE_RATIO = 64  # 128 equal bytes from 2 (PS3.5, G.3.1)
_COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
_GREYS = {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"}


def check(header: "Dataset") -> int:
    """The number of frames, once the header claims an image that may be decoded.

    Raises:
        RefusedError: it claims something else, or too much.
    """
    frames = int(header.get("NumberOfFrames") or 1)
    rows, columns = (int(header.get(name) or 0) for name in ("Rows", "Columns"))
    samples, allocated = (int(header.get(name) or 0) for name in ("SamplesPerPixel", "BitsAllocated"))
    check_size(frames, rows, columns) if frames != 1 else check_size(rows, columns)
    photometric = header.get("PhotometricInterpretation")
    if (photometric in _COLOURS and samples != 3) or (photometric in _GREYS and samples != 1):
        raise RefusedError(f"is damaged: {photometric} with {samples} samples a pixel")
    if photometric not in _COLOURS | _GREYS:
        raise RefusedError(f"has {photometric or 'no'} photometric interpretation; allowed: {_allowed()}")
    if allocated not in (8, 16):
        raise RefusedError(f"has {allocated} bits a value; allowed: 8 or 16")
    stored = int(header.get("BitsStored") or allocated)
    high = int(header.get("HighBit", stored - 1))
    if not 1 <= stored <= allocated or high != stored - 1:
        raise RefusedError(f"has {stored} bits stored up to bit {high} of {allocated}; allowed: the lowest bits")
    if frames * rows * columns * samples * (allocated // 8) > BYTE_LIMIT:
        raise RefusedError(f"claims {frames} x {rows} x {columns} pixels; allowed: at most {BYTE_LIMIT} bytes")
    return frames


def _allowed() -> str:
    return ", ".join(sorted(_COLOURS | _GREYS))


def stored_values(dataset: "Dataset", frames: int) -> Pixels:
    """(frames, H, W) or (frames, H, W, 3) in RGB order, as stored: no rescaling, no window, no inversion.

    Unused bits above BitsStored are cleared or filled with the sign.

    Raises:
        RefusedError: sizes that do not fit, a compression that is not read, pixels that cannot be decoded.
        MissingDependencyError: the decoder's package is not installed.
    """
    from pydicom.pixels.utils import pixel_array

    syntax = str(dataset.file_meta.TransferSyntaxUID)
    content: bytes = dataset.PixelData
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    claim = frames * rows * columns * int(dataset.SamplesPerPixel) * int(dataset.BitsAllocated) // 8
    if syntax in NATIVE:
        if dataset.PhotometricInterpretation == "YBR_FULL_422":
            claim = claim * 2 // 3  # two pixels share their colours (PS3.3, C.7.6.3.1.2)
        if len(content) < claim:
            raise RefusedError(f"is truncated: {claim} bytes of pixels are claimed, {len(content)} are there")
        plugin = ""
    else:
        plugin = _plugin(dataset, syntax)
        _check_frames(dataset, syntax, frames, claim)
    if _is_12_bit(dataset, syntax):
        return _decode_12_bit(dataset, frames)
    pixels = pixel_array(dataset, decoding_plugin=plugin)
    wanted = (frames, rows, columns, 3)[: 4 if int(dataset.SamplesPerPixel) == 3 else 3]
    if pixels.size != np.prod(wanted) or pixels.dtype.kind not in "ui" or pixels.dtype.itemsize > 2:
        raise RefusedError(f"is damaged: its pixels decode to {pixels.shape} {pixels.dtype}")
    return pixels.reshape(wanted)


def _plugin(dataset: "Dataset", syntax: str) -> str:
    if syntax not in DECODERS:
        name = dataset.file_meta.TransferSyntaxUID.name
        raise RefusedError(f"is compressed with {name}, which is not read here; save it uncompressed (explicit VR)")
    plugin, module, package = DECODERS[syntax] if not _is_12_bit(dataset, syntax) else _GDCM
    if find_spec(module) is None or (plugin == "pylibjpeg" and find_spec(plugin) is None):
        name = dataset.file_meta.TransferSyntaxUID.name
        raise MissingDependencyError(f"is compressed with {name}, which needs: python -m pip install {package}")
    return plugin


def _is_12_bit(dataset: "Dataset", syntax: str) -> bool:
    return syntax == "1.2.840.10008.1.2.4.51" and int(dataset.BitsStored) > 8


def _decode_12_bit(dataset: "Dataset", frames: int) -> Pixels:
    """JPEG extended of 12 bits: GDCM decodes it right once it is told the depth, which pydicom's plugin does not."""
    import gdcm
    from pydicom.encaps import generate_frames

    if dataset.BitsStored != 12 or dataset.BitsAllocated != 16 or dataset.SamplesPerPixel != 1:
        raise RefusedError(f"is a JPEG (extended) of {dataset.BitsStored} bits; allowed: 8, or 12 in grey")
    pixels = np.empty((frames, int(dataset.Rows), int(dataset.Columns)), np.uint16)
    for number, frame in enumerate(generate_frames(dataset.PixelData, number_of_frames=frames)):
        fragment, fragments = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
        fragment.SetByteStringValue(frame)
        fragments.AddFragment(fragment)
        element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
        element.SetValue(fragments.__ref__())
        image = gdcm.Image()
        image.SetNumberOfDimensions(2)
        image.SetDimensions((int(dataset.Columns), int(dataset.Rows), 1))
        image.SetDataElement(element)
        grey = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
        image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
        syntax = gdcm.TransferSyntax.GetTSType(str(dataset.file_meta.TransferSyntaxUID))
        image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        image.SetPixelFormat(gdcm.PixelFormat(1, 16, 12, 11, 0))
        decoded = (image.GetBuffer() or "").encode("utf-8", "surrogateescape")  # SWIG hands bytes over as text
        if number >= frames or len(decoded) != pixels[0].nbytes:
            raise RefusedError("is damaged: its pixels cannot be decoded")
        pixels[number] = np.frombuffer(decoded, "<u2").reshape(pixels.shape[1:])
    return pixels if dataset.PixelRepresentation == 0 else ((pixels << 4).view(np.int16) >> 4)


def _check_frames(dataset: "Dataset", syntax: str, frames: int, claim: int) -> None:
    """Each compressed frame is whole and of the size that the header says, before a decoder believes it."""
    from pydicom.encaps import generate_frames

    if syntax == _RLE:
        if claim > _RLE_RATIO * len(dataset.PixelData):
            raise RefusedError(f"claims {claim} bytes of pixels, more than its {len(dataset.PixelData)} can hold")
        return
    offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
    extended = offsets if all(offsets) else None
    found = 0
    for frame in generate_frames(dataset.PixelData, number_of_frames=frames, extended_offsets=extended):
        found += 1
        size = _frame_size(frame)
        if size != (int(dataset.Rows), int(dataset.Columns)):
            raise RefusedError(
                f"is damaged: frame {found} holds {size or 'no'} pixels, "
                f"the header says {dataset.Rows} x {dataset.Columns}"
            )
        if b"\xff\xd9" not in frame[-64:]:
            raise RefusedError(f"is truncated: frame {found} has no end marker")
    if found < frames:
        raise RefusedError(f"is truncated: it has {found} of {frames} frames")


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) that a JPEG, JPEG-LS or JPEG 2000 codestream claims; None where it has none."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # SOC and SIZ (ITU T.800, A.5.1), perhaps in a JP2 box
    if start >= 0 and len(frame) >= start + 24:
        right, bottom, left, top = np.frombuffer(frame, ">u4", 4, start + 8).tolist()
        return bottom - top, right - left
    position = 2
    while frame[:2] == b"\xff\xd8" and position + 9 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0xF7 or (
            0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        ):  # SOF (T.81 B.2.2, T.87 C.2.2)
            return int.from_bytes(frame[position + 5 : position + 7]), int.from_bytes(
                frame[position + 7 : position + 9]
            )
        position += 2 + int.from_bytes(frame[position + 2 : position + 4])
    return None
