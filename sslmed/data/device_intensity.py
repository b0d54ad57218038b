"""Normalisation and intensity of a whole batch of views at once, on the device where it lies.

Drawn as `sslmed.data.views` draws them, number for number, and computed in its order. Only the noise is another: each
number of it is a function of the view's key and of its place, so that neither the other images of the batch nor the
number of processes changes it.
"""

import math
from collections.abc import Callable
from typing import Generic, NamedTuple

import numpy as np
import torch

from sslmed.config import UsageError
from sslmed.data import intensity as of
from sslmed.data import stain
from sslmed.data.device_geometry import Number, separable
from sslmed.data.intensity import CT_LOW, Normalise, Windowed
from sslmed.data.views import ViewConfig

COLOURS = 3
WORD = 2**32 - 1
_MULTIPLIER, _WEYL, _ROUNDS = 0xD256D193, 0x9E3779B9, 10  # of Philox2x32-10


class Scale(NamedTuple):
    """What the intensities of each image are measured by, (N, 1, 1, 1) each: `intensity.Intensity` of a batch.

    Attributes:
        single: whether an image has one plane only, which is repeated to those of the others.
    """

    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    single: torch.Tensor


class Tone(NamedTuple, Generic[Number]):
    """What happens to the intensities of a view, of `ViewConfig`'s knobs. 0 does nothing, but where 1 is said to.

    Numbers of one view, or tensors (N,) of those of a batch.

    Attributes:
        stain_0 to stain_5: factors of haematoxylin, eosin and DAB, neutral 1, then what is added to each.
        level, width: of the windows, as `intensity.Jitter`; neutral 0 and 1.
        contrast, gamma: neutral 1.
        red, green, blue: neutral 1.
        grey, solarize: 1 where it is done.
        sigma: of the blur; 0 for none.
        noise: its standard deviation.
        low_key, high_key: its key, two words of 32 bits.
    """

    stain_0: Number
    stain_1: Number
    stain_2: Number
    stain_3: Number
    stain_4: Number
    stain_5: Number
    level: Number
    width: Number
    contrast: Number
    brightness: Number
    gamma: Number
    red: Number
    green: Number
    blue: Number
    grey: Number
    sigma: Number
    solarize: Number
    noise: Number
    low_key: Number
    high_key: Number


def draw(config: ViewConfig, coloured: bool, stream: np.random.Generator) -> Tone[float]:
    """The tone that ``sslmed.data.views`` would draw from the same stream, and a key for the noise."""

    def either_way(most: float) -> float:
        return stream.uniform(-most, most)

    hed, shift = [1.0] * COLOURS, [0.0] * COLOURS
    if config.stain and coloured:
        hed = stream.uniform(1 - config.stain, 1 + config.stain, size=COLOURS).tolist()
        shift = stream.uniform(-config.stain, config.stain, size=COLOURS).tolist()
    level, width = (either_way(config.window), 1 + either_way(config.window)) if config.window else (0.0, 1.0)
    contrast, brightness = 1.0, 0.0
    if config.contrast or config.brightness:
        contrast, brightness = 1 + either_way(config.contrast), either_way(config.brightness)
    gamma = math.exp(either_way(config.gamma)) if config.gamma else 1.0
    colours = [1.0] * COLOURS
    if config.colour and coloured:
        colours = stream.uniform(1 - config.colour, 1 + config.colour, size=COLOURS).tolist()
    grey = bool(config.grey and coloured and stream.random() < config.grey)
    sigma = stream.uniform(*config.blur_sigma) if config.blur and stream.random() < config.blur else 0.0
    solarize = bool(config.solarize and stream.random() < config.solarize)
    noise, key = (stream.uniform(0, config.noise), stream.integers(2**32, size=2)) if config.noise else (0.0, (0, 0))
    drawn = (*hed, *shift, level, width, contrast, brightness, gamma, *colours, grey, sigma, solarize, noise, *key)
    return Tone._make(map(float, drawn))


