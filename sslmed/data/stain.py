"""Haematoxylin, eosin and DAB: colours of a stained tissue taken apart, changed a little each, and put together."""

from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[Any]]

# Rows are the optical densities of haematoxylin, eosin and DAB in red, green and blue: Ruifrok and Johnston,
# Analytical and Quantitative Cytology and Histology 23 (2001), 291-299, table 1.
RGB_FROM_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED_FROM_RGB = np.linalg.inv(RGB_FROM_HED)
DARKEST = 1e-6  # keeps the logarithm finite; a pixel this dark has density 1


def jitter(unit: Pixels, strength: float, stream: np.random.Generator) -> Pixels:
    """Each stain's density s becomes a s + b with a from 1 -+ ``strength`` and b from -+ ``strength``, for the image.

    Stain augmentation of Tellez et al., arXiv 1902.06543 (HED-light: 0.05, HED-strong: 0.2); unlike a rescaling of
    the result it keeps the white of the glass where b is small.

    Args:
        unit: (H, W, 3) RGB in [0, 1].
        strength: from 0, which changes nothing.

    Returns:
        (H, W, 3) float32 in [0, 1].
    """
    density = np.log(np.maximum(unit, DARKEST)) / np.log(DARKEST) @ HED_FROM_RGB
    scale = stream.uniform(1 - strength, 1 + strength, size=3)
    shift = stream.uniform(-strength, strength, size=3)
    mixed = np.exp(np.log(DARKEST) * ((density * scale + shift) @ RGB_FROM_HED))
    return np.asarray(np.clip(mixed, 0, 1), dtype=np.float32)
