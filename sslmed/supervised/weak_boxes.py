"""Boxes from class labels alone: around the parts of an image that speak for a class."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MOST = 20  # parts of a class in an image

Floats = npt.NDArray[np.float32]


def names_of(classes: Sequence[str], target: str) -> tuple[str, ...]:
    """What boxes of the classes are called: those of a 0/1 column by its name, others by their own."""
    return ("0", target) if tuple(classes) == ("0", "1") else tuple(classes)


def boxes_around(heat: Floats, chances: npt.NDArray[np.float64], located: Sequence[int], share: float) -> Floats:
    """Boxes (n, 6), left, top, right, bottom in pixels of the map, score, class; by falling score.

    A box lies around each connected part (8 neighbours) in which the heat of a class is at least ``share`` of the
    way from its least to its greatest value in the image (Zhou et al., arXiv 1512.04150, section 3.1, which takes the
    largest part at a fifth of the greatest value). Its score is the image's probability of the class times how far up
    that way the part's own greatest value is: a part is no likelier than the class.

    Args:
        heat: (K, H, W), how much each place speaks for each class.
        chances: (K,) probabilities.
        located: class numbers to be looked for.
    """
    from scipy import ndimage

    found: list[tuple[float, ...]] = []
    for label in located:
        low, high = float(heat[label].min()), float(heat[label].max())
        if not high > low:  # no place speaks for it more than another
            continue
        height = (heat[label] - low) / (high - low)
        parts, count = ndimage.label(height >= share, structure=np.ones((3, 3)))
        peaks = ndimage.maximum(height, parts, np.arange(1, count + 1))
        own = [
            (across.start, down.start, across.stop, down.stop, float(chances[label]) * float(peak), label)
            for (down, across), peak in zip(ndimage.find_objects(parts), peaks, strict=True)
        ]
        found += sorted(own, key=lambda each: -each[4])[:MOST]
    return np.array(sorted(found, key=lambda each: -each[4]), np.float32).reshape(-1, 6)
