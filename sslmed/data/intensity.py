"""What the intensities of a scan are measured by: taken once from the whole of it, applied to every part."""

import difflib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

Pixels = np.ndarray[Any, np.dtype[Any]]

PERCENTILES = (0.5, 99.5)
CT_LOW, CT_HIGH = -1024.0, 1024.0  # air, also what pads a scan beyond its round field (-2000 in files), and dense bone
# Of the mean of what is bright: what is darker on average is air. Measured: 0.03 in a head with its surroundings, 0.20
# and more where the dark side is fluid (40 cut-out hippocampi).
AIR = 0.12
MOST_SAMPLES = 2**20  # voxels of a volume that are looked at, evenly spread
_LEAST_STD = 1 / 8  # of high - low, so that no network input is beyond 8 either way


class Intensity(NamedTuple):
    """Of a whole scan, in stored units. A slice or crop of it is normalised by these, never by its own.

    Attributes:
        low, high: what lies outside is clipped; low < high.
        mean, std: what becomes 0 and what 1; std > 0.
    """

    low: float
    high: float
    mean: float
    std: float


class Window(NamedTuple):
    """What a CT is looked at through, in HU: its middle, and how much it shows."""

    level: float
    width: float


class Jitter(NamedTuple):
    """A change of every window: its level by ``level`` of its own width, its width by the factor ``width``."""

    level: float
    width: float


class Normalise(Protocol):
    """(pixels, intensity of their scan, jitter) -> float32; of windows alone is the jitter.

    What becomes of a value depends on no other one, nor on its place in the image: it may be looked up in a table,
    which is kept for the next image of the same intensity.
    """

    def __call__(self, pixels: Pixels, intensity: Intensity, jitter: Jitter = ..., /) -> Pixels: ...

    def __hash__(self) -> int: ...


STILL = Jitter(0.0, 1.0)
WINDOWS: dict[str, Window] = {
    "wide": Window((CT_LOW + CT_HIGH) / 2, CT_HIGH - CT_LOW),
    "lung": Window(-500, 1500),
    "mediastinum": Window(50, 350),
    "abdomen": Window(50, 350),
    "pelvis": Window(40, 400),
    "bone": Window(500, 2000),
    "brain": Window(40, 80),
}


def window(given: str | tuple[float, float]) -> Window:
    """The window of a name, or of (level, width).

    Raises:
        ValueError: no such name, a width that is not above 0, or a window that shows nothing above air.
    """
    if not isinstance(given, str):
        if given[1] <= 0:
            raise ValueError(f"the window {list(given)} is [level, width] in HU; the width must be above 0")
        if given[0] + given[1] / 2 <= CT_LOW:
            raise ValueError(f"the window {list(given)} ends at or below {CT_LOW:g} HU, where all is air")
        return Window(*given)
    if given not in WINDOWS:
        near = difflib.get_close_matches(given, WINDOWS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(WINDOWS)}, or [level, width] in HU"
        raise ValueError(f"'{given}' is no window; {hint}")
    return WINDOWS[given]


# From the whole scan to its Intensity.


def whole_image(pixels: Pixels) -> Intensity:
    """The 0.5 and 99.5 percentiles: never the dtype's range, which would crush 12-bit data in a 16-bit file.

    An image where they meet gets its minimum and maximum, a constant image (value, value + 1).
    """
    return _between(*_ends(pixels))


def dtype_range(pixels: Pixels) -> Intensity:
    """Zero and the dtype's greatest value: the colours of a photo are meant as they stand. Mean and std are ImageNet's
    over its channels."""
    high = float(np.iinfo(pixels.dtype).max) if pixels.dtype.kind in "ui" else 1.0
    return Intensity(0.0, high, high * float(IMAGENET_MEAN.mean()), high * float(IMAGENET_STD.mean()))


def hounsfield(_pixels: Pixels) -> Intensity:
    """The same for every CT: -1024 to 1024 HU."""
    return _between(CT_LOW, CT_HIGH)


def lit(pixels: Pixels) -> Intensity:
    """The 0.5 and 99.5 percentiles of what is not black: of an ultrasound within its sector."""
    sample = _sample(pixels)
    inside = sample[sample > 0]
    return _between(*_ends(inside if inside.size else sample))


def tissue(pixels: Pixels) -> Intensity:
    """The 0.5 and 99.5 percentiles, mean and standard deviation of the foreground of a volume or image.

    The values of an MR scan have no unit: each scan is its own measure, and a slice is never one for itself. What is
    darker than the foreground is clipped to one value; so is noise in the air, of which 95 % lie below ``low``.
    """
    sample = _sample(pixels)
    mask, air = foreground(sample)
    for inside in (sample[mask], sample.ravel()):
        if inside.size and inside.max() > inside.min():
            low, high = _ends(inside)
            noise = float(np.percentile(sample[air], 95)) if air.any() else low
            low = max(low, noise) if noise < high else low
            clipped = np.clip(inside.astype(np.float64), low, high)
            return Intensity(low, high, float(clipped.mean()), max(float(clipped.std()), (high - low) * _LEAST_STD))
    return _between(*_ends(sample))


