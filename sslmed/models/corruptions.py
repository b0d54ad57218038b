"""Images made worse in ways that a network can be asked to undo: noise, moved pixels, other grey values.

All for a batch at once, on its device. What is random comes in as numbers of [0, 1) an image, which the caller has
drawn from keyed streams.
"""

import numpy as np
import torch
import torch.nn.functional as F

CURVE = 1000  # values of t that a Bezier curve is computed at
LEVELS = 1024  # grey levels that its values are kept for


def coarse_field(nodes: torch.Tensor, phase: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Fields (N, C, H, W) that are bilinear between coarse ``nodes``, and the same function at any resolution.

    The nodes lie ``H / r`` pixels apart down and ``W / r`` across. A shift by part of that distance moves them about,
    so that no pixel is always one.

    Args:
        nodes: (N, C, r + 2, r + 2): two more than fit into the image, for the shift.
        phase: (N, 2), the shift down and across, in distances between nodes.
    """
    resolution = nodes.shape[-1] - 2
    down, across = (
        _hats((torch.arange(side, device=nodes.device) + 0.5) * resolution / side + phase[:, axis, None], resolution)
        for axis, side in enumerate(size)
    )
    with torch.autocast(nodes.device.type, enabled=False):
        return down[:, None].to(nodes) @ nodes @ across[:, None].to(nodes).mT


def swap_sources(
    order: torch.Tensor, phase: torch.Tensor, size: tuple[int, int], patch: tuple[int, int], swaps: int
) -> torch.Tensor:
    """Where each pixel comes from when pairs of patches change places: (N, H * W), a permutation in each row.

    Patches are cells of a grid that lies at any offset, so that no two overlap.

    Args:
        order: (N, cells), numbers in [0, 1): the first 2 ``swaps`` cells by these are the pairs.
        phase: (N, 2), numbers in [0, 1) that decide the offset down and across.
        swaps: pairs, at most half of the ``swap_cells``.
    """
    (rows, columns), device = swap_cells(size, patch), order.device
    chosen = order.argsort(dim=1, stable=True)
    one, other = chosen[:, :swaps], chosen[:, swaps : 2 * swaps]
    own = torch.arange(rows * columns, device=device).repeat(len(order), 1)
    target = own.scatter(1, one, other).scatter(1, other, one)
    down, across = target // columns - own // columns, target % columns - own % columns
    distance = (down * patch[0] * size[1] + across * patch[1]).view(-1, rows, columns)
    distance = F.pad(distance, (0, 1, 0, 1))  # one more row and column of cells, for pixels outside the grid

    cells = []  # of each row and column of pixels
    for axis, (side, count, long) in enumerate(zip(size, (rows, columns), patch, strict=True)):
        start = (phase[:, axis] * (side - count * long + 1)).long()
        within = torch.arange(side, device=device) - start[:, None]
        cells.append((within // long).masked_fill((within < 0) | (within >= count * long), count))
    cell = cells[0][:, :, None] * (columns + 1) + cells[1][:, None]
    return distance.flatten(1).gather(1, cell.flatten(1)) + torch.arange(size[0] * size[1], device=device)


def swap_cells(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that ``swap_sources`` may swap: as many as fit wherever the grid begins."""
    return max((size[0] - patch[0] + 1) // patch[0], 0), max((size[1] - patch[1] + 1) // patch[1], 0)


def shuffle_sources(
    heights: torch.Tensor, widths: torch.Tensor, noise: torch.Tensor, longest: tuple[int, int]
) -> torch.Tensor:
    """Where each pixel comes from when pixels are mixed within small windows: (N, H * W), a permutation in each row.

    The image is cut into rows of random height and columns of random width; their crossings are the windows.

    Args:
        heights, widths: (N, H) and (N, W), numbers in [0, 1) that decide the sizes, each alike likely.
        noise: (N, H * W), numbers in [0, 1) that decide the order; float64, for they are added to whole numbers.
        longest: the greatest height and width of a window.
    """
    (top, high), (left, wide) = (_strips(each, long) for each, long in zip((heights, widths), longest, strict=True))
    across = widths.shape[1]
    # windows follow one another; within one, pixels do so row by row
    first = (top * across)[:, :, None] + high[:, :, None] * left[:, None]
    y, x = (torch.arange(each.shape[1], device=each.device) - each for each in (top, left))
    rank = (first + y[:, :, None] * wide[:, None] + x[:, None]).flatten(1)
    return _order(first.flatten(1) + noise).gather(1, rank)


def moved(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) whose pixels come from ``sources`` (N, H * W); all channels move together."""
    pixels = images.flatten(2)
    return pixels.gather(2, sources[:, None].expand_as(pixels)).view_as(images)


def tone_curve(points: torch.Tensor, inverted: torch.Tensor) -> torch.Tensor:
    """Cubic Bezier curves from (0, 0) to (1, 1), or inverted from (0, 1) to (1, 0): y (N, LEVELS) at even x.

    Models Genesis (arXiv 1908.06912; reference, utils.py): the control points lie in the unit square, so that x(t) and
    y(t) both ascend, and an inverted curve pairs x(t) with y(1 - t). Never more than rounding outside [0, 1], therefore
    clipped to it.

    Args:
        points: (N, 4), x and y of the first control point, then of the second, in [0, 1].
        inverted: (N,), bool.
    """
    t = torch.linspace(0, 1, CURVE, dtype=points.dtype, device=points.device)
    first, second = 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2
    x, y = ((points[:, at, None] * first + points[:, at + 2, None] * second + t**3).contiguous() for at in (0, 1))
    y = torch.where(inverted[:, None], y.flip(1), y)
    wanted = torch.linspace(0, 1, LEVELS, dtype=x.dtype, device=x.device).repeat(len(x), 1)
    above = torch.searchsorted(x, wanted, right=True).clamp_(1, CURVE - 1)
    low, high = x.gather(1, above - 1), x.gather(1, above)
    share = torch.where(high > low, (wanted - low) / (high - low), 1).clamp_(0, 1)
    return torch.lerp(y.gather(1, above - 1), y.gather(1, above), share).clamp_(0, 1)


def toned(unit: torch.Tensor, curve: torch.Tensor) -> torch.Tensor:
    """Grey values (N, C, H, W) in [0, 1] changed by a ``tone_curve``, which is straight between its levels."""
    place = unit.flatten(1) * (LEVELS - 1)
    below = place.long().clamp_max_(LEVELS - 2)
    curve = curve.to(unit)
    return torch.lerp(curve.gather(1, below), curve.gather(1, below + 1), place - below).view_as(unit)


def unit_range(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images scaled to [0, 1], each by its own least and greatest value, and those (N, 1, 1, 1); flat ones become 0."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return ((images - low) / torch.where(high > low, high - low, 1)).clamp(0, 1), low, high


def ascending(values: torch.Tensor) -> torch.Tensor:
    """The rows of (N, L), sorted. On a CPU by NumPy, which is several times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values


def _order(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=1))
    return values.argsort(dim=1)


def _hats(positions: torch.Tensor, resolution: int) -> torch.Tensor:
    """The weights of the r + 2 nodes at (N, side) positions: (N, side, r + 2)."""
    nodes = torch.arange(resolution + 2, device=positions.device)
    return (1 - (positions[..., None] - nodes).abs()).clamp_min(0)


def _strips(shares: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and length of the strip that each place (N, side) is in; lengths are drawn from 1 to ``longest``."""
    side = shares.shape[1]
    lengths = 1 + (shares * longest).long()
    ends = lengths.cumsum(dim=1)
    places = torch.arange(side, device=shares.device).expand_as(ends).contiguous()
    strip = torch.searchsorted(ends, places, right=True)
    starts = (ends - lengths).gather(1, strip)
    return starts, ends.gather(1, strip).clamp_max(side) - starts
