"""Heat maps: which places of an image a score rests on (Grad-CAM), and pictures of them, of label maps and of boxes."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from sslmed.config import UsageError
from sslmed.evaluation.probes import evaluating
from sslmed.models.backbones import Backbone

Array = npt.NDArray[Any]
Score = Callable[[torch.Tensor], torch.Tensor]

# Colours that differ for colour-blind readers too (Okabe & Ito, 2008); label 1 has the first, and they repeat.
LABEL_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
_HEAT_COLOURS = ((80, 0, 100), (220, 40, 40), (255, 170, 0), (255, 255, 160))  # at evenly spaced heats from 0 to 1
_HEAT_OPACITY = 0.6
_FILL_OPACITY = 0.25
_LINE = 1 / 300  # of an image's longer side: how wide outlines are, and a dot of a letter

# Letters of 3 x 5 dots: of each row from the top an octal digit, whose bits are the dots from left to right.
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-_+/:()%? "
_DOTS = (
    "257556565634443655567464774644345535575572227111525565544447577556555525552656442557365655"
    "342167222255557555225577555255552227124725552262276124761216557117461634757712227575775716"
    "000020002400700000070272011244020202444221112512456120200000"
)


def heat_maps(backbone: Backbone, score: Score, images: torch.Tensor) -> torch.Tensor:
    """Where a feature map is high and raises the score: Grad-CAM (Selvaraju et al., arXiv 1610.02391, eq. 1 and 2).

        L = ReLU(sum over k of dY/dA_k * A_k), place by place

    A is the last map before pooling. Where a mean pools it, dY/dA_k is the same everywhere, and L is that of the paper,
    which takes the mean of dY/dA_k over places first. A class token depends on no patch that leaves the last block:
    then A are the patches as they enter that block's attention. There dY/dA_k differs, as the token attends to few of
    them, and a mean would forget to which (HiResCAM: Draelos & Carin, arXiv 2011.08891). What the token gathered in
    earlier blocks is not shown: where maps matter, a transformer that pools by the mean is the better choice.

    Weights, gradients and training flags are as they were afterwards; no parameter needs a gradient.

    Args:
        backbone: runs in evaluation mode and in its own precision.
        score: from pooled features (N, D) to the number Y to be explained, (N,), such as a class's logit.
        images: (N, C, H, W), where the backbone is.

    Returns:
        (N, H, W), float32: L, enlarged by bilinear interpolation, over its largest value in each image; zero where L
        is zero everywhere.

    Raises:
        UsageError: the network's places cannot be told apart before pooling.
    """
    full_precision = torch.autocast(images.device.type, enabled=False)
    with evaluating(backbone), torch.inference_mode(False), torch.no_grad(), full_precision:
        found, gradient = _map_and_gradient(cast(Any, backbone.network), score, images)
        heat = F.relu((gradient * found).sum(dim=1, keepdim=True)).float()
        heat = F.interpolate(heat, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        largest = heat.amax(dim=(1, 2), keepdim=True)
        return torch.where(largest > 0, heat / largest, torch.zeros_like(heat))


def overlay_heat(pixels: Array, heat: Array) -> npt.NDArray[np.uint8]:
    """An RGB picture (H, W, 3) of an image with its heat over it; without heat the image is as it was.

    Args:
        pixels: (H, W) or (H, W, 3), in [0, 1].
        heat: (H, W), in [0, 1].
    """
    rgb, heat = _rgb(pixels, heat), np.clip(heat, 0.0, 1.0).astype(np.float64)
    places = np.linspace(0.0, 1.0, len(_HEAT_COLOURS))
    colour = np.stack([np.interp(heat, places, channel) for channel in zip(*_HEAT_COLOURS, strict=True)], axis=-1)
    opacity = _HEAT_OPACITY * heat[..., None]
    return _bytes((1 - opacity) * rgb + opacity * colour)


def overlay_labels(pixels: Array, labels: Array) -> npt.NDArray[np.uint8]:
    """An RGB picture (H, W, 3) of an image with labels outlined and lightly filled.

    Args:
        pixels: (H, W) or (H, W, 3), in [0, 1].
        labels: (H, W), integers; 0 and 255 stay without colour.
    """
    rgb = _rgb(pixels, labels)
    shown = (labels > 0) & (labels != 255)
    colour = np.array(LABEL_COLOURS, np.float64)[(labels.astype(np.int64) - 1) % len(LABEL_COLOURS)]
    opacity = np.where(_outline(labels), 1.0, _FILL_OPACITY)[..., None] * shown[..., None]
    return _bytes((1 - opacity) * rgb + opacity * colour)


def overlay_boxes(pixels: Array, xyxy: Array, classes: Array, words: Sequence[str] = ()) -> npt.NDArray[np.uint8]:
    """An RGB picture (H, W, 3) of an image with outlines of boxes, the first on top; class 0 has the first colour.

    Outlines lie inside their boxes, corners rounded to whole pixels, and are a three-hundredth of the longer side wide.

    Args:
        pixels: (H, W) or (H, W, 3), in [0, 1].
        xyxy: (n, 4), left, top, right, bottom in pixels.
        classes: (n,) class numbers.
        words: of each box what is written beside it; letters are capitals, what has no letter here is a question mark.
    """
    picture = _bytes(_rgb(pixels, pixels if pixels.ndim == 2 else pixels[..., 0]))
    width = max(1, round(_LINE * max(picture.shape[:2])))
    colours = np.array(LABEL_COLOURS, np.uint8)[np.asarray(classes, np.int64) % len(LABEL_COLOURS)]
    limits = np.array(picture.shape[1::-1] * 2)
    corners = np.clip(np.rint(xyxy), 0, limits).astype(np.int64).reshape(-1, 4)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1)
    for (left, top, right, bottom), colour in zip(corners[::-1].tolist(), colours[::-1], strict=True):
        inside = picture[top + width : bottom - width, left + width : right - width].copy()
        picture[top:bottom, left:right] = colour
        picture[top + width : bottom - width, left + width : right - width] = inside
    for box, colour, text in reversed(list(zip(corners, colours, words, strict=False))):
        _write(picture, text, box, colour, width)
    return picture


def _write(picture: Array, text: str, box: Array, colour: Array, dot: int) -> None:
    """A line of text on black above a box; where there is no room, below it, or else in its upper edge."""
    known = [letter if letter in _LETTERS else "?" for letter in text.upper()]
    dots = np.zeros((7, 4 * len(known) + 1), bool)
    for number, letter in enumerate(known):
        rows = _DOTS[5 * _LETTERS.index(letter) :][:5]
        dots[1:6, 4 * number + 1 : 4 * number + 4] = [[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in rows]
    strip = np.kron(dots, np.ones((dot, dot), bool))[..., None] * colour
    left, top, _, bottom = box.tolist()
    left = max(0, min(left, picture.shape[1] - strip.shape[1]))
    if top >= len(strip):
        top -= len(strip)
    elif bottom + len(strip) <= len(picture):
        top = bottom
    room = picture[top : top + len(strip), left : left + strip.shape[1]]
    room[:] = strip[: room.shape[0], : room.shape[1]]


def _map_and_gradient(network: Any, score: Score, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A and dY / dA, both (N, K, h, w)."""
    if hasattr(network, "blocks") and getattr(network, "global_pool", None) == "token":
        found, gradient = _before_attention(network, score, images)
    elif hasattr(network, "forward_features") and hasattr(network, "forward_head"):
        found = network.forward_features(images).clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(network.forward_head(found)).sum(), found)
    else:
        raise _no_map(network)
    return _places(network, found.detach(), images), _places(network, gradient, images)


