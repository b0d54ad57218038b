"""From source intensities to a network's input in torch alone, so that an exported file needs no other code.

The same steps as `data.input.network_input`, which `predict` takes: the intensities are measured, the whole image is
letterboxed, then normalised. Sizes of images stay open: everything that depends on them is computed from the image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from sslmed.data import intensity as of
from sslmed.data.device_geometry import separable
from sslmed.data.device_intensity import Scale, Tone, normaliser
from sslmed.data.modality import Modality, planes_of
from sslmed.image_size import ImageSize, sides

BYTES = 255.0  # the greatest value of a photo: files take 8-bit colours
Measure = Callable[[torch.Tensor], torch.Tensor]


class Extent(NamedTuple):
    """Along one axis, float64 numbers: the image's pixels, those of its place in the box, and where that begins."""

    length: torch.Tensor
    inner: torch.Tensor
    start: torch.Tensor


class Prepare(nn.Module):
    """Source images (N, planes, H, W) float32 to the input (N, in_chans, height, width) of a network.

    Planes are what one stored image holds: its channels, or its neighbouring slices.

    Args:
        policy: of the images, with the windows that the network was trained with.
        size: of the input, pixels.
        channels: of the input.
        whole: letterbox the image; else it is a tile of ``size`` already, and its intensities are given.
    """

    def __init__(self, policy: Modality, size: ImageSize, channels: int, whole: bool) -> None:
        super().__init__()
        self.box, self.channels, self.whole = sides(size), channels, whole
        self.measure = measure_of(policy, whole)
        self.normalise = normaliser(policy.normalise)
        self.windows = planes_of(policy)

    @property
    def measured(self) -> bool:
        """Whether ``forward`` measures intensities by itself; else it is given low, high, mean and std (N, 4)."""
        return self.measure is not None

    def forward(self, images: torch.Tensor, intensity: torch.Tensor | None = None) -> torch.Tensor:
        """The network's input."""
        if self.measure is not None:
            intensity = self.measure(images)
        assert intensity is not None  # noqa: S101  # for the reader of types
        if self.whole:
            images = letterboxed(images, self.box, intensity[:, 0])
        low, high, mean, std = (each.view(-1, 1, 1, 1).to(torch.float32) for each in intensity.unbind(1))
        planes = images.shape[1]
        still = Tone(*(torch.zeros_like(intensity[:, 0]) for _ in Tone._fields))
        still = still._replace(width=torch.ones_like(intensity[:, 0]))
        scale = Scale(low, high, mean, std, torch.full_like(low, planes == 1, dtype=torch.bool))
        ready: torch.Tensor = self.normalise(images, scale, still)
        return ready.expand(-1, self.channels, -1, -1) if planes * self.windows == 1 else ready


def measure_of(policy: Modality, whole: bool) -> Measure | None:
    """What measures images (N, planes, H, W) by low, high, mean and std, (N, 4) float64; None where it is given.

    Given are those of MRI, whose measure is the foreground of a whole volume, and those of tiles, where that of the
    whole image counts.
    """
    if policy.intensity is of.hounsfield:
        return lambda images: _between(*(_number(images, end) for end in (of.CT_LOW, of.CT_HIGH)))
    if policy.intensity is of.dtype_range:
        mean, std = BYTES * float(of.IMAGENET_MEAN.mean()), BYTES * float(of.IMAGENET_STD.mean())
        return lambda images: torch.stack([_number(images, each) for each in (0.0, BYTES, mean, std)], dim=1)
    if whole and policy.intensity is of.whole_image:
        return lambda images: _ends_of(images, torch.ones_like(images, dtype=torch.bool))
    if whole and policy.intensity is of.lit:
        return _lit
    return None


def letterboxed(images: torch.Tensor, box: tuple[int, int], fill: torch.Tensor) -> torch.Tensor:
    """The whole images (N, planes, H, W) in a box, aspect kept, the rest ``fill`` (N,): `data.views.letterbox`.

    OpenCV's INTER_AREA where they shrink and INTER_LINEAR where they grow, as products with two matrices. Images of
    whole numbers, as files hold them, are rounded to whole numbers, as OpenCV does.
    """
    rows, columns = placed(images, box)
    shrinks = rows.inner * columns.inner < rows.length * columns.length
    down, across = (
        _weights(extent, side, number, shrinks)
        for extent, side, number in zip((rows, columns), box, _pixels(images), strict=True)
    )
    count = images.shape[0]
    boxed = separable(images, *(each.to(images.dtype).expand(count, -1, -1) for each in (down, across)))
    whole = (images == images.round()).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    halved = (rows.length == 2 * rows.inner) & (columns.length == 2 * columns.inner)
    rounded = torch.where(halved, (boxed + 0.5).floor(), boxed.round())  # of two by two pixels OpenCV rounds a half up
    boxed = torch.where(whole, rounded, boxed)
    inside = (down.sum(1)[:, None] * across.sum(1)[None]) > 0.5  # 1 or 0
    return torch.where(inside, boxed, fill.view(-1, 1, 1, 1).to(boxed.dtype))


