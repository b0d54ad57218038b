"""PNG and JPEG files to pixels.

A decoder's word is not enough: cv2 may hand out a half-decoded picture with no more than a warning. So the file's own
structure is walked first: every PNG chunk has a valid CRC up to IEND, every JPEG segment leads to the end marker. JPEG
carries no checksum, so a changed byte inside its pixel data cannot be seen by anyone; a missing one can.
"""

import re
import struct
import zlib

import numpy as np

from sslmed.data.readers.refusal import DEFLATE_RATIO, Pixels, RefusedError, check_size

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"

_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> values a pixel (PNG specification, table 11.1)
# The next marker in entropy-coded data: 0xFF, perhaps repeated, but no stuffed zero, no restart (ITU T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_JPEG_RATIO = 1024  # pixels a byte: a block of 64 takes at least one bit (ITU T.81, F.1.2); doubled
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def png(content: bytes) -> Pixels:
    """(H, W) or (H, W, 3) in RGB order; an opaque alpha channel is dropped, a palette becomes colours."""
    chunks = png_chunks(content)
    if len(chunks.get(b"IHDR", b"")) != 13:
        raise RefusedError("is a damaged PNG: it has no header")
    width, height, bits, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    check_size(height, width)
    if b"acTL" in chunks:
        raise RefusedError("is an animated PNG; save the frame that is meant as one image")
    if height * width * bits * _PNG_SAMPLES.get(colour, 1) // 8 > DEFLATE_RATIO * len(content):
        raise RefusedError(f"claims {height} x {width} pixels, more than its {len(content)} bytes can hold")
    pixels = _cv2_decode(content)
    if colour in (4, 6) or b"tRNS" in chunks:
        _check_opaque(_cv2_decode(content, alpha=True))
    return pixels[..., 0] if colour == 4 else pixels  # cv2 makes three equal channels of grey with alpha


def png_chunks(content: bytes) -> dict[bytes, bytes]:
    """The last chunk of each kind but IDAT, once every checksum up to IEND is right (PNG specification, 5.3)."""
    chunks: dict[bytes, bytes] = {}
    view = memoryview(content)
    position = len(PNG_MAGIC)
    while position + 12 <= len(content):
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise RefusedError("is a damaged PNG: a checksum is wrong")
        kind = bytes(view[position + 4 : position + 8])
        if kind == b"IEND":
            return chunks
        chunks[kind] = b"" if kind == b"IDAT" else bytes(view[position + 8 : end])
        position = end + 4
    raise RefusedError("is a truncated PNG")


def jpeg(content: bytes) -> Pixels:
    """(H, W) or (H, W, 3) in RGB order, turned as its EXIF orientation says."""
    height, width, components = _jpeg_frame(content)
    check_size(height, width)
    if components not in (1, 3):
        raise RefusedError(f"is a JPEG of {components} components; allowed: 1 (grey) or 3 (colour)")
    if height * width > _JPEG_RATIO * len(content):
        raise RefusedError(f"claims {height} x {width} pixels, more than its {len(content)} bytes can hold")
    return _cv2_decode(content)


def _jpeg_frame(content: bytes) -> tuple[int, int, int]:
    """Height, width and components, once the segments lead to the end marker (ITU T.81, annex B)."""
    frame: tuple[int, int, int] | None = None
    scanned = False
    position = 2
    while match := _JPEG_MARKER.search(content, position):
        if not scanned and match.start() != position:
            raise RefusedError("is a damaged JPEG: its segments do not join")
        marker, position = match[1][0], match.end()
        if marker == 0xD9 and frame and scanned:
            return frame
        if marker == 0xD8 or marker == 0xD9 or position + 2 > len(content):
            break
        length = int.from_bytes(content[position : position + 2], "big")
        if marker in _JPEG_FRAMES:
            if length < 8 or position + 8 > len(content):
                break
            frame = struct.unpack(">HHB", content[position + 3 : position + 8])
        scanned = marker == 0xDA or (scanned and marker not in _JPEG_FRAMES)
        position += length
    raise RefusedError("is a truncated or damaged JPEG: it has no end marker")


def _cv2_decode(content: bytes, alpha: bool = False) -> Pixels:
    import cv2

    # ANYCOLOR with ANYDEPTH keeps grey grey and 16 bit 16 bit, and unlike UNCHANGED applies the EXIF orientation.
    flags = cv2.IMREAD_UNCHANGED if alpha else cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None:
        raise RefusedError("is damaged: its pixels cannot be decoded")
    return np.asarray(pixels[..., ::-1] if pixels.ndim == 3 and not alpha else pixels)


def _check_opaque(pixels: Pixels) -> None:
    alpha = pixels[..., 3] if pixels.ndim == 3 and pixels.shape[2] == 4 else None
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        raise RefusedError("is partly transparent; save it without its alpha channel, on the background that is meant")
