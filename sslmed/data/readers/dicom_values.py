"""From stored values to what they mean. The order is DICOM's: padding, modality table or rescale, window, inversion.

CT and MR, PET and NM are quantities: rescaled and no more. Everything else grey is a picture that was made to be
looked at: its window (VOI) belongs to it, and MONOCHROME1 is inverted last, on the window's output. Never by the
dtype's range.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from sslmed.data.readers.refusal import Pixels, RefusedError

if TYPE_CHECKING:
    from pydicom import Dataset

QUANTITIES = frozenset({"CT", "MR", "PT", "NM"})
AIR = -1024  # HU, of pixels that are padding


def functional_group(dataset: "Dataset", frame: int, name: str) -> "Dataset | None":
    """The item of a functional group for a frame, its own or the one that all share (PS3.3, C.7.6.16)."""
    for sequence, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence)
        if groups and number < len(groups) and groups[number].get(name):
            return groups[number].get(name)[0]  # type: ignore[no-any-return]
    return None


def padding(stored: Pixels, dataset: "Dataset") -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """Where PixelPaddingValue, perhaps up to PixelPaddingRangeLimit, stands (PS3.3, C.7.5.1.1.2); None without."""
    values = [dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")]
    if values[0] is None:
        return None
    # The VR may be read signed or not: as many bits as are stored count, with the sign of the pixels.
    bits = int(dataset.BitsStored)
    ends = [_of_bits(int(value), bits, signed=stored.dtype.kind == "i") for value in values if value is not None]
    return (stored >= min(ends)) & (stored <= max(ends))


def _of_bits(value: int, bits: int, signed: bool) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def quantity(stored: Pixels, dataset: "Dataset", frame: int) -> Pixels:
    """Rescaled values (H, W), int32 where they are whole and float32 else; padding is -1024 HU or the least value.

    Raises:
        RefusedError: a CT without rescale, a table or numbers that cannot be, nothing but padding.
    """
    if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise RefusedError(f"is {dataset.Modality} in colour: its values are no quantity")
    computed = dataset.Modality == "CT"
    if dataset.PhotometricInterpretation == "MONOCHROME1" and not computed:
        raise RefusedError(f"is {dataset.Modality} with MONOCHROME1: whether its values grow with the signal is open")
    blank = padding(stored, dataset)
    values, _ = rescaled(stored, dataset, frame, needed=computed)
    if blank is not None and blank.any():
        if blank.all() and not computed:
            raise RefusedError("has no pixel but padding")
        values = np.where(blank, AIR if computed else values[~blank].min(), values).astype(values.dtype)
    return values


def compact(values: Pixels, modality: str) -> Pixels:
    """Whole numbers as int16 (of CT) or, where none is negative, uint16; what does not fit as float32."""
    if values.dtype.kind != "f":
        for kind in (np.int16,) if modality == "CT" else (np.uint16, np.int16):
            if values.min() >= np.iinfo(kind).min and values.max() <= np.iinfo(kind).max:
                return values.astype(kind, copy=False)
    return values.astype(np.float32, copy=False)


def rescaled(
    stored: Pixels, dataset: "Dataset", frame: int = 0, needed: bool = False
) -> tuple[Pixels, tuple[float, float]]:
    """Modality LUT or slope and intercept (PS3.3, C.11.1): values in int32 or float32, and the range they may have."""
    bits, signed = int(dataset.BitsStored), stored.dtype.kind == "i"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if dataset.get("ModalityLUTSequence"):
        values, top = _look_up(stored, dataset.ModalityLUTSequence[0], dataset, high)
        return values.astype(np.int32), (0.0, float(top))
    place = functional_group(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
    if needed and (slope is None or intercept is None):
        raise RefusedError("is a CT without rescale slope and intercept: its values cannot be turned into HU")
    slope, intercept = (float(1 if slope is None else slope), float(0 if intercept is None else intercept))
    if not np.isfinite([slope, intercept]).all() or slope == 0 or max(abs(slope), abs(intercept)) > 1e30:
        raise RefusedError(f"has a rescale slope of {slope:g} and intercept of {intercept:g}")
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if slope.is_integer() and intercept.is_integer() and max(map(abs, ends)) < 2**31:
        return stored.astype(np.int32) * int(slope) + int(intercept), (ends[0], ends[1])
    return (stored.astype(np.float64) * slope + intercept).astype(np.float32), (ends[0], ends[1])


def picture(stored: Pixels, dataset: "Dataset", frame: int) -> Pixels:
    """A grey picture (H, W) as it is meant to be seen, dark to bright, in uint8 or uint16.

    After a window, values run from 0 to 65535 where the window or the source has more than 8 bits, to 255 otherwise;
    after a table, from 0 to what its bits hold; without either, from 0 to what BitsStored (or the modality LUT's bits)
    hold. Padding is 0, black, whatever the photometric interpretation. Of several windows the first counts, and a table
    comes before a window.

    Raises:
        RefusedError: a window or table that cannot be, or that leaves one value of many.
    """
    blank = padding(stored, dataset)
    values, ends = rescaled(stored, dataset, frame)
    place = functional_group(dataset, frame, "FrameVOILUTSequence") or dataset
    if place.get("VOILUTSequence"):
        shown, top = _look_up(values, place.VOILUTSequence[0], dataset, ends[1])
    elif _first(place, "WindowCenter") is not None and _first(place, "WindowWidth") is not None:
        top = 255 if int(dataset.BitsStored) <= 8 and _first(place, "WindowWidth") <= 256 else 65535
        shown = np.rint(_window(values.astype(np.float64), place) * top)
    else:
        top = 2 ** int(dataset.BitsStored) - 1 if not dataset.get("ModalityLUTSequence") else int(ends[1])
        shown = np.rint((values.astype(np.float64) - ends[0]) * (top / (ends[1] - ends[0])))
    seen = slice(None) if blank is None else ~blank
    if shown[seen].size and shown[seen].min() == shown[seen].max() and stored[seen].min() != stored[seen].max():
        raise RefusedError("has a window (VOI) in which every pixel looks the same")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = top - shown
    if blank is not None:
        shown = np.where(blank, 0, shown)
    pixels: Pixels = shown.astype(np.uint8 if top <= 255 else np.uint16)
    return pixels


def _first(dataset: "Dataset", name: str) -> Any:
    """The first of one or several numbers, None where there is none."""
    value = dataset.get(name)
    if value is None or isinstance(value, str | int | float):
        return float(value) if value not in (None, "") else None
    return float(value[0]) if len(value) else None


def _window(values: Pixels, place: "Dataset") -> Pixels:
    """0 to 1 (PS3.3, C.11.2.1.2 and C.11.2.1.3)."""
    center, width = _first(place, "WindowCenter"), _first(place, "WindowWidth")
    function = str(place.get("VOILUTFunction") or "LINEAR").upper()
    least = 1.0 if function == "LINEAR" else np.nextafter(0, 1)
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or not np.isfinite([center, width]).all() or width < least:
        raise RefusedError(f"has a {function} window of center {center:g} and width {width:g}")
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -700, 700))))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.asarray(values > center, np.float64)
    return np.asarray(np.clip((values - center) / width + 0.5, 0, 1))


def _look_up(values: Pixels, item: "Dataset", dataset: "Dataset", high: float) -> tuple[Pixels, int]:
    """Values through a table (PS3.3, C.11.1.1 and C.11.2.1.1), and the greatest value that its bits hold."""
    count, first, bits = (int(value) for value in item.LUTDescriptor)
    return _table(values, item.LUTData, (count, first, bits), dataset, high), (1 << bits) - 1


def _table(values: Pixels, data: Any, descriptor: tuple[int, int, int], dataset: "Dataset", high: float) -> Pixels:
    count, first, bits = descriptor
    count = count & 0xFFFF or 0x10000
    if first > high:  # a negative number that was read unsigned
        first -= 0x10000
    if isinstance(data, bytes):
        order = ">" if not dataset.file_meta.TransferSyntaxUID.is_little_endian else "<"
        entries = np.frombuffer(data, np.uint8 if len(data) < 2 * count else np.dtype(f"{order}u2"))
    else:
        entries = np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if not 8 <= bits <= 16 or len(entries) < count:
        raise RefusedError(f"has a damaged lookup table: {len(entries)} of {count} entries, {bits} bits")
    return np.minimum(entries[:count].astype(np.uint16), (1 << bits) - 1)[
        np.clip(np.rint(values).astype(np.int64) - first, 0, count - 1)
    ]


def palette(stored: Pixels, dataset: "Dataset") -> Pixels:
    """(H, W, 3) uint8 or uint16 of palette colours (PS3.3, C.7.6.3.1.5)."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        from pydicom.pixels.processing import apply_color_lut

        for colour in ("Red", "Green", "Blue", "Alpha"):
            _check_segments(dataset.get(f"Segmented{colour}PaletteColorLookupTableData") or b"", dataset)
        return np.asarray(apply_color_lut(stored.astype(np.int32), dataset)[..., :3])
    channels, depth = [], 8
    for colour in ("Red", "Green", "Blue"):
        descriptor = dataset.get(f"{colour}PaletteColorLookupTableDescriptor")
        data = dataset.get(f"{colour}PaletteColorLookupTableData")
        if descriptor is None or data is None or len(descriptor) != 3:
            raise RefusedError("has palette colours, but no palette")
        count, first, bits = (int(value) for value in descriptor)
        depth = max(depth, bits)
        channels.append(_table(stored, data, (count, first, bits), dataset, np.iinfo(stored.dtype).max))
    colours = np.stack(channels, axis=-1)
    return colours.astype(np.uint8 if colours.max() <= 255 and depth == 8 else np.uint16)


def _check_segments(data: bytes, dataset: "Dataset") -> None:
    """Refuse segments that fill more than a table holds (PS3.3, C.7.9.2): each may claim 65535 entries in 6 bytes."""
    order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
    kind = np.dtype(f"{order}u{int(dataset.RedPaletteColorLookupTableDescriptor[2]) // 8}")
    words = np.frombuffer(data, kind, len(data) // kind.itemsize).tolist()
    place = filled = 0
    while place + 1 < len(words):
        code, length = words[place : place + 2]
        filled += length
        if code > 1 or filled > 2**16:
            raise RefusedError("has a palette of indirect segments, or of more than 65536 entries")
        place += 3 if code else 2 + length
