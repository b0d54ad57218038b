"""A scan as the store keeps it, made where it was read."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import DataError
from sslmed.data.identity import SiteKey
from sslmed.data.modality import named
from sslmed.data.scan import Scan
from sslmed.data.shards.tables import NewScan
from sslmed.data.views import Pixels, shrink

SMALLEST = 16  # pixels of the shorter side that ``--size`` may ask for


@dataclass(frozen=True, slots=True)
class Told:
    """What a scan's own file says that the index has no column for; it stays outside of the store.

    Attributes:
        unit: number of the unit that was read.
        sources: of each slice the file, where they differ.
        patient, study, part, split, labels: see `Scan`.
    """

    unit: int
    sources: tuple[str, ...] = ()
    patient: str = ""
    study: str = ""
    part: str = ""
    split: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    def as_list(self) -> list[Any]:
        """Plain JSON, without what is blank at the end: there may be millions."""
        values = [self.unit, self.sources, self.patient, self.study, self.part, self.split, self.labels]
        while not values[-1] and len(values) > 1:
            values.pop()
        return values

    @classmethod
    def from_list(cls, values: list[Any]) -> "Told":
        """The same again, from JSON too."""
        whole = cls(*values)
        return replace(whole, sources=tuple(whole.sources), labels=tuple((name, text) for name, text in whole.labels))


@dataclass(frozen=True)
class Keep:
    """Makes of a scan what the store keeps. ``note`` of what it gives is a `Told` whose unit is still unknown.

    Attributes:
        size: images whose shorter side is longer are shrunk to it.
        key: hides what identifies the content.
    """

    modality: str
    size: int | None
    key: SiteKey

    def __call__(self, scan: Scan, pixels: Pixels) -> NewScan:
        if not pixels.size:
            raise DataError(f"{scan.source}: has no pixels")
        # Both of the scan as it came: stores of other sizes know it again, and predict finds the same intensity.
        content, intensity = self.key.content(pixels), named(self.modality).intensity(pixels)
        height, width = pixels.shape[:2] if scan.kind == "image" else pixels.shape[1:3]
        small, affine, spacing = _shrunk(scan, pixels, self.size)
        told = Told(
            -1,
            tuple(str(path) for path in scan.slices),
            scan.patient,
            scan.study,
            scan.part,
            scan.split,
            tuple(scan.labels.items()),
        )
        return NewScan(
            small,
            intensity,
            content,
            scan.kind,
            (height, width),
            spacing,
            affine,
            scan.flipped,
            scan.sheared,
            scan.grid,
            note=told.as_list(),
        )


def _shrunk(
    scan: Scan, pixels: Pixels, size: int | None
) -> tuple[Pixels, npt.NDArray[np.float64] | None, tuple[float, ...] | None]:
    """Pixels, affine and spacing after each image was shrunk, and where its pixels lie then."""
    affine = scan.affine if scan.kind == "volume" else None
    if size is None:
        return pixels, affine, scan.spacing
    if scan.kind == "image":
        small = shrink(pixels, size)
        before, after = pixels.shape[:2], small.shape[:2]
    else:
        small = np.stack([shrink(image, size) for image in pixels])
        before, after = pixels.shape[1:3], small.shape[1:3]
    down, across = before[0] / after[0], before[1] / after[1]
    spacing = scan.spacing
    if spacing is not None:
        spacing = (*spacing[:-2], spacing[-2] * down, spacing[-1] * across)
    if affine is not None:
        # The centre of a new pixel h lies at (h + 0.5) * down - 0.5 of the old ones.
        change = np.diag([1.0, down, across, 1.0])
        change[1, 3], change[2, 3] = (down - 1) / 2, (across - 1) / 2
        affine = affine @ change
    return small, affine, spacing
