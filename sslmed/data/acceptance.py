"""From a scan to the pixels that a store keeps: is it of the modality, is it grey, are its values what they must be."""

from typing import TYPE_CHECKING, Any

import numpy as np

from sslmed.config import DataError
from sslmed.data.scan import Scan

if TYPE_CHECKING:
    from sslmed.data.modality import Modality

Pixels = np.ndarray[Any, np.dtype[Any]]

NEARLY_GREY = 0.03  # 7 of 255 levels: JPEG at usual qualities; a coloured marker differs by far more
NARROW = 20  # HU; values over no more than this are standardised already: water and fat alone are 100 apart


def accept_scan(modality: "Modality", scan: Scan) -> Pixels:
    """The pixels of a scan as the store keeps them: an image as `accept` has it, a volume or grey clip (D, H, W).

    Raises:
        DataError: another kind of scan, one that was taken in another way, true colour in a grey modality, values that
            cannot be Hounsfield units where they must be.
    """
    sort = f" ({scan.modality})" if scan.modality else ""
    if scan.kind not in modality.kinds:
        shape = " x ".join(str(side) for side in scan.pixels.shape[:3])
        wanted = "one image" if modality.kinds == ("image",) else " or ".join(modality.kinds)
        raise DataError(f"is a {scan.kind} of {shape} pixels{sort}, not {wanted}: not read by modality {modality.name}")
    if scan.modality in ("CT", "MR", "PT") and scan.modality not in modality.taken:
        raise DataError(f"is a slice of a series{sort}, not a whole image: not read by modality {modality.name}")
    if scan.modality and scan.modality not in modality.taken:
        allowed = ", ".join(sorted(modality.taken))
        raise DataError(f"was taken as {scan.modality}: not read by modality {modality.name}, which takes {allowed}")
    if modality.unit and scan.unit != modality.unit:
        _check_hounsfield(scan.pixels)
    return accept(modality, scan.pixels, scan.kind)


def accept(modality: "Modality", pixels: Pixels, kind: str = "image") -> Pixels:
    """The pixels as the store keeps them: grey or, where the modality has it, colour; dtype unchanged.

    A grey picture saved as RGB becomes one channel where the modality takes only grey: the first of equal channels, or
    their mean where JPEG's colour coding has parted them by no more than ``NEARLY_GREY`` of the dtype's range.

    Raises:
        DataError: true colour in a grey modality.
    """
    colour = pixels.ndim == (3 if kind == "image" else 4)
    if modality.prepare is not None:
        return modality.prepare(pixels, colour)
    if not colour or 3 in modality.channels:
        return pixels
    first = pixels[..., 0]
    if all(np.array_equal(first, pixels[..., channel]) for channel in range(1, pixels.shape[-1])):
        return np.ascontiguousarray(first)
    spread = pixels.max(axis=-1) - pixels.min(axis=-1)  # cannot overflow: both are of one unsigned dtype
    if spread.max() <= NEARLY_GREY * np.iinfo(pixels.dtype).max:
        mean: Pixels = np.rint(pixels.mean(axis=-1)).astype(pixels.dtype)
        return mean
    raise DataError(
        f"is in colour, but {modality.name} images are grey; save it as grey (after cutting off coloured annotations), "
        "or ingest it with --modality photo if its colours mean something"
    )


def _check_hounsfield(pixels: Pixels) -> None:
    """Of a file that does not say what its values mean, such as NIfTI."""
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 or (low > -NARROW and high - low <= NARROW):
        raise DataError(
            f"has values from {low:g} to {high:g}, which are no Hounsfield units (water 0, air -1000): a picture, a "
            "window, standardised values or ones that were never rescaled. Give the DICOM files, or a volume in HU"
        )
