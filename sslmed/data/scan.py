"""One image as a reader hands it over, before any modality has a say in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Scan:
    """An image and where it comes from. Immutable: the pixels are made read-only.

    Attributes:
        pixels: (H, W) grey or (H, W, 3) in RGB order; uint8 or uint16, stored values as the file has them.
        spacing: distance between pixel centres in mm, down then across; None where the format does not say it in a way
            that can be trusted (the print resolution of a PNG, JPEG or TIFF is no geometry).
        source: the file it was read from.
    """

    pixels: np.ndarray[Any, np.dtype[Any]]
    spacing: tuple[float, ...] | None
    source: Path

    def __post_init__(self) -> None:
        self.pixels.setflags(write=False)
