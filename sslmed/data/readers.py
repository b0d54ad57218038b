"""PNG, JPEG and TIFF files to scans. Whatever is wrong with a file, a reader raises a `DataError`.

A decoder's word is not enough: cv2 may hand out a half-decoded picture with no more than a warning, and tifffile
fills missing strips with zeros. So the file's own structure is walked first: every PNG chunk has a valid CRC up to
IEND, every JPEG segment leads to the end marker, every TIFF strip lies inside the file. JPEG and uncompressed TIFF
carry no checksum, so a changed byte inside their pixel data cannot be seen by anyone; a missing one can.
"""

import logging
import os
import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from sslmed.config import DataError, MissingDependencyError, MissingInputError
from sslmed.data.scan import Scan

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
PIXEL_LIMIT = 2**28  # 16384 x 16384: above every radiograph and photo, far below what fills a memory
BYTE_LIMIT = 2**31

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DEFLATE_RATIO = 1032  # the format's greatest possible compression (RFC 1951: 258 bytes from 2 bits)
_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> values a pixel (PNG specification, table 11.1)
# The next marker in entropy-coded data: 0xFF, perhaps repeated, but no stuffed zero, no restart (ITU T.81, B.1.1).
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

Pixels = np.ndarray[Any, np.dtype[Any]]


class _RefusedError(Exception):
    """Why a file is refused, in a few words; `read` adds the file."""


def find(source: Path) -> list[Path]:
    """The files under ``source`` whose suffix a reader knows, sorted; see `listing`."""
    return listing(source)[0]


def listing(source: Path) -> tuple[list[Path], list[Path]]:
    """The files under a folder, or the one file, as (readable by suffix, others), each sorted by path.

    Hidden files and folders (a leading dot) are in neither list. Links to folders are followed, each folder once.

    Raises:
        MissingInputError: ``source`` does not exist.
    """
    if source.is_file():
        return ([source], []) if source.suffix.lower() in SUFFIXES else ([], [source])
    if not source.is_dir():
        raise MissingInputError(f"{source} does not exist; give a folder of images or one image file")
    known: list[Path] = []
    others: list[Path] = []
    visited: set[str] = set()
    for folder, folders, files in os.walk(source, onerror=_refuse_folder, followlinks=True):
        place = os.path.realpath(folder)
        if place in visited:  # a link that leads back up would never end
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = Path(folder, name)
                (known if path.suffix.lower() in SUFFIXES else others).append(path)
    return sorted(known), sorted(others)


def _refuse_folder(error: OSError) -> None:
    raise DataError(
        f"the folder {error.filename} cannot be read: {error.strerror}; its images would be missing in silence"
    )


def read(path: Path) -> Scan:
    """Read one image file; its content, not its suffix, says which format it is.

    The EXIF or TIFF orientation is applied: every viewer shows the picture turned, so labels, masks and boxes are drawn
    on the turned picture, and a policy about left and right means nothing on an unturned one. Grey with a palette or
    with three equal channels stays RGB here: the modality decides. An alpha channel is dropped when it is opaque.

    Raises:
        DataError: the file cannot be read, is damaged, truncated, empty, too large or of a kind that is not supported.
        MissingDependencyError: the file may be good, but a library that it needs is not installed. That is no reason to
            go on without it in silence.
    """
    try:
        pixels = _decode(_content(path))
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{path}: {error}") from None
    except ModuleNotFoundError:  # of a library that everyone needs: the installation is broken, not the file
        raise
    except _RefusedError as refusal:
        raise DataError(f"{path}: {refusal}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (
        Exception
    ) as error:  # a decoder may raise anything on a hostile file, and one bad file must not end an ingest
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise DataError(f"{path}: damaged ({why})") from error
    return Scan(np.ascontiguousarray(pixels), None, path)


def _content(path: Path) -> bytes:
    size = path.stat().st_size
    if size > BYTE_LIMIT:
        raise _RefusedError(f"has {size} bytes; allowed: at most {BYTE_LIMIT}")
    return path.read_bytes()  # not cv2.imread, which opens no path outside ASCII on some systems


def _decode(content: bytes) -> Pixels:
    if not content:
        raise _RefusedError("is empty")
    if content.startswith(_PNG):
        return _png(content)
    if content.startswith(_JPEG):
        return _jpeg(content)
    if content.startswith(_TIFF):
        return _tiff(content)
    raise _RefusedError("is no PNG, JPEG or TIFF, whatever its name says")


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise _RefusedError(f"claims {height} x {width} pixels")
    if height * width > PIXEL_LIMIT:
        raise _RefusedError(f"claims {height} x {width} pixels; allowed: at most {PIXEL_LIMIT} altogether")


def _png(content: bytes) -> Pixels:
    chunks = _png_chunks(content)
    if len(chunks.get(b"IHDR", b"")) != 13:
        raise _RefusedError("is a damaged PNG: it has no header")
    width, height, bits, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    _check_size(height, width)
    if b"acTL" in chunks:
        raise _RefusedError("is an animated PNG; save the frame that is meant as one image")
    if height * width * bits * _PNG_SAMPLES.get(colour, 1) // 8 > _DEFLATE_RATIO * len(content):
        raise _RefusedError(f"claims {height} x {width} pixels, more than its {len(content)} bytes can hold")
    pixels = _cv2_decode(content)
    if colour in (4, 6) or b"tRNS" in chunks:
        _check_opaque(_cv2_decode(content, alpha=True))
    return pixels[..., 0] if colour == 4 else pixels  # cv2 makes three equal channels of grey with alpha