def _before_attention(network: Any, score: Score, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (N, L, K) as they enter the last block's attention, and dY / d tokens."""
    taken: list[torch.Tensor] = []

    def take(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(given[0].clone().requires_grad_())
        torch.set_grad_enabled(True)  # from here on: the blocks before need not remember anything
        return taken[-1], *given[1:]

    last = network.blocks[-1]
    hook = getattr(last, "attn", last).register_forward_pre_hook(take)
    try:
        with torch.no_grad():
            (gradient,) = torch.autograd.grad(score(network(images)).sum(), taken[0])
    finally:
        hook.remove()
    return taken[0], gradient


def _places(network: Any, values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """(N, K, h, w) of a map or of tokens, class token and registers left out."""
    if values.ndim == 4:
        return values.movedim(-1, 1) if getattr(network, "output_fmt", "NCHW") == "NHWC" else values  # timm's Swin
    grid = getattr(getattr(network, "patch_embed", None), "dynamic_feat_size", None)
    rows, columns = grid(images.shape[-2:]) if grid else (0, 0)
    patches = values[:, getattr(network, "num_prefix_tokens", 0) :]
    if patches.ndim != 3 or patches.shape[1] != rows * columns:
        raise _no_map(network)
    in_place: torch.Tensor = patches.unflatten(1, (rows, columns))
    return in_place.movedim(-1, 1)


def _no_map(network: nn.Module) -> UsageError:
    return UsageError(
        f"no heat maps of {type(network).__name__}: it has no map of places before it pools them; allowed are timm's "
        "convolutional networks, Swin, VisionTransformer and Eva"
    )


def _rgb(pixels: Array, over: Array) -> npt.NDArray[np.float64]:
    """(H, W, 3) in [0, 255]."""
    if pixels.shape[:2] != over.shape or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)):
        raise ValueError(f"pixels (H, W) or (H, W, 3) and what lies over them (H, W), not {pixels.shape}, {over.shape}")
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return np.clip(rgb.astype(np.float64), 0.0, 1.0) * 255


def _outline(labels: Array) -> npt.NDArray[np.bool_]:
    """Pixels of which a neighbour above, below, left or right has another label, or lies outside."""
    inside = np.ones(labels.shape, bool)
    framed = np.pad(labels.astype(np.int64), 1, constant_values=-1)
    for neighbour in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        inside &= neighbour == labels
    return ~inside


def _bytes(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    return np.rint(rgb).astype(np.uint8)
