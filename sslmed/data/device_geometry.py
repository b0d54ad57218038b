"""Crops, mirror images, quarter turns and rotations of a whole batch at once, on the device where it lies.

Drawn as `sslmed.data.views` draws them, number for number, and computed as OpenCV computes them, but in float32
without the rounding to the stored dtype. A crop that is resized is linear along each axis, so it is one matrix for the
rows and one for the columns of each image: two batched products, whatever the sizes.
"""

import math
import random
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from sslmed.data.views import ViewConfig
from sslmed.image_size import ImageSize, sides

ATTEMPTS = 10  # at a crop that fits into the image, before the largest one in its middle is taken
Number = TypeVar("Number", float, torch.Tensor)
Intervals = tuple[torch.Tensor, torch.Tensor]  # begin and end


class Placement(NamedTuple, Generic[Number]):
    """How a view lies in its image: what is cut out, resized, mirrored, transposed, then rotated.

    Numbers of one view, or tensors (N,) of those of a batch.

    Attributes:
        top, left, height, width: of the crop, pixels of the stored image.
        before_rows, before_columns: 1 where those of the crop are reversed before it is resized, which OpenCV does not
            always do symmetrically.
        rows, columns: 1 where those of the resized crop are reversed.
        transposed: 1 where rows become columns.
        angle: radians, counter-clockwise as seen.
    """

    top: Number
    left: Number
    height: Number
    width: Number
    before_rows: Number
    before_columns: Number
    rows: Number
    columns: Number
    transposed: Number
    angle: Number


def draw(config: ViewConfig, size: ImageSize, shape: tuple[int, int], stream: random.Random) -> Placement[float]:
    """The placement that ``sslmed.data.views`` would draw from the same stream.

    Args:
        size: of the view.
        shape: height and width of the stored image.
    """
    height, width = sides(size)
    stream.random()  # whether the pipeline runs at all, which albumentations asks too
    first = _turns(config, stream) if height != width else 0  # a view that is not square fits before the crop only
    box = _box(config, (height, width), shape[::-1] if first % 2 else shape, stream)
    angle = math.radians(stream.uniform(-config.rotate, config.rotate)) if config.rotate else 0.0
    across, down = _happens(config.hflip, stream), _happens(config.vflip, stream)
    last = _turns(config, stream) if height == width else 0
    if across != down:
        angle = -angle  # there it precedes the mirror, here it comes after it
    if first:
        box = _turned_back(box, shape, first)
    if first % 2:
        across, down = down, across
    rows, columns = down != (last in (2, 3)), across != (last in (1, 2))
    order = (first in (2, 3), first in (1, 2), rows, columns, (first + last) % 2)
    return Placement._make(map(float, (*box, *order, angle)))


def place(pixels: torch.Tensor, placement: Placement[torch.Tensor], size: ImageSize) -> torch.Tensor:
    """The views (N, planes, h, w) of images (N, planes, H, W), float32; images may be padded at bottom and right.

    Args:
        placement: float64 on the CPU, where the numbers decide what is computed.
    """
    height, width = sides(size)
    turned = placement.transposed > 0
    if not turned.any():
        made = _crop(pixels, placement, (height, width))
    else:
        made = pixels.new_empty((*pixels.shape[:2], height, width))
        for chosen in (torch.nonzero(~turned)[:, 0], torch.nonzero(turned)[:, 0]):
            some: Placement[torch.Tensor] = Placement._make(numbers[chosen] for numbers in placement)
            where = chosen.to(pixels.device)
            if turned[chosen].any():
                made[where] = _crop(pixels[where], some, (width, height)).mT
            elif len(chosen):
                made[where] = _crop(pixels[where], some, (height, width))
    if torch.any(placement.angle != 0):
        return _rotate(made, placement.angle.to(pixels.device, torch.float32))
    return made


