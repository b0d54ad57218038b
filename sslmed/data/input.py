"""What a network is given: whole images as tensors, and whether a store's images fit its input."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sslmed.config import DataError, UsageError
from sslmed.data.intensity import Intensity
from sslmed.data.modality import Modality, planes_of, refuse_other_policy
from sslmed.data.scan import Scan
from sslmed.data.store import Store
from sslmed.data.views import Pixels, letterbox, placed
from sslmed.image_size import ImageSize


def network_input(
    pixels: Pixels, intensity: Intensity, modality: Modality, size: ImageSize, channels: int
) -> torch.Tensor:
    """The tensor (C, height, width) of a whole image: letterboxed, then normalised.

    Args:
        pixels: (H, W), (H, W, 3) in colour, or (H, W, n), n neighbouring slices.
    """
    return as_tensor(modality.normalise(letterbox(pixels, size, intensity.low), intensity), channels)


def to_image(scores: torch.Tensor | Pixels, shape: tuple[int, int], size: ImageSize) -> torch.Tensor:
    """Scores (K, h, w) of a network's input to (K, H, W), the image's own pixels: the way back from `network_input`.

    What the letterbox added is cut away; the rest is resized bilinearly with pixel centres at half numbers, as OpenCV
    does it on the way there. Half-precision scores come back as float32.

    Args:
        scores: at the resolution of the input.
        shape: height and width of the image.
        size: of the input.
    """
    given = scores if isinstance(scores, torch.Tensor) else torch.tensor(scores)
    top, left, height, width = placed(shape, size)
    inside = given[:, top : top + height, left : left + width].to(torch.promote_types(given.dtype, torch.float32))
    return torch.nn.functional.interpolate(inside[None], shape, mode="bilinear", align_corners=False)[0]


def as_tensor(view: Pixels, channels: int) -> torch.Tensor:
    """(H, W) or (H, W, n) -> (channels, H, W); a single plane is repeated."""
    planes = view[None] if view.ndim == 2 else view.transpose(2, 0, 1)
    if len(planes) not in (1, channels):
        raise UsageError(f"backbone.in_chans is {channels}, but the store holds {len(planes)}-channel images")
    tensor = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32))
    return tensor.expand(channels, *tensor.shape[1:])


def open_store(path: Path | str) -> Store:
    """The store at ``path``, if its modality's policy is still the one that made it.

    Raises:
        MissingInputError: there is none.
        DataError: it is damaged, or was made by another policy.
    """
    store = Store(path)
    if store.policy:
        refuse_other_policy(store.policy, str(path))
    return store


def check_channels(channels: int, store: Store, modality: Modality, slices: int = 1) -> None:
    """Refuse a network whose input has another number of channels than what the store's images become.

    One plane is repeated for any number of channels.

    Args:
        channels: ``backbone.in_chans``.
        modality: with its windows.

    Raises:
        UsageError: with the number that would do.
    """
    stored = int(store.index.channels.max())
    if slices > 1 and (stored > 1 or int(store.scans.depth.max()) == 1):
        held = "images in colour" if stored > 1 else "single images only"
        raise UsageError(f"data.slices is {slices}, but the store holds {held}, without slices; remove it")
    windows = planes_of(modality)
    planes = stored * slices * windows
    if planes > 1 and channels != planes:
        of = [f"{count} {what}" for count, what in ((slices, "slices"), (windows, "windows")) if count > 1]
        held = f"an image becomes {' x '.join(of)}" if of else f"the store holds {stored} channels"
        raise UsageError(f"backbone.in_chans is {channels}, but {held}; set backbone.in_chans={planes}")


def refuse_colour(scan: Scan, pixels: Pixels, channels: int) -> None:
    """Refuse a scan in colour for a network that has fewer channels than it has colours.

    Raises:
        DataError: it is one.
    """
    if pixels.ndim == (3 if scan.kind == "image" else 4) and channels < pixels.shape[-1]:
        raise DataError(f"is in colour, but the model was trained on {channels}-channel images")


def with_neighbours(scan: Scan, pixels: Pixels, slices: int) -> Iterator[Pixels]:
    """What a network sees of a scan, one after another: an image, or each slice or frame with its neighbours.

    Args:
        slices: how many the network is given; those beyond an end repeat the outermost.
    """
    if scan.kind == "image":
        return iter([pixels if slices == 1 else np.repeat(pixels[..., None], slices, axis=2)])
    around = np.arange(slices) - slices // 2
    places = (np.clip(number + around, 0, len(pixels) - 1) for number in range(len(pixels)))
    return (pixels[place[0]] if slices == 1 else np.moveaxis(pixels[place], 0, -1) for place in places)