def stained(view: torch.Tensor, scale: Scale, tone: Tone[torch.Tensor]) -> torch.Tensor:
    """`stain.jitter` of views (N, 3, h, w), in stored units; a grey one among them has neutral numbers."""
    span = scale.high - scale.low
    unit = ((view - scale.low) / span).clamp_(0, 1)
    to_hed, to_rgb = (
        torch.as_tensor(matrix, dtype=torch.float32).to(view.device)
        for matrix in (stain.HED_FROM_RGB, stain.RGB_FROM_HED)
    )
    factor, shift = (_apiece(view, *tone[start : start + COLOURS])[..., 0] for start in (0, COLOURS))
    density = to_hed.T @ -torch.log(unit.clamp_(min=stain.DARKEST)).flatten(2)
    light = torch.exp(to_rgb.T @ -(density * factor + shift)).clamp_(0, 1).view_as(view)
    return light * span + scale.low


def normaliser(normalise: Normalise) -> "Callable[[torch.Tensor, Scale, Tone[torch.Tensor]], torch.Tensor]":
    """What does in torch what a modality's ``normalise`` does in NumPy: (views, scale, tone) -> views.

    Raises:
        UsageError: nothing does.
    """
    if isinstance(normalise, Windowed):
        return _Windows(normalise)
    for known, made in ((of.scaled, _scaled), (of.scored, _scored), (of.as_imagenet, _as_imagenet)):
        if normalise is known:
            return made
    name = getattr(normalise, "__name__", type(normalise).__name__)
    raise UsageError(
        f"the normalisation '{name}' is not known on the device; allowed: scaled, scored, as_imagenet and windows. "
        "Augment on the CPU, or add it to sslmed/data/device_intensity.py"
    )


def toned(view: torch.Tensor, scale: Scale, tone: Tone[torch.Tensor], config: ViewConfig) -> torch.Tensor:
    """Contrast, brightness, gamma, colour, grey, blur, solarize, noise of views (N, planes, h, w), normalised.

    Args:
        tone: float64 on the CPU, where the numbers decide what is computed.
    """
    if config.contrast or config.brightness:
        mean = view.mean((1, 2, 3), keepdim=True)
        view = (view - mean) * _apiece(view, tone.contrast) + (mean + _apiece(view, tone.brightness))
    if config.gamma:
        low, high = _ends(view)
        span = torch.where(high > low, high - low, 1)  # a flat view stays as it is
        view = low + (high - low) * ((view - low) / span).pow(_apiece(view, tone.gamma))
    coloured = view.shape[1] == COLOURS
    if config.colour and coloured:
        view = view * _apiece(view, tone.red, tone.green, tone.blue)
    if config.grey and coloured:
        view = torch.where(_apiece(view, tone.grey) > 0, view.mean(1, keepdim=True), view)
    if config.blur:
        view = _blurred(view, tone.sigma)
    if config.solarize:
        low, high = _ends(view)
        inverted = (_apiece(view, tone.solarize) > 0) & (view > (low + high) / 2)
        view = torch.where(inverted, low + high - view, view)
    if config.noise:
        drawn = white_noise(tone.low_key, tone.high_key, view.shape, view.device)
        view = view + _apiece(view, tone.noise) * torch.where(scale.single, drawn[:, :1], drawn)
    return view


def white_noise(
    low_key: torch.Tensor, high_key: torch.Tensor, shape: tuple[int, ...], device: torch.device
) -> torch.Tensor:
    """Standard normal numbers (N, planes, h, w), float32, each a function of its image's key, its plane and its place.

    Philox2x32-10 of a counter (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), then Box and
    Muller's transform (1958). The same on every device but for the last digits of its logarithm, sine and cosine.

    Args:
        low_key, high_key: two words of 32 bits an image (N,), whole numbers.
        shape: of the views.
    """
    count, planes, height, width = shape
    pairs = (height * width + 1) // 2
    key, high = (each.to(torch.int64).to(device)[:, None] for each in (low_key, high_key))
    first, second = philox(torch.arange(planes * pairs, device=device), high, key)
    radius = first.to(torch.float32).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()  # the share is never 0
    angle = second.to(torch.float32).mul_(2 * math.pi * 2.0**-32)
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return both.view(count, planes, 2 * pairs)[..., : height * width].reshape(shape)


