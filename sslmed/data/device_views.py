"""Augmented views of a whole batch, on the device where its pixels lie, so that the CPU only reads and draws.

The same `ViewConfig` gives the same views as `sslmed.data.views`, number for number from the same keyed streams: same
crops, angles and tones, in the same order, with the same antialiasing. Two things differ: pixels are not rounded to the
stored dtype between the steps, and the noise is drawn otherwise (`device_intensity.white_noise`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sslmed.config import UsageError
from sslmed.data import device_geometry, device_intensity
from sslmed.data.device_geometry import Placement
from sslmed.data.device_intensity import COLOURS, Scale, Tone
from sslmed.data.intensity import Intensity
from sslmed.data.modality import Modality, planes_of
from sslmed.data.views import Pixels, ViewConfig
from sslmed.image_size import ImageSize
from sslmed.keyed_rng import rng

MOST_VALUES = 2**25  # of a part of the batch that is rendered at once: 128 MiB as float32, and a few times that
_GEOMETRY = len(Placement._fields)
_FIELDS = _GEOMETRY + len(Tone._fields)
_STACKED = {np.dtype(name) for name in ("uint8", "int16", "uint16", "int32", "float32")}


@dataclass
class Images:
    """Images as they are stored, of different sizes, in one tensor.

    Attributes:
        pixels: (N, H, W, planes) in the smallest dtype that holds them all; each is padded at the bottom and the right
            to the greatest height and width. A grey image among some in colour has its plane repeated.
        intensity: (N, 4) float32, the low, high, mean and std of each one's scan, in stored units.
        single: (N,) bool, which have one plane only.
    """

    pixels: torch.Tensor
    intensity: torch.Tensor
    single: torch.Tensor

    @classmethod
    def of(cls, images: Sequence[tuple[Pixels, Intensity]]) -> "Images":
        """Images (H, W), (H, W, 3) or (H, W, n), n neighbouring slices, as a store gives them."""
        planes = [pixels.reshape(*pixels.shape[:2], -1) for pixels, _ in images]
        dtype = np.result_type(*(each.dtype for each in planes))
        height, width, depth = (max(each.shape[axis] for each in planes) for axis in range(3))
        canvas = np.zeros((len(planes), height, width, depth), dtype if dtype in _STACKED else np.float32)
        for place, each in zip(canvas, planes, strict=True):
            place[: each.shape[0], : each.shape[1]] = each  # a single plane spreads to all
        intensity = torch.tensor([intensity for _, intensity in images], dtype=torch.float32)
        single = torch.tensor([each.shape[2] == 1 for each in planes])
        return cls(torch.from_numpy(canvas), intensity, single)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Images":
        """The images on ``device``."""
        tensors = (self.pixels, self.intensity, self.single)
        return Images(*(each.to(device, non_blocking=non_blocking) for each in tensors))

    def pin_memory(self) -> "Images":
        """The images where a GPU can fetch them by itself."""
        return Images(self.pixels.pin_memory(), self.intensity.pin_memory(), self.single.pin_memory())

    def part(self, start: int, stop: int) -> "Images":
        """Some of them."""
        return Images(self.pixels[start:stop], self.intensity[start:stop], self.single[start:stop])


class DeviceViews:
    """Draws what happens to each view, one image at a time, and renders the views of a batch.

    Picklable, and light: a few settings, no state.

    Args:
        configs: of each view.
        size: of the input, as `ViewConfig.size` takes it.
        modality: with its windows.
        channels: of the network; a single plane is repeated.

    Raises:
        UsageError: a modality whose normalisation is not known on the device.
    """

    def __init__(self, configs: Sequence[ViewConfig], size: ImageSize, modality: Modality, channels: int) -> None:
        self.configs = tuple(configs)
        self.size = size
        self.channels = channels
        self._windows = planes_of(modality)
        self._normalise = device_intensity.normaliser(modality.normalise)

    def draw(self, shapes: Sequence[tuple[int, ...]], *, seed: int, epoch: int, sample: int) -> npt.NDArray[np.float64]:
        """What happens to each view of a sample in ``epoch``, for `render`: (views, numbers).

        Args:
            shapes: of the image of each view, (H, W) or (H, W, planes).

        Raises:
            UsageError: an image becomes another number of planes than the network has channels.
        """
        drawn = np.empty((len(self.configs), _FIELDS))
        for number, (config, shape) in enumerate(zip(self.configs, shapes, strict=True)):
            planes = (shape[2] if len(shape) > 2 else 1) * self._windows
            if planes not in (1, self.channels):
                raise UsageError(f"backbone.in_chans is {self.channels}, but the store holds {planes}-channel images")
            stream = rng(seed, epoch, sample, f"view{number}")
            geometry = random.Random(int(stream.integers(2**63)))  # noqa: S311
            size = config.size(self.size)
            drawn[number, :_GEOMETRY] = device_geometry.draw(config, size, (shape[0], shape[1]), geometry)
            drawn[number, _GEOMETRY:] = device_intensity.draw(config, shape[2:] == (COLOURS,), stream)
        return drawn

    def render(self, number: int, images: Images, drawn: torch.Tensor) -> torch.Tensor:
        """View ``number`` of every image: (N, channels, h, w) float32, contiguous, on the device of ``images``.

        It is rendered in float32 under autocast too. What a sample becomes does not depend on the others beside it, but
        for the last digits of sums.

        Args:
            drawn: (N, numbers) float64, on the CPU, as `draw` gives them.
        """
        device = images.pixels.device
        at_once = max(1, MOST_VALUES // max(1, images.pixels[0].numel()))
        starts = range(0, len(drawn), at_once)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            parts = [
                self._render(self.configs[number], images.part(start, start + at_once), drawn[start : start + at_once])
                for start in starts
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _render(self, config: ViewConfig, images: Images, drawn: torch.Tensor) -> torch.Tensor:
        placement: Placement[torch.Tensor] = Placement._make(drawn[:, :_GEOMETRY].unbind(1))
        tone: Tone[torch.Tensor] = Tone._make(drawn[:, _GEOMETRY:].unbind(1))
        scale = Scale._make((*images.intensity[..., None, None, None].unbind(1), images.single[:, None, None, None]))
        pixels = images.pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        view = device_geometry.place(pixels, placement, config.size(self.size))
        if config.stain and view.shape[1] == COLOURS:  # before standardisation: densities are logarithms of the light
            view = device_intensity.stained(view, scale, tone)
        view = self._normalise(view, scale, tone)
        view = device_intensity.toned(view, scale, tone, config)
        return view.expand(-1, self.channels, -1, -1).contiguous()