def foreground(pixels: Pixels) -> tuple[Pixels, Pixels]:
    """Where there is tissue, and where there is noisy air; bool, of the shape of ``pixels`` (H, W) or (D, H, W).

    What equals the least value is padding. Otsu's threshold parts the rest, on a logarithmic scale: fat outshines the
    brain as far as the brain the air. Only if its dark side is as dark as air it is taken for that, less what tissue
    encloses within a slice: fluid and bone are dark too. Otherwise, as in a cut-out organ, all is tissue.
    """
    inside = pixels > pixels.min()
    nowhere = np.zeros(pixels.shape, bool)
    if not inside.any():
        return inside, nowhere
    base = min(float(pixels.min()), 0.0)
    values = pixels[inside].astype(np.float64) - base
    offset = max(float(np.percentile(values, 99.9)) / 100, float(np.finfo(np.float32).tiny))  # the darkest are noise
    threshold = float(np.exp(_otsu(np.log(values + offset)))) - offset
    bright, dark = values[values > threshold], values[values <= threshold]
    if not bright.size or not dark.size or dark.mean() > AIR * bright.mean():
        return inside, nowhere
    mask = _filled(pixels > threshold + base)
    return mask, inside & ~mask


def _ends(pixels: Pixels) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(pixels, PERCENTILES))
    if high <= low:
        low, high = float(pixels.min()), float(pixels.max())
    gap = max(1.0, abs(low) * 1e-6)  # wide enough to be one in float32 too, as which stores keep it
    return (low, high) if high > low else (low, low + gap)


def _between(low: float, high: float) -> Intensity:
    return Intensity(low, high, (low + high) / 2, (high - low) / 4)


def _sample(pixels: Pixels) -> Pixels:
    step = max(1, int(np.ceil((pixels.size / MOST_SAMPLES) ** (1 / pixels.ndim))))
    return pixels[(slice(None, None, step),) * pixels.ndim]


def _otsu(values: Pixels) -> float:
    """The threshold with the greatest variance between its two sides (Otsu 1979), to a 256th of the range."""
    counts, edges = np.histogram(values, 256)
    middle = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    moment = np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return float(edges[1:][np.nanargmax(np.where(above > 0, between, -1.0))])


def _filled(mask: Pixels) -> Pixels:
    """With the holes of each slice, that is of the last two axes."""
    from scipy import ndimage

    around = np.zeros((3,) * mask.ndim, bool)
    around[(1,) * (mask.ndim - 2)] = ndimage.generate_binary_structure(2, 1)
    regions, _ = ndimage.label(~mask, around)
    border = np.concatenate([regions[..., edge, :].ravel() for edge in (0, -1)])
    border = np.concatenate([border, *(regions[..., edge].ravel() for edge in (0, -1))])
    return np.asarray(mask | ~np.isin(regions, np.unique(border)))


# From pixels and Intensity to network input.


def scaled(pixels: Pixels, intensity: Intensity, _jitter: Jitter = STILL) -> Pixels:
    """(clip((x - low) / (high - low), 0, 1) - 0.5) / 0.25, in [-2, 2]."""
    return _centred(pixels, intensity.low, intensity.high)


def scored(pixels: Pixels, intensity: Intensity, _jitter: Jitter = STILL) -> Pixels:
    """(clip(x, low, high) - mean) / std, at most 8 either way."""
    clipped = np.clip(pixels.astype(np.float32), np.float32(intensity.low), np.float32(intensity.high))
    return np.asarray((clipped - np.float32(intensity.mean)) / np.float32(intensity.std))


IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def as_imagenet(pixels: Pixels, intensity: Intensity, _jitter: Jitter = STILL) -> Pixels:
    """(clip((x - low) / (high - low), 0, 1) - mean) / std, per channel with ImageNet's; grey takes their averages."""
    unit = _unit(pixels, intensity.low, intensity.high)
    if pixels.shape[2:] == IMAGENET_MEAN.shape:
        rows, width = unit.reshape(len(unit), -1), unit.shape[1]  # NumPy is slow over an axis of three
        return ((rows - np.tile(IMAGENET_MEAN, width)) / np.tile(IMAGENET_STD, width)).reshape(unit.shape)
    return np.asarray((unit - IMAGENET_MEAN.mean()) / IMAGENET_STD.mean())


@dataclass(frozen=True)
class Windowed:
    """HU through each of ``windows``: `scaled` between level - width / 2 and level + width / 2, in [-2, 2].

    A window that reaches below -1024 HU begins there: what pads a scan is air. One window keeps the shape; several make
    (H, W, n) of n = slices x windows, all slices of the first window first.
    """

    windows: tuple[Window, ...]

    def __call__(self, pixels: Pixels, intensity: Intensity, jitter: Jitter = STILL) -> Pixels:
        planes = []
        for level, width in self.windows:
            middle, half = level + jitter.level * width, jitter.width * width / 2
            low = max(middle - half, CT_LOW)
            planes.append(_centred(pixels, low, max(middle + half, low + 1)))  # jitter may move all of it below air
        if len(planes) == 1:
            return planes[0]
        return np.concatenate([each[..., None] if each.ndim == 2 else each for each in planes], axis=2)


def _unit(pixels: Pixels, low: float, high: float) -> Pixels:
    unit = (pixels.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.asarray(np.clip(unit, np.float32(0), np.float32(1)))


def _centred(pixels: Pixels, low: float, high: float) -> Pixels:
    return np.asarray((_unit(pixels, low, high) - np.float32(0.5)) / np.float32(0.25))
