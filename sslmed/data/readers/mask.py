"""Mask files to the values that they hold: a mask's numbers are classes, never grey or colour.

The picture readers make colours of a palette and stretch 1, 2 and 4 bits to 8, as a viewer has to. Here a palette's
indices count, and grey of few bits stays as it is.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from sslmed.data import readers
from sslmed.data.readers import dicom, raster
from sslmed.data.readers.dicom_values import QUANTITIES
from sslmed.data.readers.refusal import Pixels, RefusedError, one_error, whole
from sslmed.data.scan import Scan

VALUES = 256
_IHDR = slice(len(raster.PNG_MAGIC) + 8, len(raster.PNG_MAGIC) + 21)  # what stands in the first chunk
_GREY, _PALETTE = 0, 3  # colour types (PNG specification, table 11.1)


def read_masks(path: Path) -> Iterator[Scan]:
    """The masks of one file: (H, W), or (D, H, W) of a volume, with the values that it holds, 0 to 255. uint8.

    Raises:
        DataError: no mask: damaged, in colours, JPEG (which changes values), or values that are no such numbers.
    """
    with one_error(path):
        with path.open("rb") as file:
            head = file.read(_IHDR.stop)
        if head.startswith(raster.JPEG_MAGIC):
            raise RefusedError("is a JPEG, which changes the values that it holds; save the mask as PNG")
        if dicom.is_dicom_file(path) and _windowed(path):
            raise RefusedError("is DICOM with a window or inverted, which changes its values; save the mask as PNG")
        if head.startswith(raster.PNG_MAGIC):
            found = iter([Scan(_png(whole(path), head[_IHDR]), None, path)])
        else:
            found = readers.scans(path)
        for scan in found:
            yield replace(scan, pixels=_numbers(_single(scan.pixels) if scan.kind == "image" else scan.pixels))


def _windowed(path: Path) -> bool:
    names = ("WindowCenter", "VOILUTSequence", "ModalityLUTSequence")
    with dicom.quiet():
        header = dicom.header(path, (*names, "PhotometricInterpretation"))
        inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
        shown = inverted or any(header.get(name) not in (None, "") for name in names)
        return header.get("Modality") not in QUANTITIES and shown


def _png(content: bytes, header: bytes) -> Pixels:
    bits, colour = header[8:10] if len(header) == 13 else (8, 0)
    if colour == _PALETTE or (colour == _GREY and bits < 8):
        content = _as_indices(content, header)
    return raster.png(content)


def _as_indices(content: bytes, header: bytes) -> bytes:
    """The same PNG with the palette (0, 0, 0), (1, 1, 1), ...: a decoder's grey is then the index, or the raw grey.

    What else stands in it (gamma, colour profiles, transparent indices) would only change values, and goes.
    """
    raster.png_chunks(content)  # every length and checksum is right
    palette = bytes(value for value in range(2 ** header[8]) for _ in range(3))
    parts = [
        raster.PNG_MAGIC,
        _chunk(b"IHDR", header[:9] + bytes([_PALETTE]) + header[10:]),
        _chunk(b"PLTE", palette),
    ]
    position = _IHDR.stop + 4
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        kind, end = content[position + 4 : position + 8], position + 12 + length
        if kind in (b"IDAT", b"eXIf", b"acTL", b"IEND"):
            parts.append(content[position:end])
        if kind == b"IEND":
            break
        position = end
    return b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _single(pixels: Pixels) -> Pixels:
    if pixels.ndim == 2:
        return pixels
    if not (pixels == pixels[..., :1]).all():
        raise RefusedError("is in colours, which are no class numbers; save it as grey, or with a palette")
    return pixels[..., 0]


def _numbers(pixels: Pixels) -> Pixels:
    if pixels.ndim > 3:
        raise RefusedError("is in colours, which are no class numbers")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high >= VALUES:
        bad = low if low < 0 else high
        raise RefusedError(f"holds the value {bad:g}; class numbers are 0 to 254, and 255 what is to be ignored")
    if pixels.dtype.kind == "f" and not (pixels == np.rint(pixels)).all():
        odd = pixels[pixels != np.rint(pixels)].flat[0]
        raise RefusedError(f"holds the value {odd:g}; class numbers are whole")
    return np.ascontiguousarray(pixels, np.uint8)
