"""What a check keeps of a scan: some numbers, taken where it was read."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sslmed.config import DataError
from sslmed.data.checks.likeness import scan_hash
from sslmed.data.identity import SiteKey
from sslmed.data.scan import Scan

Pixels = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What is kept of a scan that was read: some numbers, no pixels.

    Attributes:
        kind, spacing, orientation, modality, annotated, identity, slices, part, split, labels, sheared, patient,
            study: see `Scan`.
        shape: of the pixels as accepted; ``dtype`` likewise.
        affine: the 16 numbers of `Scan.affine`, row by row.
        low, high: least and greatest value.
        saturated: share of the pixels that have the greatest value, padding and background left out.
        likeness: see `likeness.scan_hash`.
        content: keyed digest of the pixels.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    spacing: tuple[float, ...] | None
    orientation: str
    affine: tuple[float, ...] | None
    low: float
    high: float
    saturated: float
    likeness: int
    content: str
    modality: str
    annotated: bool | None
    identity: tuple[str, ...]
    slices: tuple[str, ...]
    part: str
    split: str
    labels: tuple[tuple[str, str], ...]
    sheared: bool
    patient: str = field(repr=False)
    study: str = field(repr=False)

    @property
    def colour(self) -> bool:
        """Whether the pixels have three channels."""
        return len(self.shape) == (3 if self.kind == "image" else 4)

    @property
    def depth(self) -> int:
        """How many slices or frames it has; 1 of an image."""
        return 1 if self.kind == "image" else self.shape[0]

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width."""
        first = 0 if self.kind == "image" else 1
        return self.shape[first], self.shape[first + 1]


@dataclass(frozen=True)
class Measure:
    """Makes of a scan what a check keeps of it; picklable, so that workers do it."""

    key: SiteKey = field(repr=False)

    def __call__(self, scan: Scan, pixels: Pixels) -> Measured:
        """``pixels`` as the modality accepted them.

        Raises:
            DataError: there are none.
        """
        if not pixels.size:
            raise DataError(f"{scan.source}: has no pixels")
        colour = pixels.ndim == (3 if scan.kind == "image" else 4)
        return Measured(
            kind=scan.kind,
            shape=pixels.shape,
            dtype=pixels.dtype.name,
            spacing=scan.spacing,
            orientation=scan.orientation,
            affine=None if scan.affine is None else tuple(scan.affine.ravel().tolist()),
            low=float(pixels.min()),
            high=float(pixels.max()),
            saturated=saturation(pixels.min(axis=-1) if colour else pixels),
            likeness=scan_hash(scan),
            content=self.key.content(pixels),
            modality=scan.modality or "",
            annotated=scan.annotated,
            identity=scan.identity,
            slices=tuple(map(str, scan.slices)),
            part=scan.part,
            split=scan.split,
            labels=tuple(scan.labels.items()),
            sheared=scan.sheared,
            patient=scan.patient,
            study=scan.study,
        )


def saturation(grey: Pixels) -> float:
    """The share of the pixels (H, W) or (D, H, W) that have the greatest value; 0 to 1.

    Pixels of the least value, and rows and columns of one value, are background or padding and do not count.
    """
    low, high = grey.min(), grey.max()
    if low == high:
        return 0.0
    even = (grey.min(axis=-1) == grey.max(axis=-1))[..., None] | (grey.min(axis=-2) == grey.max(axis=-2))[..., None, :]
    inside = ~even & (grey > low)
    count = int(np.count_nonzero(inside))
    return int(np.count_nonzero(inside & (grey == high))) / count if count else 0.0