def separable(pixels: torch.Tensor, down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """down @ x @ across^T of every plane x: (N, planes, H, W), (N, h, H) and (N, w, W) -> (N, planes, h, w)."""
    count, planes, height, width = pixels.shape
    narrow = torch.bmm(pixels.reshape(count, planes * height, width), across.mT)
    beside = narrow.view(count, planes, height, -1).transpose(1, 2).reshape(count, height, -1)
    return torch.bmm(down, beside).view(count, down.shape[1], planes, -1).transpose(1, 2)


def _happens(probability: float, stream: random.Random) -> bool:
    """Draws only where both may happen, as albumentations does."""
    return probability >= 1 or (probability > 0 and stream.random() < probability)


def _turns(config: ViewConfig, stream: random.Random) -> int:
    return stream.randint(0, 3) if _happens(config.rot90, stream) else 0


def _box(
    config: ViewConfig, size: tuple[int, int], shape: tuple[int, int], stream: random.Random
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop: area uniform, logarithm of the aspect uniform, place uniform."""
    whole_height, whole_width = shape
    low, high = (ratio * (size[1] / size[0]) for ratio in config.aspect)
    areas = [share * (whole_height * whole_width) for share in config.crop]
    for _ in range(ATTEMPTS):
        area = stream.uniform(*areas)
        aspect = math.exp(stream.uniform(math.log(low), math.log(high)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= whole_width and 0 < height <= whole_height:
            top = int((whole_height - height + 1) * stream.random())
            return top, int((whole_width - width + 1) * stream.random()), height, width
    aspect = min(max(whole_width / whole_height, low), high)
    width, height = min(whole_width, round(whole_height * aspect)), min(whole_height, round(whole_width / aspect))
    return (whole_height - height) // 2, (whole_width - width) // 2, height, width


def _turned_back(box: tuple[int, int, int, int], shape: tuple[int, int], turns: int) -> tuple[int, int, int, int]:
    """Of a box in the image after ``turns`` quarter turns counter-clockwise, its place in the image before them."""
    top, left, height, width = box
    if turns == 1:
        return left, shape[1] - top - height, width, height
    if turns == 2:
        return shape[0] - top - height, shape[1] - left - width, height, width
    return shape[0] - left - width, top, width, height


def _crop(pixels: torch.Tensor, placement: Placement[torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    down, across = placement.height / shape[0], placement.width / shape[1]
    shrinks = (placement.height > shape[0]) | (placement.width > shape[1])
    averages = (down >= 1) & (across >= 1)
    rows = _intervals(placement.height, shape[0], shrinks, averages)
    columns = _intervals(placement.width, shape[1], shrinks, averages)
    rows = _mirrored(rows, placement.height, placement.before_rows, placement.rows)
    columns = _mirrored(columns, placement.width, placement.before_columns, placement.columns)
    return separable(
        pixels,
        _matrix(rows, placement.top, pixels.shape[2], pixels.device),
        _matrix(columns, placement.left, pixels.shape[3], pixels.device),
    )


def _intervals(extent: torch.Tensor, count: int, shrinks: torch.Tensor, averages: torch.Tensor) -> Intervals:
    """What part of its crop each output pixel is the average of: begin and end (N, count), where pixel j is [j, j + 1].

    Linear interpolation between the pixels j and j + 1, at the share t, is the average over [j + t, j + 1 + t]. So one
    form serves OpenCV's INTER_AREA of what shrinks along both axes, its INTER_LINEAR of what shrinks along none, and
    what INTER_AREA does of what shrinks along one: linear along both, the pixel's left end for its middle.

    Args:
        extent: of the crop (N,), pixels, float64: a step to the next pixel hangs on the last digit.
    """
    zoom = torch.full_like(extent, count)[:, None] / extent[:, None]  # `count / extent` would round twice
    scale = 1 / zoom
    number = torch.arange(count, dtype=extent.dtype)
    linear = (number + 0.5) * scale - 0.5
    whole = torch.floor(number * scale)
    share = ((number + 1) - (whole + 1) * zoom).to(torch.float32)  # what is all but 1 becomes 1, and then 0, there too
    one_axis = whole + torch.where(share <= 0, 0, share - torch.floor(share))
    centre = torch.where(shrinks[:, None], one_axis, linear).clamp(min=0).minimum(extent[:, None] - 1)
    begin = torch.where(averages[:, None], number * scale, centre)
    return begin, torch.where(averages[:, None], ((number + 1) * scale).minimum(extent[:, None]), centre + 1)


def _mirrored(intervals: Intervals, extent: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Intervals:
    begin, end = intervals
    swap = before[:, None] > 0
    begin, end = torch.where(swap, extent[:, None] - end, begin), torch.where(swap, extent[:, None] - begin, end)
    reverse = after[:, None] > 0
    return torch.where(reverse, begin.flip(1), begin), torch.where(reverse, end.flip(1), end)


def _matrix(intervals: Intervals, start: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """The averages over ``intervals`` as a matrix (N, count, length) on ``device``; ``start`` is where the crop is."""
    begin, end = ((each + start[:, None]).to(device, torch.float32)[..., None] for each in intervals)
    pixel = torch.arange(length, device=device, dtype=torch.float32)
    upto_end, upto_begin = (end - pixel).clamp_(0, 1), (begin - pixel).clamp_(0, 1)
    return upto_end.sub_(upto_begin).div_(end - begin)  # of what is rounded alike: the weights of a pixel add up to 1


def _rotate(views: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """About the middle, bilinear; beyond the edge the image is mirrored at its outermost pixels."""
    height, width = views.shape[2:]
    down = torch.arange(height, device=views.device, dtype=torch.float32)[:, None] - (height - 1) / 2
    across = torch.arange(width, device=views.device, dtype=torch.float32) - (width - 1) / 2
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    grid = torch.stack(
        [(cos * across - sin * down) / ((width - 1) / 2), (sin * across + cos * down) / ((height - 1) / 2)], dim=-1
    )
    return F.grid_sample(views, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
