"""TIFF files to images, volumes and clips.

tifffile fills missing strips with zeros, so every strip is first seen to lie inside the file. Uncompressed TIFF carries
no checksum: a changed byte in its pixel data cannot be seen by anyone.
"""

import logging
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sslmed.config import MissingDependencyError
from sslmed.data.readers.microscopy import layout
from sslmed.data.readers.refusal import BYTE_LIMIT, DEFLATE_RATIO, Pixels, RefusedError, check_size
from sslmed.data.scan import Scan

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS = {np.dtype(kind): 8 * np.dtype(kind).itemsize for kind in (np.uint8, np.uint16, np.int16, np.float32)}
MOST_PAGES = 10_000  # of one file: each takes tifffile 0.1 ms and 4 kB, whatever is in it
_REDUCED = 1  # of NewSubfileType: a smaller copy of another page (TIFF 6.0, tag 254)


def tiff(content: bytes, path: Path) -> Scan:
    """One page as an image; pages of one size as a volume, where OME-XML or ImageJ says so, else as a clip.

    Pages are (H, W) or (H, W, 3) in RGB order, turned as their orientation tags say, white-is-zero inverted. Smaller
    copies of a page (NewSubfileType 1, SubIFDs) are passed over. The print resolution is no spacing.

    Raises:
        RefusedError: pages of different sizes, colours or dtypes that are not read, strips beyond the file, claims
            beyond the limits, and what `microscopy.layout` refuses.
        MissingDependencyError: the pages are compressed in a way that needs imagecodecs.
    """
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # what it would log ends in the refusal
    chain = _chain(content)
    with tifffile.TiffFile(BytesIO(content)) as file:
        if len(file.pages) != chain:
            raise RefusedError(f"is a damaged TIFF: {len(file.pages)} of its {chain} pages can be read")
        pages: list[Any] = [page for page in file.pages if not int(getattr(page, "subfiletype", 0)) & _REDUCED]
        if not pages:
            raise RefusedError("is a damaged TIFF: it has no page")
        if not all(isinstance(page, tifffile.TiffPage) for page in pages):
            raise RefusedError("is a damaged TIFF")
        _check_alike(pages)
        found = layout(pages[0], len(pages))
        _check_all(pages, len(content))
        decoded = [_page(pages[number]) for number in found.order]
        turned = int(pages[0].tags.valueof(274, 1)) >= 5
    spacing = found.of_pixels()
    if spacing is not None and turned:
        spacing = (*spacing[:-2], spacing[-1], spacing[-2])
    if found.kind == "image":
        return Scan(np.ascontiguousarray(decoded[0]), spacing, path)
    stack = np.stack(decoded)
    if found.kind == "volume" and stack.ndim == 4:
        raise RefusedError("is a volume in colour")
    return Scan(stack, spacing, path, kind=found.kind)


def _chain(content: bytes) -> int:
    """How many pages lead to the end mark: tifffile makes do with those before one that is cut off (TIFF 6.0, 2)."""
    order: Literal["little", "big"] = "little" if content[:2] == b"II" else "big"
    big = 43 in content[2:4]  # BigTIFF has numbers of 8 bytes, and entries of 20
    width, entry, tally = (8, 20, 8) if big else (4, 12, 2)
    place, seen = width, set[int]()
    while (page := int.from_bytes(content[place : place + width], order)) or place + width > len(content):
        if page in seen or page + tally > len(content) or place + width > len(content):
            raise RefusedError("is a truncated TIFF: its chain of pages leads nowhere")
        seen.add(page)
        if len(seen) > MOST_PAGES:
            raise RefusedError(f"has more than {MOST_PAGES} pages; save parts of it as files of their own")
        place = page + tally + entry * int.from_bytes(content[page : page + tally], order)
    return len(seen)


def _check_alike(pages: list[Any]) -> None:
    """Refuse pages that are not of one size and kind, by their headers."""
    kinds = {(page.shape, str(page.dtype), int(page.photometric), page.tags.valueof(274, 1)) for page in pages}
    if len(kinds) > 1:
        sizes = " and ".join(sorted({" x ".join(map(str, page.shape)) for page in pages})[:3])
        raise RefusedError(
            f"is a TIFF of {len(pages)} pages that differ ({sizes}), such as an image and its thumbnail or its "
            "pyramid; save the page that is meant as one image"
        )


def _check_all(pages: list[Any], size: int) -> None:
    """Refuse by the headers, before anything is decoded or allocated."""
    first = pages[0]
    if len(pages) > 1:
        check_size(len(pages), first.imagelength, first.imagewidth)
    for page in pages:
        _check_page(page, size)
    claim = len(pages) * first.nbytes
    if claim > DEFLATE_RATIO * size or claim > BYTE_LIMIT:
        many = f"{len(pages)} x " if len(pages) > 1 else ""
        raise RefusedError(f"claims {many}{first.shape} pixels, more than its {size} bytes can hold")


def _check_page(page: Any, size: int) -> None:
    check_size(page.imagelength, page.imagewidth)
    if _BITS.get(page.dtype) != page.bitspersample:
        raise RefusedError(
            f"is a TIFF of {page.bitspersample}-bit {page.dtype}; allowed: unsigned of 8 or 16 bits, int16, float32"
        )
    if page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel > 4:
        raise RefusedError(f"is a TIFF with axes {page.axes} and {page.samplesperpixel} samples; allowed: grey or RGB")
    if int(page.photometric) not in (0, 1, 2):
        kind = getattr(page.photometric, "name", page.photometric)
        raise RefusedError(f"is a TIFF with {kind} colours; save it as grey or RGB")
    if page.dtype.kind != "u" and (int(page.photometric) != 1 or page.samplesperpixel > 1):
        raise RefusedError(f"is a TIFF of {page.dtype} that is not plain grey; allowed: black is the least value")
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or min(page.databytecounts) < 1 or max(ends) > size:
        raise RefusedError("is a truncated TIFF: some of its pixels lie beyond the end of the file")


def _page(page: Any) -> Pixels:
    """One page, upright."""
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
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise RefusedError(f"has {int((~np.isfinite(pixels)).sum())} values that are NaN or infinite")
    native = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    return _turn(_channels(native, page), int(page.tags.valueof(274, 1)))


def _channels(pixels: Pixels, page: Any) -> Pixels:
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
