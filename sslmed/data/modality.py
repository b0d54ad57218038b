"""What kind of image this is: how its intensities become network input, and which augmentations keep its meaning.

A modality is data, one frozen instance with two functions. A new one is an entry in `MODALITIES`; the contract tests
run over it.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from sslmed.config import DataError, UsageError
from sslmed.data.scan import Scan
from sslmed.data.views import ViewConfig

Pixels = np.ndarray[Any, np.dtype[Any]]

NEARLY_GREY = 0.03  # 7 of 255 levels: JPEG at usual qualities; a coloured marker differs by far more
_GEOMETRY = frozenset({"crop", "aspect", "rotate", "hflip"})
_INTENSITY = frozenset({"brightness", "contrast", "gamma", "blur", "blur_sigma", "noise"})


@dataclass(frozen=True)
class Modality:
    """The policy of one kind of image.

    Attributes:
        name: as in ``--modality`` and in store and card.
        channels: numbers of channels that a stored image may have.
        view: the default augmentation.
        legal: the `ViewConfig` knobs that may be set; every other one stays at its neutral value.
        intensity_range: pixels as stored -> (low, high) in stored units, low < high; taken once an image, at ingest.
        normalise: (pixels, low, high) -> float32 of the same shape, standardised. Takes a crop too: low and high are
            those of the whole image, so every view of it is scaled alike.
        taken: DICOM's words for how such images are taken; an image that says another one is refused.
        upright: whether images have an up and a down; None where that depends.
        annotated: whether side markers or burned-in text are usual; None where that depends.
    """

    name: str
    channels: tuple[int, ...]
    view: ViewConfig
    legal: frozenset[str]
    intensity_range: Callable[[Pixels], tuple[float, float]]
    normalise: Callable[[Pixels, float, float], Pixels]
    taken: frozenset[str] = frozenset()
    upright: bool | None = True
    annotated: bool | None = False


def percentile_range(pixels: Pixels) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles: never the dtype's range, which would crush 12-bit data in a 16-bit file.

    An image where they meet gets its minimum and maximum, a constant image (value, value + 1).
    """
    low, high = (float(value) for value in np.percentile(pixels, (0.5, 99.5)))
    if high <= low:
        low, high = float(pixels.min()), float(pixels.max())
    return (low, high) if high > low else (low, low + 1.0)


def dtype_range(pixels: Pixels) -> tuple[float, float]:
    """Zero and the dtype's greatest value: the colours of a photo are meant as they stand."""
    return 0.0, float(np.iinfo(pixels.dtype).max) if pixels.dtype.kind in "ui" else 1.0


def normalise_xray(pixels: Pixels, low: float, high: float) -> Pixels:
    """(clip((x - low) / (high - low), 0, 1) - 0.5) / 0.25: about zero mean and unit deviation, in [-2, 2]."""
    return np.asarray((_unit(pixels, low, high) - np.float32(0.5)) / np.float32(0.25))


_IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def normalise_photo(pixels: Pixels, low: float, high: float) -> Pixels:
    """(clip((x - low) / (high - low), 0, 1) - mean) / std, per channel with ImageNet's; grey takes their averages."""
    unit = _unit(pixels, low, high)
    if pixels.ndim == 3:
        return (unit - _IMAGENET_MEAN) / _IMAGENET_STD
    return np.asarray((unit - _IMAGENET_MEAN.mean()) / _IMAGENET_STD.mean())