def philox(low: torch.Tensor, high: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Philox2x32-10: the two random words of a counter (low, high) under a key; words of 32 bits as int64."""
    for number in range(_ROUNDS):
        product = low * _MULTIPLIER  # of 64 bits: the sign of int64 is one of them, and masked out again
        low = (product >> 32).bitwise_and_(WORD) ^ ((key + number * _WEYL) & WORD) ^ high
        high = product.bitwise_and_(WORD)
    return low, high


def _scaled(view: torch.Tensor, scale: Scale, _tone: Tone[torch.Tensor]) -> torch.Tensor:
    return _centred(view, scale.low, scale.high)


def _scored(view: torch.Tensor, scale: Scale, _tone: Tone[torch.Tensor]) -> torch.Tensor:
    return (view.clamp(scale.low, scale.high) - scale.mean) / scale.std


def _as_imagenet(view: torch.Tensor, scale: Scale, _tone: Tone[torch.Tensor]) -> torch.Tensor:
    unit = ((view - scale.low) / (scale.high - scale.low)).clamp_(0, 1)
    mean, std = (
        torch.where(scale.single, each.mean(), each.view(1, COLOURS, 1, 1))
        for each in (torch.as_tensor(numbers).to(view.device) for numbers in (of.IMAGENET_MEAN, of.IMAGENET_STD))
    )
    if view.shape[1] == 1:
        mean, std = mean[:, :1], std[:, :1]
    return (unit - mean) / std


class _Windows:
    """`intensity.Windowed` of a batch."""

    def __init__(self, windowed: Windowed) -> None:
        self.windows = windowed.windows

    def __call__(self, view: torch.Tensor, scale: Scale, tone: Tone[torch.Tensor]) -> torch.Tensor:
        planes = []
        for level, width in self.windows:
            middle, half = level + tone.level * width, tone.width * width / 2
            low = (middle - half).clamp(min=CT_LOW)
            planes.append(_centred(view, _apiece(view, low), _apiece(view, (middle + half).maximum(low + 1))))
        return torch.cat(planes, dim=1)


def _centred(view: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return ((view - low) / (high - low)).clamp_(0, 1).sub_(0.5).div_(0.25)


def _apiece(view: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
    """One number an image and plane (N, planes, 1, 1), where the views are."""
    return torch.stack(numbers, dim=1).to(view.device, torch.float32)[..., None, None]


def _ends(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value of each view, (N, 1, 1, 1)."""
    return view.amin((1, 2, 3), keepdim=True), view.amax((1, 2, 3), keepdim=True)


def _blurred(view: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """OpenCV's GaussianBlur of float32 of those views whose ``sigma`` is above 0; its radius follows sigma."""
    chosen = torch.nonzero(sigma > 0)[:, 0]
    if not len(chosen):
        return view
    height, width = view.shape[2:]
    down, across = (_gaussian(sigma[chosen], side, view.device) for side in (height, width))
    if len(chosen) == len(view):
        return separable(view, down, across)
    where = chosen.to(view.device)
    return view.index_copy(0, where, separable(view[where], down, across))


def _gaussian(sigma: torch.Tensor, side: int, device: torch.device) -> torch.Tensor:
    """The blur along an axis as a matrix (N, side, side); beyond the edge the image is mirrored at its outermost pixel.

    So pixel j stands also at -j and at 2 (side - 1) + j, and so on, the outermost ones not twice.
    """
    radius = torch.round(8 * sigma + 1).div(2, rounding_mode="floor")  # 4 sigma
    period, most = 2 * (side - 1), int(radius.max())
    row = torch.arange(side, device=device, dtype=torch.float32)[:, None]
    column = row.T
    inside = (column > 0) & (column < side - 1)
    spread, reach = (each.to(device, torch.float32)[:, None, None] for each in (-0.5 / sigma**2, radius))

    def weights(distance: torch.Tensor) -> torch.Tensor:
        return torch.exp(distance.square() * spread) * (distance.abs() <= reach)

    total = torch.zeros(1, device=device)
    wraps = (most + side - 1) // period
    for wrap in range(-wraps, wraps + 1):
        total = total + weights(row - column - period * wrap)
    wraps = most // period
    for wrap in range(-wraps, wraps + 2):
        total = total + inside * weights(row + column - period * wrap)
    return total / total.sum(-1, keepdim=True)
