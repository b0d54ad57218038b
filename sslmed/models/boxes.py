"""Boxes on the way through a network: overlaps, the GIoU loss, and non-maximum suppression in plain torch.

Boxes are (..., 4): left, top, right, bottom, continuous corners in pixels, so that an area is width times height.
"""

import torch

_BLOCK = 1024  # boxes


def iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each of (..., n, 4) with each of (..., m, 4): (..., n, m) in [0, 1].

    Raises:
        ValueError: a box has no area.
    """
    _check(first, second)
    a, b = first[..., :, None, :], second[..., None, :, :]
    both = intersection(a, b)
    return both / (area(a) + area(b) - both)


def giou_loss(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 - GIoU of each pair of boxes (..., 4): (...) in [0, 2) (Rezatofighi et al., arXiv 1902.09630, algorithm 1).

        GIoU = IoU - (C - U) / C, with U the area of the union and C that of the smallest box around both

    Raises:
        ValueError: a box has no area.
    """
    _check(found, truth)
    both = intersection(found, truth)
    union = area(found) + area(truth) - both
    around = torch.cat([torch.minimum(found, truth)[..., :2], torch.maximum(found, truth)[..., 2:]], dim=-1)
    hull = area(around)
    return 1 - both / union + (hull - union) / hull


def area(boxes: torch.Tensor) -> torch.Tensor:
    """Of (..., 4): (...) in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The area that boxes (..., 4) and (..., 4) have in common."""
    corner = torch.maximum(first[..., :2], second[..., :2])
    opposite = torch.minimum(first[..., 2:], second[..., 2:])
    return (opposite - corner).clamp_min(0).prod(dim=-1)


def nms(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which boxes greedy non-maximum suppression keeps, image by image: (..., n) bool.

    By falling score, a box goes when one of its class that stays has an IoU above ``threshold`` with it; of equal
    scores the first stays. That is the one solution of

        stays(i) = no j before i with stays(j), the same class and IoU(i, j) > threshold

    and is reached by setting all boxes to stay and repeating that line: round k settles the first k boxes at least
    (Zheng et al., arXiv 2005.03572, section 3.3, "Cluster-NMS"). It needs no loop over boxes, and a network that is
    exported takes it along: there all n rounds are made.

    Args:
        boxes: (..., n, 4).
        scores: (..., n).
        classes: (..., n) whole numbers.

    Raises:
        ValueError: a box has no area.
    """
    order = falling(scores)[1]
    ranked = boxes.gather(-2, order[..., None].expand_as(boxes))
    kinds = classes.gather(-1, order)
    rivals = (iou(ranked, ranked) > threshold) & (kinds[..., :, None] == kinds[..., None, :])
    rivals = rivals.tril(-1)  # those before it
    stays = torch.ones_like(scores, dtype=torch.bool)
    for _ in range(boxes.shape[-2]):
        before, stays = stays, ~(rivals & stays[..., None, :]).any(dim=-1)
        if not torch.compiler.is_compiling() and torch.equal(before, stays):
            break
    return torch.zeros_like(stays).scatter(-1, order, stays)


def falling(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (..., n) by falling value, of equal ones the first first, and their numbers.

    A network that is exported ranks by topk: ONNX has no stable sort, but its TopK takes the first of equals.
    """
    if torch.compiler.is_compiling():
        return scores.topk(scores.shape[-1], dim=-1)
    return scores.sort(dim=-1, descending=True, stable=True)


def nms_of_many(boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, threshold: float) -> torch.Tensor:
    """What `nms` says of the boxes (n, 4) of one image, in memory that grows with n and not with its square.

    By falling score, a block of boxes is held against all that stay before it, and then among itself.

    Args:
        boxes: as in `nms`, like all others.
        scores: (n,).
        classes: (n,).
        threshold: of the IoU.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for block in order.split(_BLOCK):
        for before in kept.split(_BLOCK):
            rivals = iou(boxes[block], boxes[before]) > threshold
            rivals &= classes[block][:, None] == classes[before]
            block = block[~rivals.any(dim=1)]
        block = block[nms(boxes[block], scores[block], classes[block], threshold)]
        kept = torch.cat([kept, block])
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, kept, True)


def _check(*several: torch.Tensor) -> None:
    if torch.compiler.is_compiling():  # a check of values cannot be traced
        return
    if not all(bool((boxes[..., 2:] > boxes[..., :2]).all()) for boxes in several):
        raise ValueError("a box has no area, or its corners are reversed or not numbers: left < right and top < bottom")
