"""Haematoxylin, eosin and DAB: colours of a stained tissue taken apart, changed a little each, and put together."""

from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[Any]]

# Rows are the optical densities of haematoxylin, eosin and DAB in red, green and blue: Ruifrok and Johnston,
# Analytical and Quantitative Cytology and Histology 23 (2001), 291-299, table 1.
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)
DARKEST = 1e-3  # of the light; keeps the logarithm finite


def jitter(unit: Pixels, strength: float, stream: np.random.Generator) -> Pixels:
    """Each stain's optical density s becomes a s + b, a from 1 -+ ``strength`` and b from -+ ``strength``.

    One a and b a stain for the whole image: stain augmentation (Tellez et al., arXiv 1902.06543) in natural optical
    densities, s = -ln(light), where Macenko augmentors use 0.2 for both. The result is never rescaled to its own
    range, which would take away the white of the glass. (In units of ln(1e-6), which some libraries have, the same b
    would be fourteen times as strong and tint the glass.)

    Args:
        unit: (H, W, 3) RGB in [0, 1].
        strength: from 0, which changes nothing.

    Returns:
        (H, W, 3) float32 in [0, 1].
    """
    density = -np.log(np.maximum(unit, DARKEST)) @ HED_FROM_RGB
    scale = stream.uniform(1 - strength, 1 + strength, size=3)
    shift = stream.uniform(-strength, strength, size=3)
    light = np.exp(-(density * scale + shift) @ RGB_FROM_HED)
    return np.asarray(np.clip(light, 0, 1), dtype=np.float32)