def _unit(pixels: Pixels, low: float, high: float) -> Pixels:
    unit = (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.asarray(np.clip(unit, np.float32(0), np.float32(1)))


_XRAY = Modality(
    name="xray",
    channels=(1,),
    # Left and right, up and down mean something in a radiograph, and grey values carry the finding: no flips, no
    # quarter turns, weak blur. hflip is legal because pathology labels survive it (MoCo-CXR flips), but a recipe has
    # to ask for it.
    view=ViewConfig(
        crop=(0.3, 1.0), rotate=15, brightness=0.4, contrast=0.4, gamma=0.3, blur=0.2, blur_sigma=(0.1, 1.0)
    ),
    legal=_GEOMETRY | _INTENSITY,
    intensity_range=percentile_range,
    normalise=normalise_xray,
    taken=frozenset({"CR", "DX", "MG", "XA", "RF", "RG", "IO", "PX", "OT"}),
    annotated=True,
)
_PHOTO = Modality(
    name="photo",
    channels=(1, 3),
    view=ViewConfig(
        crop=(0.2, 1.0), hflip=0.5, brightness=0.4, contrast=0.4, colour=0.2, grey=0.2, blur=0.5, blur_sigma=(0.1, 2.0)
    ),
    legal=_GEOMETRY | _INTENSITY | {"vflip", "rot90", "colour", "grey", "solarize"},
    intensity_range=dtype_range,
    normalise=normalise_photo,
    upright=None,
    annotated=None,
    taken=frozenset({"XC", "ES", "GM", "OP", "DMS", "OT"}),
)
_HISTOLOGY = Modality(
    name="histology",
    channels=(1, 3),
    # Tissue has no up and no left: every flip and quarter turn. Colour is stain, which differs from laboratory to
    # laboratory (Tellez et al., arXiv 1902.06543): stains are changed, not hue and saturation.
    view=ViewConfig(
        crop=(0.3, 1.0),
        hflip=0.5,
        vflip=0.5,
        rot90=1.0,
        stain=0.1,
        brightness=0.2,
        contrast=0.2,
        blur=0.2,
        blur_sigma=(0.1, 1.0),
    ),
    legal=_GEOMETRY | _INTENSITY | {"vflip", "rot90", "stain"},
    intensity_range=dtype_range,
    normalise=normalise_photo,
    upright=False,
    taken=frozenset({"SM", "GM"}),
)
MODALITIES: dict[str, Modality] = {modality.name: modality for modality in (_XRAY, _HISTOLOGY, _PHOTO)}


def named(name: str) -> Modality:
    """The modality of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in MODALITIES:
        raise UsageError(
            f"'{name}' is not a known modality{_guess(name, MODALITIES)}; allowed: {', '.join(MODALITIES)}"
        )
    return MODALITIES[name]


def accept_scan(modality: Modality, scan: Scan) -> Pixels:
    """The pixels of a scan as the store keeps them; see `accept`.

    Raises:
        DataError: a volume, a clip, an image that was taken in another way, true colour in a grey modality.
    """
    sort = f" ({scan.modality})" if scan.modality else ""
    if scan.kind != "image":
        shape = " x ".join(str(side) for side in scan.pixels.shape[:3])
        raise DataError(
            f"is a {scan.kind} of {shape} pixels{sort}, not one image: not read by modality {modality.name}"
        )
    if scan.modality in ("CT", "MR", "PT"):
        raise DataError(f"is a slice of a series{sort}, not a whole image: not read by modality {modality.name}")
    if scan.modality and scan.modality not in modality.taken:
        allowed = ", ".join(sorted(modality.taken))
        raise DataError(f"was taken as {scan.modality}: not read by modality {modality.name}, which takes {allowed}")
    return accept(modality, scan.pixels)


def accept(modality: Modality, pixels: Pixels) -> Pixels:
    """The pixels as the store keeps them: (H, W) or, where the modality has colour, (H, W, 3); dtype unchanged.

    A grey picture saved as RGB becomes one channel where the modality takes only grey: the first of equal channels, or
    their mean where JPEG's colour coding has parted them by no more than ``NEARLY_GREY`` of the dtype's range.

    Raises:
        DataError: true colour in a grey modality.
    """
    if pixels.ndim == 2 or 3 in modality.channels:
        return pixels
    first = pixels[..., 0]
    if all(np.array_equal(first, pixels[..., channel]) for channel in range(1, pixels.shape[2])):
        return np.ascontiguousarray(first)
    spread = pixels.max(axis=2) - pixels.min(axis=2)  # cannot overflow: both are of one unsigned dtype
    if spread.max() <= NEARLY_GREY * np.iinfo(pixels.dtype).max:
        mean: Pixels = np.rint(pixels.mean(axis=2)).astype(pixels.dtype)
        return mean
    raise DataError(
        f"is in colour, but {modality.name} images are grey; save it as grey (after cutting off coloured annotations), "
        "or ingest it with --modality photo if its colours mean something"
    )


def with_views(modality: Modality, overrides: dict[str, object]) -> Modality:
    """The modality with some knobs of its default view changed.

    Raises:
        UsageError: an unknown knob, a value out of range, or one that this modality forbids.
    """
    for knob in overrides:
        if knob not in ViewConfig.model_fields:
            raise UsageError(f"'views.{knob}' is not a known key{_guess(knob, ViewConfig.model_fields)}")
    try:
        view = ViewConfig.model_validate(modality.view.model_dump() | overrides)
    except ValidationError as error:
        problem = error.errors()[0]
        knob = ".".join(["views", *(str(part) for part in problem["loc"])])
        raise UsageError(f"'{knob}' is {problem['input']!r}: {problem['msg']}") from None
    for knob in sorted(set_knobs(view) - modality.legal):
        raise UsageError(
            f"'views.{knob}' is {getattr(view, knob)}, but a {modality.name} image does not keep its meaning under it; "
            f"remove the key. Allowed for {modality.name}: {', '.join(sorted(modality.legal))}"
        )
    return replace(modality, view=view)


def changed_knobs(modality: Modality) -> set[str]:
    """The knobs of the view that are not as this modality has them by itself."""
    usual = MODALITIES[modality.name].view if modality.name in MODALITIES else modality.view
    return {knob for knob in ViewConfig.model_fields if getattr(modality.view, knob) != getattr(usual, knob)}


def set_knobs(view: ViewConfig) -> set[str]:
    """The knobs that do something: a number other than 0; a range always does."""
    return {knob for knob in ViewConfig.model_fields if isinstance(getattr(view, knob), tuple) or getattr(view, knob)}


def _guess(given: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