def _png_chunks(content: bytes) -> dict[bytes, bytes]:
    """The last chunk of each kind but IDAT, once every checksum up to IEND is right (PNG specification, 5.3)."""
    chunks: dict[bytes, bytes] = {}
    view = memoryview(content)
    position = len(_PNG)
    while position + 12 <= len(content):
        length = int.from_bytes(view[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise _RefusedError("is a damaged PNG: a checksum is wrong")
        kind = bytes(view[position + 4 : position + 8])
        if kind == b"IEND":
            return chunks
        chunks[kind] = b"" if kind == b"IDAT" else bytes(view[position + 8 : end])
        position = end + 4
    raise _RefusedError("is a truncated PNG")


def _jpeg(content: bytes) -> Pixels:
    height, width, components = _jpeg_frame(content)
    _check_size(height, width)
    if components not in (1, 3):
        raise _RefusedError(f"is a JPEG of {components} components; allowed: 1 (grey) or 3 (colour)")
    return _cv2_decode(content)


def _jpeg_frame(content: bytes) -> tuple[int, int, int]:
    """Height, width and components, once the segments lead to the end marker (ITU T.81, annex B)."""
    frame: tuple[int, int, int] | None = None
    scanned = False
    position = 2
    while match := _JPEG_MARKER.search(content, position):
        if not scanned and match.start() != position:
            raise _RefusedError("is a damaged JPEG: its segments do not join")
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
    raise _RefusedError("is a truncated or damaged JPEG: it has no end marker")


def _cv2_decode(content: bytes, alpha: bool = False) -> Pixels:
    import cv2

    # ANYCOLOR with ANYDEPTH keeps grey grey and 16 bit 16 bit, and unlike UNCHANGED applies the EXIF orientation.
    flags = cv2.IMREAD_UNCHANGED if alpha else cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None:
        raise _RefusedError("is damaged: its pixels cannot be decoded")
    return np.asarray(pixels[..., ::-1] if pixels.ndim == 3 and not alpha else pixels)


def _check_opaque(pixels: Pixels) -> None:
    alpha = pixels[..., 3] if pixels.ndim == 3 and pixels.shape[2] == 4 else None
    if alpha is not None and alpha.min() < np.iinfo(alpha.dtype).max:
        raise _RefusedError("is partly transparent; save it without its alpha channel, on the background that is meant")


def _tiff(content: bytes) -> Pixels:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what it would log ends in the refusal
    with tifffile.TiffFile(BytesIO(content)) as file:
        if not len(file.pages):
            raise _RefusedError("is a damaged TIFF: it has no page")
        if len(file.pages) > 1:
            raise _RefusedError(f"is a TIFF of {len(file.pages)} pages; save the page that is meant as one image")
        page = file.pages.first
        if not isinstance(page, tifffile.TiffPage):
            raise _RefusedError("is a damaged TIFF")
        _check_tiff(page, len(content))
        try:
            pixels = np.asarray(page.asarray())
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            compression = getattr(page.compression, "name", page.compression)
            raise MissingDependencyError(
                f"is a TIFF compressed with {compression}, which needs imagecodecs: python -m pip install imagecodecs, "
                "or save it uncompressed, or take it away"
            ) from None
        orientation = page.tags.valueof(274, 1)
    return _turn(_tiff_channels(pixels, page), int(orientation))


def _check_tiff(page: Any, size: int) -> None:
    """Refuse by the header, before anything is decoded or allocated."""
    _check_size(page.imagelength, page.imagewidth)
    if page.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) or page.bitspersample not in (8, 16):
        raise _RefusedError(f"is a TIFF of {page.bitspersample}-bit {page.dtype}; allowed: unsigned, 8 or 16 bit")
    if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4:
        raise _RefusedError(f"is a TIFF with axes {page.axes} and {page.samplesperpixel} samples; allowed: grey or RGB")
    if int(page.photometric) not in (0, 1, 2):
        kind = getattr(page.photometric, "name", page.photometric)
        raise _RefusedError(f"is a TIFF with {kind} colours; save it as grey or RGB")
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or min(page.databytecounts) < 1 or max(ends) > size:
        raise _RefusedError("is a truncated TIFF: some of its pixels lie beyond the end of the file")
    if page.nbytes > _DEFLATE_RATIO * size:
        raise _RefusedError(f"claims {page.shape} pixels, more than its {size} bytes can hold")


def _tiff_channels(pixels: Pixels, page: Any) -> Pixels:
    """(H, W) or (H, W, 3): channels last, an opaque alpha dropped, white-is-zero inverted."""
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    colours = 3 if int(page.photometric) == 2 else 1
    if pixels.ndim == 3:
        if pixels.shape[2] < colours:
            raise _RefusedError(f"is a damaged TIFF: colour with {pixels.shape[2]} samples")
        extra = pixels[..., colours:]
        if extra.size and extra.min() < np.iinfo(pixels.dtype).max:
            raise _RefusedError("has transparent pixels or a channel beyond its colours; save it as grey or RGB")
        pixels = pixels[..., :3] if colours == 3 else pixels[..., 0]
    elif colours == 3:
        raise _RefusedError("is a damaged TIFF: colour with one sample")
    # MINISWHITE is the TIFF twin of DICOM's MONOCHROME1 (TIFF 6.0, section 3).
    return np.iinfo(pixels.dtype).max - pixels if int(page.photometric) == 0 else pixels


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the orientation tag 1 to 8 (TIFF 6.0, tag 274), as cv2 does for EXIF."""
    if not 1 <= orientation <= 8:
        raise _RefusedError(f"has orientation {orientation}; allowed: 1 to 8")
    if orientation >= 5:
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
