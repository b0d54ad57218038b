"""What OME-XML and ImageJ say of the pages of a TIFF: whether they are depth or time, in which order, how far apart.

tifffile would read the same, but it believes the numbers in the text before anything can check them, and opens other
files that the text names. Of several channels, and of depth and time at once, none is chosen here.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal
from xml.etree import ElementTree  # refused before it is parsed: see _pixels

from sslmed.data.readers.refusal import RefusedError

_MM = {"nm": 1e-6, "µm": 1e-3, "mm": 1.0, "cm": 10.0, "m": 1e3, "in": 25.4}
_IMAGEJ_MM = _MM | {"um": 1e-3, "micron": 1e-3, "microns": 1e-3, "\\u00b5m": 1e-3, "inch": 25.4}
_MICRO = "\u03bc", "\u00b5"  # the Greek letter, the sign


@dataclass(frozen=True)
class Layout:
    """How pages make one scan.

    Attributes:
        kind: what several pages are.
        order: of the pages.
        spacing: (slice to slice, down, across) in mm, each None where it is not said.
    """

    kind: Literal["image", "volume", "clip"]
    order: list[int]
    spacing: tuple[float | None, float | None, float | None] = (None, None, None)

    def of_pixels(self) -> tuple[float, ...] | None:
        """The spacing that a scan has: of three sides for a volume, else of two; None where one is missing."""
        wanted = self.spacing if self.kind == "volume" else self.spacing[1:]
        known = tuple(side for side in wanted if side is not None)
        return known if len(known) == len(wanted) else None


def layout(page: Any, pages: int) -> Layout:
    """How a file's main pages are meant.

    Args:
        page: tifffile's first page.
        pages: how many there are.

    Raises:
        RefusedError: several images, several channels, depth and time at once, pages that are missing or lie in other
            files, a text that is no OME-XML or defines entities.
    """
    if page.is_ome:
        return _ome(str(page.description), pages, int(page.samplesperpixel))
    if page.is_imagej:
        return _imagej(page, pages)
    if page.is_shaped and _truncated(str(page.shaped_description)):
        raise RefusedError("is a TIFF that describes only the first of its pages; save it with a header for each")
    return Layout("clip" if pages > 1 else "image", list(range(pages)))


def _ome(text: str, pages: int, samples: int) -> Layout:
    pixels = _pixels(text)
    sides = {axis: int(pixels.get(f"Size{axis}", "1")) for axis in "XYZCT"}
    channels = sum(part.tag.endswith("Channel") for part in pixels) or sides["C"] // samples  # optional, one each
    kind = _kind(channels, sides["Z"], sides["T"])
    count = max(sides["Z"], sides["T"])
    if count != pages:
        raise RefusedError(f"is an OME-TIFF of {count} planes in {pages} pages")
    axis = "Z" if sides["Z"] > 1 else "T"
    spacing = [_length(pixels, name) for name in "ZYX"]
    return Layout(kind, _order(pixels, axis, pages), (spacing[0], spacing[1], spacing[2]))


def _pixels(text: str) -> Any:
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # entities that name each other fill a memory
        raise RefusedError("is an OME-TIFF whose text defines entities")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  # no entities: see above
    except ElementTree.ParseError as error:
        raise RefusedError(f"is an OME-TIFF whose text is no XML ({error})") from None
    found = [part for image in root if image.tag.endswith("Image") for part in image if part.tag.endswith("Pixels")]
    if len(found) != 1:
        raise RefusedError(f"is an OME-TIFF of {len(found)} images; allowed: one; save each by itself")
    return found[0]


def _kind(channels: int, depth: int, times: int) -> Literal["image", "volume", "clip"]:
    if channels != 1:
        raise RefusedError(f"has {channels} channels, which are no colours; save the one that is meant")
    if depth > 1 and times > 1:
        raise RefusedError(f"has {depth} slices at {times} times; save each time, or each slice, by itself")
    if min(depth, times) < 1:
        raise RefusedError(f"claims {depth} slices at {times} times")
    return "volume" if depth > 1 else "clip" if times > 1 else "image"


def _order(pixels: Any, axis: str, pages: int) -> list[int]:
    """The page of each plane (OME-TIFF specification, "The TiffData element")."""
    files = {part.get("FileName") for part in pixels.iter() if part.tag.endswith("UUID")}
    if len(files) > 1:
        raise RefusedError(f"is an OME-TIFF spread over {len(files)} files; save it as one")
    order: list[tuple[int, int]] = []
    for data in (part for part in pixels if part.tag.endswith("TiffData")):
        page, plane = int(data.get("IFD", "0")), int(data.get(f"First{axis}", "0"))
        count = int(data.get("PlaneCount", "1" if "IFD" in data.attrib else str(pages)))
        if min(page, plane) < 0 or count < 1 or max(page, plane, len(order)) + count > pages:
            raise RefusedError("is an OME-TIFF whose text names pages that it does not have, or one twice")
        order += [(plane + number, page + number) for number in range(count)]
    planes, named = ({pair[side] for pair in order} for side in (0, 1))
    if order and not len(planes) == len(named) == pages:
        raise RefusedError("is an OME-TIFF whose text leaves planes out, or names a page twice")
    return [page for _, page in sorted(order)] or list(range(pages))


def _length(pixels: Any, axis: str) -> float | None:
    """PhysicalSize of an axis in mm; micrometres unless it says another unit."""
    given, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
    return _in_mm(given, _MM.get(unit.replace(*_MICRO)))


def _imagej(page: Any, pages: int) -> Layout:
    told = dict(line.split("=", 1) for line in str(page.imagej_description).splitlines() if "=" in line)
    depth, times = (int(told.get(name, "1")) for name in ("slices", "frames"))
    kind = _kind(int(told.get("channels", "1")), depth, times)
    count = max(depth, times, int(told.get("images", "1")))
    if count != pages:
        raise RefusedError(
            f"is an ImageJ TIFF of {count} images in {pages} pages; save each image in a page of its own"
        )
    if kind == "image" and pages > 1:
        kind = "clip"  # it does not say what the images of its stack are
    scale = _IMAGEJ_MM.get(told.get("unit", "").strip().replace(*_MICRO))
    across, down = (_per_unit(page, code) for code in (282, 283))  # XResolution, YResolution
    return Layout(
        kind,
        list(range(pages)),
        (_in_mm(told.get("spacing"), scale), _in_mm(down, scale), _in_mm(across, scale)),
    )


def _per_unit(page: Any, code: int) -> float | None:
    """The side of a pixel from its resolution, pixels in a unit; None where the file does not say."""
    given = page.tags.valueof(code)
    return given[1] / given[0] if isinstance(given, tuple) and len(given) == 2 and given[0] else None


def _in_mm(given: str | float | None, scale: float | None) -> float | None:
    if given is None or scale is None:
        return None
    side = float(given) * scale
    return side if math.isfinite(side) and side > 0 else None


def _truncated(description: str) -> bool:
    return '"truncated": true' in description
