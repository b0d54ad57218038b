"""TIFF files to pixels.

tifffile fills missing strips with zeros, so every strip is first seen to lie inside the file. Uncompressed TIFF carries
no checksum: a changed byte in its pixel data cannot be seen by anyone.
"""

import logging
from io import BytesIO
from typing import Any

import numpy as np

from sslmed.config import MissingDependencyError
from sslmed.data.readers.refusal import DEFLATE_RATIO, Pixels, RefusedError, check_size

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def tiff(content: bytes) -> Pixels:
    """(H, W) or (H, W, 3) in RGB order, turned as its orientation tag says, white-is-zero inverted."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what it would log ends in the refusal
    with tifffile.TiffFile(BytesIO(content)) as file:
        if not len(file.pages):
            raise RefusedError("is a damaged TIFF: it has no page")
        if len(file.pages) > 1:
            raise RefusedError(f"is a TIFF of {len(file.pages)} pages; save the page that is meant as one image")
        page = file.pages.first
        if not isinstance(page, tifffile.TiffPage):
            raise RefusedError("is a damaged TIFF")
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
    check_size(page.imagelength, page.imagewidth)
    if page.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)) or page.bitspersample not in (8, 16):
        raise RefusedError(f"is a TIFF of {page.bitspersample}-bit {page.dtype}; allowed: unsigned, 8 or 16 bit")
    if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4:
        raise RefusedError(f"is a TIFF with axes {page.axes} and {page.samplesperpixel} samples; allowed: grey or RGB")
    if int(page.photometric) not in (0, 1, 2):
        kind = getattr(page.photometric, "name", page.photometric)
        raise RefusedError(f"is a TIFF with {kind} colours; save it as grey or RGB")
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or min(page.databytecounts) < 1 or max(ends) > size:
        raise RefusedError("is a truncated TIFF: some of its pixels lie beyond the end of the file")
    if page.nbytes > DEFLATE_RATIO * size:
        raise RefusedError(f"claims {page.shape} pixels, more than its {size} bytes can hold")


def _tiff_channels(pixels: Pixels, page: Any) -> Pixels:
    """(H, W) or (H, W, 3): channels last, an opaque alpha dropped, white-is-zero inverted."""
    if page.axes == "SYX":
        pixels = np.moveaxis(pixels, 0, -1)
    colours = 3 if int(page.photometric) == 2 else 1
    if pixels.ndim == 3:
        if pixels.shape[2] < colours:
            raise RefusedError(f"is a damaged TIFF: colour with {pixels.shape[2]} samples")
        extra = pixels[..., colours:]
        if extra.size and extra.min() < np.iinfo(pixels.dtype).max:
            raise RefusedError("has transparent pixels or a channel beyond its colours; save it as grey or RGB")
        pixels = pixels[..., :3] if colours == 3 else pixels[..., 0]
    elif colours == 3:
        raise RefusedError("is a damaged TIFF: colour with one sample")
    # MINISWHITE is the TIFF twin of DICOM's MONOCHROME1 (TIFF 6.0, section 3).
    return np.iinfo(pixels.dtype).max - pixels if int(page.photometric) == 0 else pixels


def _turn(pixels: Pixels, orientation: int) -> Pixels:
    """Undo the orientation tag 1 to 8 (TIFF 6.0, tag 274), as cv2 does for EXIF."""
    if not 1 <= orientation <= 8:
        raise RefusedError(f"has orientation {orientation}; allowed: 1 to 8")
    if orientation >= 5:
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
