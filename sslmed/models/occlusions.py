"""What is hidden of images: masks (N, H, W), true where something is, all of a batch at once on its device.

What is random comes in as numbers of [0, 1) an image, which the caller has drawn from keyed streams.
"""

import torch
import torch.nn.functional as F

from sslmed.models.corruptions import ascending, coarse_field

MOST_BLOCKS = 64  # of at least 1/64 of the image each: enough for half of it, though they overlap


def random_pattern(
    nodes: torch.Tensor, phase: torch.Tensor, share: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Blots of any shape that cover a share of each image, exact to the pixel: the lowest places of a coarse field.

    As the random pattern of context encoders (Pathak et al., arXiv 1604.07379, section 3.3; reference
    train_random.lua), which is drawn again until 20 to 30 % are covered.

    Args:
        nodes, phase: see `coarse_field`; one channel.
        share: (N,), of the area.
    """
    field = coarse_field(nodes, phase, size).flatten(1)
    count = (share * field.shape[1]).round().long().clamp(1, field.shape[1])
    level = ascending(field).gather(1, (count - 1)[:, None].to(field.device))
    return (field <= level).view(-1, *size)


def some_blocks(places: torch.Tensor, share: float, size: tuple[int, int]) -> torch.Tensor:
    """Rectangles of an eighth to a quarter of each side, as many as it takes to cover ``share`` of the image.

    The last one covers less than 1/16 of the image more than that.

    Args:
        places: (N, MOST_BLOCKS, 4), as `drawn_rectangles` takes them.
        share: of the area, at most a half.
    """
    height, width = size
    shortest, longest = (max(height // 8, 1), max(width // 8, 1)), (max(height // 4, 1), max(width // 4, 1))
    rows, columns = drawn_rectangles(places, size, shortest, longest, margin=0)
    covered = (rows[..., :, None] & columns[..., None, :]).to(torch.uint8).cummax(dim=1).values
    area = covered.flatten(2).float().mean(dim=2)
    enough = (area < share).sum(dim=1).clamp_max(MOST_BLOCKS - 1)
    return covered[torch.arange(len(places), device=places.device), enough].bool()


def centre(count: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The middle half of each side."""
    mask = torch.zeros(count, *size, dtype=torch.bool, device=device)
    height, width = size
    mask[:, height // 4 : height // 4 + max(height // 2, 1), width // 4 : width // 4 + max(width // 2, 1)] = True
    return mask


def around(mask: torch.Tensor, width: int) -> torch.Tensor:
    """What lies within ``width`` pixels of the mask, along both axes, and not in it."""
    if not width:
        return torch.zeros_like(mask)
    wider = F.max_pool2d(mask[:, None].float(), 2 * width + 1, stride=1, padding=width)[:, 0] > 0
    return wider & ~mask


def drawn_rectangles(
    places: torch.Tensor, size: tuple[int, int], shortest: tuple[int, int], longest: tuple[int, int], margin: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows and columns the rectangles of an image reach: (N, B, H) and (N, B, W).

    Args:
        places: (N, B, 4), numbers in [0, 1): height, top, width, left.
        shortest, longest: limits of height and width, pixels; every whole number is alike likely.
        margin: pixels that stay free at the edges, as far as the rectangle leaves room.
    """
    reached = []
    for axis, side in enumerate(size):
        length, start = places[..., 2 * axis], places[..., 2 * axis + 1]
        long = shortest[axis] + (length * (longest[axis] - shortest[axis] + 1)).long()
        free = (side - long).clamp_min(0)
        edge = (free // 2).clamp_max(margin)
        first = edge + (start * (free - 2 * edge + 1)).long()
        at = torch.arange(side, device=places.device)
        reached.append((at >= first[..., None]) & (at < (first + long)[..., None]))
    return reached[0], reached[1]


def any_of(rows: torch.Tensor, columns: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The union (N, H, W) of those rectangles of `drawn_rectangles` that ``drawn`` (N, B) names."""
    whole = rows & drawn[..., None]
    return (whole[..., :, None] & columns[..., None, :]).any(dim=1)
