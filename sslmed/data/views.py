"""Augmented views of a scan on the CPU: geometry on the stored dtype, then normalisation, then intensity on float32.

albumentations does the geometry. Its 2.0.8 repeats itself across epochs and workers unless every call is reseeded
(measured: 16 of 16 positions identical with two workers), so a pipeline is never called without a keyed stream.
Its intensity transforms clip float32 to [0, 1]; those here are a line or two of NumPy each and clip nothing.
"""

import functools
import math
import os
import random
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from sslmed.config import Config
from sslmed.data import box_moves, stain, tiles
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.intensity import STILL, Intensity, Jitter, Normalise
from sslmed.data.tiles import Along, Mask
from sslmed.image_size import ImageSize, sides
from sslmed.keyed_rng import rng

Pixels = np.ndarray[Any, np.dtype[Any]]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
ALL = slice(None)
MOST_PLANES = 4  # that OpenCV averages at once


class ViewConfig(Config):
    """What may happen to one view. Every default is neutral but the crop; a modality says which knobs are legal.

    Attributes:
        scale: sides of the view over those of the input; a method's, for smaller views beside whole ones.
        crop: least and greatest area of the random crop, as fractions of the image.
        aspect: least and greatest width / height of the crop, relative to that of the input (SimCLR, arXiv
            2002.05709, appendix A, where the input is square): how far the image may be stretched.
        hflip, vflip: probability of mirroring left-right and up-down.
        rot90: probability of a turn by 0, 90, 180 or 270 degrees, each alike.
        rotate: greatest rotation either way, degrees.
        brightness: greatest shift either way, in standard deviations of the normalised image.
        contrast: greatest relative change of contrast either way.
        gamma: greatest |log gamma|; the curve is applied between the view's own minimum and maximum.
        blur: probability of a Gaussian blur.
        blur_sigma: its least and greatest sigma, output pixels.
        solarize: probability of inverting what is above the middle between the view's own minimum and maximum (BYOL,
            arXiv 2006.07733, appendix B; photo only).
        noise: greatest standard deviation of Gaussian noise, normalised units.
        colour: greatest relative change of each colour channel by itself (photo only).
        grey: probability of dropping the colour (photo only).
        stain: strength of the change of haematoxylin, eosin and DAB (histology only; ``sslmed.data.stain``).
        window: greatest shift of a window's level, and greatest change of its width, either way, in units of its own
            width (CT only).
    """

    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop: tuple[float, float] = (0.5, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: Probability = 0.0
    vflip: Probability = 0.0
    rot90: Probability = 0.0
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    brightness: Annotated[float, Field(ge=0, le=4)] = 0.0
    contrast: Strength = 0.0
    gamma: Strength = 0.0
    blur: Probability = 0.0
    blur_sigma: tuple[float, float] = (0.1, 1.0)
    solarize: Probability = 0.0
    stain: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    window: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    noise: Strength = 0.0
    colour: Strength = 0.0
    grey: Probability = 0.0

    def size(self, whole: ImageSize) -> tuple[int, int]:
        """Height and width of the view, pixels, where the input has ``whole``."""
        height, width = sides(whole)
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    @model_validator(mode="after")
    def _ranges_ascend(self) -> "ViewConfig":
        for name, (low, high) in (("crop", self.crop), ("aspect", self.aspect), ("blur_sigma", self.blur_sigma)):
            if not 0 < low <= high:
                raise ValueError(f"{name} is [{low}, {high}]; allowed: two numbers above 0, the smaller first")
        if self.crop[1] > 1:
            raise ValueError(f"crop ends at {self.crop[1]}; allowed: at most 1, the whole image")
        return self


class Augment:
    """Makes the views of one scan.

    Picklable: the albumentations pipelines are built in the process that first uses them.

    Args:
        tile: cut the views from the image as it is, windows of ``size`` pixels anywhere in it, instead of crops that
            are resized; ``crop`` and ``aspect`` are not used.
    """

    def __init__(
        self, configs: Sequence[ViewConfig], size: ImageSize, normalise: Normalise, seed: int, *, tile: bool = False
    ) -> None:
        self.configs = tuple(configs)
        self.size = size
        self.normalise = normalise
        self.seed = seed
        self.tile = tile
        self._geometry: list[Any] | None = None

    def __call__(
        self, pixels: Pixels, intensity: Intensity, *, epoch: int, sample: int, which: slice = ALL
    ) -> list[Pixels]:
        """The views in ``epoch``: float32, each of its `ViewConfig.size`, (h, w) or (h, w, n), normalised.

        Args:
            pixels: (H, W), (H, W, 3) in colour, or (H, W, n), n neighbouring slices.
            intensity: of the scan that they belong to.
            which: of the sample's views, when the others are made of another image.

        Raises:
            DataError: an image that is smaller than a tile.
        """
        return [
            self._view(number, pixels, None, intensity, epoch, sample)[0] for number in range(len(self.configs))[which]
        ]

    def with_mask(
        self, pixels: Pixels, mask: Mask, intensity: Intensity, *, epoch: int, sample: int, which: slice = ALL
    ) -> tuple[list[Pixels], list[Mask]]:
        """The views, and the mask of each, which has moved along: (h, w) uint8, of values that ``mask`` has.

        Without tiles the views are those of a call without a mask; with them some are laid on the foreground
        (`tiles.cut`).

        Args:
            mask: class numbers (H, W), 0 the background, 255 what counts for nothing.
        """
        made = [
            self._view(number, pixels, mask, intensity, epoch, sample) for number in range(len(self.configs))[which]
        ]
        return [view for view, _ in made], [moved for _, moved in made if isinstance(moved, np.ndarray)]

    def with_boxes(
        self, pixels: Pixels, boxes: Boxes, intensity: Intensity, *, epoch: int, sample: int, which: slice = ALL
    ) -> tuple[list[Pixels], list[Boxes]]:
        """The views, and the boxes of each, which have moved along and lie in its pixels (`sslmed.data.box_moves`).

        Without tiles the views are those of a call without boxes; with them some are laid on boxes (`tiles.cut`). Boxes
        of which a view shows too little are left out: `Boxes.within` has the rule.

        Args:
            boxes: of the image as a whole.
        """
        made = [
            self._view(number, pixels, boxes, intensity, epoch, sample) for number in range(len(self.configs))[which]
        ]
        return [view for view, _ in made], [moved for _, moved in made if isinstance(moved, Boxes)]

    def _view(
        self, number: int, pixels: Pixels, along: Along, intensity: Intensity, epoch: int, sample: int
    ) -> tuple[Pixels, Along]:
        if self._geometry is None:
            self._geometry = [_geometry(config, config.size(self.size), self.tile) for config in self.configs]
        config, geometry = self.configs[number], self._geometry[number]
        if self.tile:
            place = rng(self.seed, epoch, sample, f"tile{number}")
            pixels, along = tiles.cut(pixels, along, config.size(self.size), config.rot90, place)
        stream = rng(self.seed, epoch, sample, f"view{number}")
        geometry.set_random_state(stream, random.Random(int(stream.integers(2**63))))  # noqa: S311
        moved = geometry(image=pixels, mask=along) if isinstance(along, np.ndarray) else geometry(image=pixels)
        if isinstance(along, np.ndarray):
            along = np.ascontiguousarray(moved["mask"])
        elif along is not None:
            along = box_moves.follow(along, geometry.transforms)
        view = moved["image"]
        if config.stain and view.ndim == 3:  # before standardisation: densities are logarithms of the light
            low, span = intensity.low, intensity.high - intensity.low
            unit = np.clip((view.astype(np.float32) - low) / span, 0, 1)
            view = stain.jitter(unit, config.stain, stream) * span + low
        view = _normalised(view, intensity, self.normalise, _jitter(config, stream))
        return _intensity(view, config, stream), along

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_geometry": None}


def letterbox(pixels: Pixels, size: ImageSize, fill: float) -> Pixels:
    """The whole image (H, W) or (H, W, n) in a box of ``size`` pixels: aspect kept, nothing cut off, the rest ``fill``.

    Pixels that hold whole numbers are filled with the next one below, so that no ``low`` ends above itself.
    """
    top, left, new_height, new_width = placed(pixels.shape[:2], size)
    smaller = new_height * new_width < pixels.shape[0] * pixels.shape[1]
    resized = _resize(pixels, (new_height, new_width), averaged=smaller)
    if pixels.dtype.kind in "ui":
        limits = np.iinfo(pixels.dtype)
        fill = min(max(math.floor(fill), limits.min), limits.max)
    canvas = np.full((*sides(size), *pixels.shape[2:]), fill, dtype=pixels.dtype)
    canvas[top : top + new_height, left : left + new_width] = resized
    return canvas


def placed(shape: tuple[int, ...], size: ImageSize) -> tuple[int, int, int, int]:
    """Where `letterbox` puts an image of (height, width): top, left, height and width inside the box."""
    height, width = shape
    box_height, box_width = sides(size)
    scale = min(box_height / height, box_width / width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    return (box_height - new_height) // 2, (box_width - new_width) // 2, new_height, new_width


def shrink(pixels: Pixels, size: int) -> Pixels:
    """The image with its shorter side at most ``size`` pixels, by area averaging; a smaller one as it is."""
    height, width = pixels.shape[:2]
    scale = size / min(height, width)
    if scale >= 1:
        return pixels
    return _resize(pixels, (max(size, round(height * scale)), max(size, round(width * scale))), averaged=True)


def _resize(pixels: Pixels, shape: tuple[int, int], averaged: bool) -> Pixels:
    """(H, W) or (H, W, n) to (height, width): over areas, or linearly between pixels."""
    parts = [pixels]
    if pixels.ndim == 3:
        parts = [pixels[..., start : start + MOST_PLANES] for start in range(0, pixels.shape[2], MOST_PLANES)]
    made = [_resize_planes(part, shape, averaged) for part in parts]
    if len(made) == 1:
        return np.asarray(made[0].reshape(*shape, *pixels.shape[2:]))  # a single plane has lost its axis
    return np.concatenate([part.reshape(*shape, -1) for part in made], axis=2)


def _resize_planes(pixels: Pixels, shape: tuple[int, int], averaged: bool) -> Pixels:
    cv2 = _cv2()
    (height, width), (new_height, new_width) = pixels.shape[:2], shape
    method = cv2.INTER_AREA if averaged else cv2.INTER_LINEAR
    smaller = height > new_height and width > new_width and (height % new_height or width % new_width)
    if averaged and smaller and pixels.dtype == np.uint8 and pixels.shape[2:] == (3,):
        # OpenCV averages colours in float32 either way, and to whole numbers itself takes it half as long again
        return np.asarray(cv2.convertScaleAbs(cv2.resize(pixels.astype(np.float32), shape[::-1], interpolation=method)))
    return np.asarray(cv2.resize(pixels, shape[::-1], interpolation=method))


def _normalised(pixels: Pixels, intensity: Intensity, normalise: Normalise, jitter: Jitter) -> Pixels:
    """``normalise(pixels)``; bytes are looked up among what it makes of all 256, where a plane becomes a plane."""
    planes = pixels.shape[2:]
    if pixels.dtype == np.uint8 and (table := _table(normalise, intensity, jitter, planes)).shape[2:] == planes:
        return np.asarray(_cv2().LUT(pixels, table).reshape(pixels.shape))  # a single plane loses its axis
    return normalise(pixels, intensity, jitter)


@functools.lru_cache(maxsize=64)  # photos are all measured alike
def _table(normalise: Normalise, intensity: Intensity, jitter: Jitter, planes: tuple[int, ...]) -> Pixels:
    """What becomes of each byte, (1, 256) or (1, 256, n)."""
    values = np.arange(256, dtype=np.uint8).reshape(1, 256, *[1] * len(planes))
    return normalise(np.broadcast_to(values, (1, 256, *planes)), intensity, jitter)


def _jitter(config: ViewConfig, stream: np.random.Generator) -> Jitter:
    if not config.window:
        return STILL
    return Jitter(stream.uniform(-config.window, config.window), 1 + stream.uniform(-config.window, config.window))


def _geometry(config: ViewConfig, size: ImageSize, tile: bool) -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else the import asks the network for a newer version
    import albumentations

    class Crop(albumentations.RandomResizedCrop):  # type: ignore[misc]  # it has no types
        def apply(self, img: Pixels, crop_coords: tuple[int, int, int, int], **_: Any) -> Pixels:
            left, top, right, bottom = crop_coords
            crop = img[top:bottom, left:right]
            return _resize(crop, (height, width), averaged=crop.shape[0] > height or crop.shape[1] > width)

    cv2 = _cv2()
    height, width = sides(size)
    aspect = tuple(ratio * (width / height) for ratio in config.aspect)
    steps: list[Any] = []
    if not tile:
        crop = Crop(
            (height, width),
            scale=config.crop,
            ratio=aspect,
            mask_interpolation=cv2.INTER_NEAREST_EXACT,  # plain INTER_NEAREST reads half a pixel off the image's place
            p=1,
        )
        steps.append(crop)
    if config.rotate:  # after the crop, where it costs least; reflected, because black corners would tell the angle
        steps.append(albumentations.Rotate(config.rotate, border_mode=cv2.BORDER_REFLECT_101, p=1))
    if config.hflip:
        steps.append(albumentations.HorizontalFlip(p=config.hflip))
    if config.vflip:
        steps.append(albumentations.VerticalFlip(p=config.vflip))
    if config.rot90 and not tile:  # a view that is not square would not fit after a quarter turn: there it comes first
        steps.insert(len(steps) if height == width else 0, albumentations.RandomRotate90(p=config.rot90))
    return albumentations.Compose(steps)


def _intensity(view: Pixels, config: ViewConfig, stream: np.random.Generator) -> Pixels:
    """Contrast, brightness, gamma, colour, grey, blur, solarize, noise. Draws only for knobs that are set."""
    if config.contrast or config.brightness:
        factor = 1 + stream.uniform(-config.contrast, config.contrast)
        shift = view.mean() * (1 - factor) + stream.uniform(-config.brightness, config.brightness)
        view = _cv2().addWeighted(view, factor, view, 0, shift).reshape(view.shape)
    if config.gamma:
        view = _gamma(view, math.exp(stream.uniform(-config.gamma, config.gamma)))
    if config.colour and view.ndim == 3:
        factors = stream.uniform(1 - config.colour, 1 + config.colour, size=view.shape[2])
        view = _mixed(view, np.diag(factors))
    if config.grey and view.ndim == 3 and stream.random() < config.grey:
        view = _mixed(view, np.full((view.shape[2], view.shape[2]), 1 / view.shape[2]))
    if config.blur and stream.random() < config.blur:
        view = _cv2().GaussianBlur(view, (0, 0), stream.uniform(*config.blur_sigma))
    if config.solarize and stream.random() < config.solarize:
        view = _solarize(view)
    if config.noise:
        sigma = stream.uniform(0, config.noise)
        view = view + np.float32(sigma) * stream.standard_normal(view.shape, dtype=np.float32)
    return np.ascontiguousarray(view, dtype=np.float32)


def _mixed(view: Pixels, weights: Pixels) -> Pixels:
    """Each plane of (h, w, n) as a sum of all of them, by a row of ``weights`` (n, n): far faster than NumPy's."""
    return np.asarray(_cv2().transform(view, weights).reshape(view.shape))  # a single plane loses its axis


def _gamma(view: Pixels, gamma: float) -> Pixels:
    low, high = view.min(), view.max()
    if high <= low:
        return view
    unit = (view - low) / (high - low)
    return np.asarray(low + (high - low) * unit**gamma, dtype=np.float32)


def _solarize(view: Pixels) -> Pixels:
    """x -> low + high - x above the middle of the view's own range: BYOL's 1 - x from 0.5 on, for any scale."""
    low, high = view.min(), view.max()
    return np.where(view > (low + high) / 2, low + high - view, view)


def _cv2() -> Any:
    import cv2

    cv2.setNumThreads(0)  # a thread pool in every DataLoader worker would fight for the cores, and hang after a fork
    return cv2