def placed(images: torch.Tensor, box: tuple[int, int]) -> tuple[Extent, Extent]:
    """Where the letterbox puts images (N, planes, H, W): down and across; see `data.views.placed`."""
    lengths = [number[-1] + 1 for number in _pixels(images)]
    scale = torch.minimum(box[0] / lengths[0], box[1] / lengths[1])
    inner = [(length * scale).round().clamp_min(1) for length in lengths]
    start = [((side - each) / 2).floor() for side, each in zip(box, inner, strict=True)]
    down, across = (Extent(*each) for each in zip(lengths, inner, start, strict=True))
    return down, across


def unboxed(scores: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Scores (N, K, h, w) of the input on the pixels of the images (N, planes, H, W): `data.input.to_image`."""
    box = (scores.shape[2], scores.shape[3])
    down, across = (
        _linear(extent, side, number)
        for extent, side, number in zip(placed(images, box), box, _pixels(images), strict=True)
    )
    count = scores.shape[0]
    return separable(scores, *(each.to(scores.dtype).expand(count, -1, -1) for each in (down, across)))


def _pixels(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the rows and of the columns: float64, as a step to the next pixel hangs on the last digit."""
    height, width = images.shape[2], images.shape[3]
    down, across = (torch.arange(length, dtype=torch.float64, device=images.device) for length in (height, width))
    return down, across


def _weights(extent: Extent, side: int, pixel: torch.Tensor, shrinks: torch.Tensor) -> torch.Tensor:
    """How much each pixel of the image counts at each of the box, (side, length); rows beside the image are zero."""
    number = torch.arange(side, dtype=torch.float64, device=pixel.device)[:, None] - extent.start
    scale = extent.length / extent.inner
    begin, end = number * scale, ((number + 1) * scale).minimum(extent.length)
    area = (torch.minimum(end, pixel + 1) - torch.maximum(begin, pixel)).clamp_min(0) / scale
    middle = ((number + 0.5) * scale - 0.5).clamp_min(0).minimum(extent.length - 1)
    linear = (1 - (middle - pixel).abs()).clamp_min(0)
    within = (number >= 0) & (number < extent.inner)
    return torch.where(shrinks, area, linear) * within


def _linear(extent: Extent, side: int, pixel: torch.Tensor) -> torch.Tensor:
    """How much each pixel of the box counts at each of the image, (length, side)."""
    number = torch.arange(side, dtype=torch.float64, device=pixel.device) - extent.start
    middle = ((pixel[:, None] + 0.5) * (extent.inner / extent.length) - 0.5).clamp_min(0).minimum(extent.inner - 1)
    return (1 - (middle - number).abs()).clamp_min(0)


# What the intensities are measured by; see `data.intensity` for each.


def _lit(images: torch.Tensor) -> torch.Tensor:
    """`intensity.lit`, which looks at every n-th row and column of a large image."""
    rows, columns = _pixels(images)
    step = ((rows[-1] + 1) * (columns[-1] + 1) / of.MOST_SAMPLES).sqrt().ceil().clamp_min(1)
    on_row, on_column = (torch.remainder(number, step) == 0 for number in (rows, columns))
    sample = (on_row[:, None] & on_column).expand_as(images)
    bright = sample & (images > 0)
    dark = ~bright.flatten(1).any(dim=1).view(-1, 1, 1, 1)
    return _ends_of(images, bright | (sample & dark))


def _ends_of(images: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The percentiles of the chosen pixels, their ends where these meet, and a number beside it where those do."""
    values = torch.where(chosen, images, -math.inf).flatten(1).sort(dim=1).values.to(torch.float64)
    count = chosen.flatten(1).sum(dim=1, keepdim=True)
    first = values.shape[1] - count  # what was not chosen comes before
    low, high = (_percentile(values, first, count, each) for each in of.PERCENTILES)
    least, most = values.gather(1, first)[:, 0], values[:, -1]
    low, high = torch.where(high > low, low, least), torch.where(high > low, high, most)
    return _between(low, torch.where(high > low, high, low + (low.abs() * 1e-6).clamp_min(1)))


def _percentile(values: torch.Tensor, first: torch.Tensor, count: torch.Tensor, percent: float) -> torch.Tensor:
    at = (count - 1).to(values.dtype) * (percent / 100)
    below = at.floor()
    ends = [values.gather(1, (first + each).to(torch.int64))[:, 0] for each in (below, at.ceil())]
    return torch.lerp(ends[0], ends[1], (at - below)[:, 0])


def _between(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.stack([low, high, (low + high) / 2, (high - low) / 4], dim=1)


def _number(images: torch.Tensor, value: float) -> torch.Tensor:
    """It for every image, (N,) float64."""
    return torch.full_like(images[:, 0, 0, 0], value, dtype=torch.float64)
