"""What kind of image this is: how its intensities become network input, and which augmentations keep its meaning.

A modality is data, one frozen instance with functions of ``sslmed.data.intensity`` and bounds. A new one is an entry in
`MODALITIES`; the contract tests run over it.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ValidationError

from sslmed.config import DataError, UsageError
from sslmed.data import intensity as of
from sslmed.data import ultrasound
from sslmed.data.intensity import Intensity, Normalise, Windowed
from sslmed.data.views import ViewConfig

Pixels = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["image", "volume", "clip"]


class Bound(NamedTuple):
    """The least and the greatest number that a knob may have; of a range, that either end may have."""

    low: float
    high: float


@dataclass(frozen=True)
class Modality:
    """The policy of one kind of image.

    Attributes:
        name: as in ``--modality`` and in store and card.
        channels: numbers of channels that a stored image may have.
        view: the default augmentation.
        legal: the `ViewConfig` knobs that may be set, and how far; every other one stays at its neutral value.
        intensity: pixels of a whole scan as stored, (H, W), (H, W, 3) or (D, H, W) -> what they are measured by; taken
            once a scan, at ingest.
        normalise: (pixels, intensity of their scan, window jitter) -> float32, standardised: (H, W), (H, W, 3) in
            colour, or (H, W, n), n neighbouring slices. Takes a crop too: every view of a scan is scaled alike.
        record: what decides stored pixels and intensities, in plain JSON: a store made otherwise is refused.
        words: the normalisation as a card tells it.
        kinds: of scans that are taken.
        unit: what a value must mean.
        prepare: (pixels, whether channels are behind) -> grey pixels as they are stored, where that takes more than
            leaving them as they are.
        taken: DICOM's words for how such images are taken; an image that says another one is refused.
        upright: whether images have an up and a down; None where that depends.
        annotated: whether side markers or burned-in text are usual; None where that depends.
    """

    name: str
    channels: tuple[int, ...]
    view: ViewConfig
    legal: Mapping[str, Bound]
    intensity: Callable[[Pixels], Intensity]
    normalise: Normalise
    record: Mapping[str, Any]
    words: str
    kinds: tuple[Kind, ...] = ("image",)
    unit: Literal["", "HU"] = ""
    prepare: Callable[[Pixels, bool], Pixels] | None = None
    taken: frozenset[str] = frozenset()
    upright: bool | None = True
    annotated: bool | None = False


_PROBABILITY = Bound(0, 1)
# Lesions are small: a crop of less than a sixth of a radiograph or slice mostly shows none, and a blur of more than a
# pixel or so deletes them.
_GEOMETRY = {
    "crop": Bound(0.15, 1),
    "aspect": Bound(0.5, 2),
    "rotate": Bound(0, 45),
    "hflip": _PROBABILITY,
}
_FINE = {"noise": Bound(0, 0.5), "blur": _PROBABILITY, "blur_sigma": Bound(0.05, 1.5)}
_TONE = {"brightness": Bound(0, 1), "contrast": Bound(0, 0.8), "gamma": Bound(0, 0.7)}
_ANY_CROP = {"crop": Bound(0.05, 1), "rotate": Bound(0, 180), "blur_sigma": Bound(0.05, 5)}
_TURNS = {"vflip": _PROBABILITY, "rot90": _PROBABILITY}
_UNIT_WORDS = "(clip((x - low) / (high - low), 0, 1) - 0.5) / 0.25: about zero mean and unit deviation, in [-2, 2]"
_IMAGENET_WORDS = (
    "(clip((x - low) / (high - low), 0, 1) - mean) / std, per channel with ImageNet's; grey takes their averages"
)

_XRAY = Modality(
    name="xray",
    channels=(1,),
    # Left and right, up and down mean something in a radiograph, and grey values carry the finding: no flips, no
    # quarter turns, weak blur. hflip is legal because pathology labels survive it (MoCo-CXR flips), but a recipe has
    # to ask for it.
    view=ViewConfig(
        crop=(0.3, 1.0), rotate=15, brightness=0.4, contrast=0.4, gamma=0.3, blur=0.2, blur_sigma=(0.1, 1.0)
    ),
    legal=_GEOMETRY | _FINE | _TONE,
    intensity=of.whole_image,
    normalise=of.scaled,
    record={"percentiles": list(of.PERCENTILES), "of": "image"},
    words=_UNIT_WORDS,
    taken=frozenset({"CR", "DX", "MG", "XA", "RF", "RG", "IO", "PX", "OT"}),
    annotated=True,
)
_CT = Modality(
    name="ct",
    channels=(1,),
    # A value is a density: tones stay as they are but for the window that a reader chooses. Sides stay too, as liver
    # and spleen do; hflip as in radiographs.
    view=ViewConfig(crop=(0.3, 1.0), rotate=10, window=0.1, noise=0.05, blur=0.2, blur_sigma=(0.1, 1.0)),
    legal=_GEOMETRY | _FINE | {"window": Bound(0, 0.1)},
    intensity=of.hounsfield,
    normalise=Windowed((of.WINDOWS["wide"],)),
    record={"unit": "HU", "low": of.CT_LOW, "high": of.CT_HIGH},
    words="(clip((x - low) / (high - low), 0, 1) - 0.5) / 0.25, low and high level -+ width / 2, low at least -1024",
    kinds=("image", "volume"),
    unit="HU",
    taken=frozenset({"CT"}),
)
_MRI = Modality(
    name="mri",
    channels=(1,),
    # Tones differ from scanner to scanner and mean nothing by themselves, but their order does.
    view=ViewConfig(
        crop=(0.3, 1.0), rotate=10, brightness=0.3, contrast=0.3, gamma=0.3, noise=0.1, blur=0.2, blur_sigma=(0.1, 1.0)
    ),
    legal=_GEOMETRY | _FINE | _TONE,
    intensity=of.tissue,
    normalise=of.scored,
    record={"percentiles": list(of.PERCENTILES), "of": "foreground", "air": of.AIR, "voxels": of.MOST_SAMPLES},
    words="(clip(x, low, high) - mean) / std of the foreground of the whole volume, at most 8 either way",
    kinds=("image", "volume"),
    taken=frozenset({"MR"}),
)
_ULTRASOUND = Modality(
    name="ultrasound",
    channels=(1,),
    # The beam comes from above, and shadows fall downwards. Gain is set by hand, so tones may vary.
    view=ViewConfig(
        crop=(0.3, 1.0), rotate=10, brightness=0.4, contrast=0.4, gamma=0.3, blur=0.2, blur_sigma=(0.1, 1.0)
    ),
    legal=_GEOMETRY | _FINE | _TONE,
    intensity=of.lit,
    normalise=of.scaled,
    record={"percentiles": list(of.PERCENTILES), "of": "sector", "sector": ultrasound.RECORD},
    words=_UNIT_WORDS,
    kinds=("image", "clip"),
    prepare=ultrasound.beam,
    taken=frozenset({"US", "IVUS"}),
    annotated=True,
)
_PHOTO = Modality(
    name="photo",
    channels=(1, 3),
    view=ViewConfig(
        crop=(0.2, 1.0), hflip=0.5, brightness=0.4, contrast=0.4, colour=0.2, grey=0.2, blur=0.5, blur_sigma=(0.1, 2.0)
    ),
    legal=_GEOMETRY
    | _FINE
    | _TONE
    | _ANY_CROP
    | _TURNS
    | {"colour": Bound(0, 0.8), "grey": _PROBABILITY, "solarize": _PROBABILITY},
    intensity=of.dtype_range,
    normalise=of.as_imagenet,
    record={"range": "dtype"},
    words=_IMAGENET_WORDS,
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
    legal=_GEOMETRY | _FINE | _TONE | _ANY_CROP | _TURNS | {"stain": Bound(0, 0.5), "blur_sigma": Bound(0.05, 2)},
    intensity=of.dtype_range,
    normalise=of.as_imagenet,
    record={"range": "dtype"},
    words=_IMAGENET_WORDS,
    upright=False,
    taken=frozenset({"SM", "GM"}),
)
MODALITIES: dict[str, Modality] = {
    modality.name: modality for modality in (_CT, _MRI, _XRAY, _ULTRASOUND, _HISTOLOGY, _PHOTO)
}


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


def with_views(modality: Modality, overrides: Mapping[str, object]) -> Modality:
    """The modality with some knobs of its default view changed.

    Raises:
        UsageError: an unknown knob, a value out of range, or one that this modality forbids.
    """
    for knob in overrides:
        if knob not in ViewConfig.model_fields:
            raise UsageError(f"'views.{knob}' is not a known key{_guess(knob, ViewConfig.model_fields)}")
    try:
        view = ViewConfig.model_validate(modality.view.model_dump() | dict(overrides))
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:  # of two numbers that do not go together
            raise UsageError(f"views: {problem['msg'].removeprefix('Value error, ')}") from None
        knob = ".".join(["views", *(str(part) for part in problem["loc"])])
        raise UsageError(f"'{knob}' is {problem['input']!r}: {problem['msg']}") from None
    for knob in sorted(set_knobs(view)):
        _check_knob(modality, knob, getattr(view, knob))
    return replace(modality, view=view)


def _check_knob(modality: Modality, knob: str, value: Any) -> None:
    if knob not in modality.legal:
        reason = f"but {modality.name} images do not keep their meaning under it"
        if knob == "scale":
            reason = "which is for methods to set, whose views differ in size"
        raise UsageError(
            f"'views.{knob}' is {value}, {reason}; "
            f"remove the key. Allowed for {modality.name}: {', '.join(sorted(modality.legal))}"
        )
    low, high = modality.legal[knob]
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(low <= number <= high for number in numbers):
        shown = list(value) if isinstance(value, tuple) else value
        raise UsageError(f"'views.{knob}' is {shown}; allowed for {modality.name}: from {low:g} to {high:g}")


def changed_knobs(modality: Modality) -> set[str]:
    """The knobs of the view that are not as this modality has them by itself."""
    usual = MODALITIES[modality.name].view if modality.name in MODALITIES else modality.view
    return {knob for knob in ViewConfig.model_fields if getattr(modality.view, knob) != getattr(usual, knob)}


def set_knobs(view: ViewConfig) -> set[str]:
    """The knobs that do something: a number other than the neutral one; a range always does."""
    fields = ViewConfig.model_fields
    return {knob for knob in fields if isinstance(value := getattr(view, knob), tuple) or value != fields[knob].default}


def with_windows(modality: Modality, windows: Sequence[str | tuple[float, float]]) -> Modality:
    """The modality with a channel for each window: a name of ``intensity.WINDOWS``, or (level, width) in HU.

    Raises:
        UsageError: the modality has no windows, or there is no window of such a name.
    """
    if not windows:
        return modality
    if not isinstance(modality.normalise, Windowed):
        raise UsageError(f"data.windows is for ct, whose values have a unit; remove it for {modality.name}")
    try:
        found = tuple(of.window(each) for each in windows)
    except ValueError as error:
        raise UsageError(f"data.windows: {error}") from error
    return replace(modality, normalise=Windowed(found))


def planes_of(modality: Modality) -> int:
    """The network's planes that a stored channel becomes: 1, or as many as there are windows."""
    return len(modality.normalise.windows) if isinstance(modality.normalise, Windowed) else 1


def in_words(modality: Modality) -> str:
    """The normalisation, as cards have it."""
    if not isinstance(modality.normalise, Windowed):
        return modality.words
    windows = "; ".join(f"{level:g}/{width:g}" for level, width in modality.normalise.windows)
    return f"{modality.words}, for level/width {windows} HU"


def policy_record(modality: Modality) -> dict[str, Any]:
    """What decides the pixels and intensities that a store of this modality holds, in plain JSON."""
    return {"name": modality.name, **modality.record}


def refuse_other_policy(record: Mapping[str, Any], where: str) -> None:
    """Refuse a store that was made by another policy than today's of the same name.

    Raises:
        DataError: with what differs.
    """
    today = policy_record(named(record["name"]))
    if different := [key for key in sorted(today.keys() | record.keys()) if today.get(key) != record.get(key)]:
        told = "; ".join(f"{key} {record.get(key, 'none')} there, {today.get(key, 'none')} here" for key in different)
        raise DataError(
            f"{where} was made by another policy for {record['name']} than this sslmed has: {told}.\n"
            "Ingest the images again, or use the sslmed that made the store."
        )


def _guess(given: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
