"""A volume or clip of a store: slices along any axis, stacks of neighbours and crops, without reading the rest."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import UsageError
from sslmed.data.scan import NiftiGrid

Pixels = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class StoredVolume:
    """A scan of a store with all its slices.

    A slice of a volume lies on the disk in tiles of at most 128 x 128 pixels; what is asked for takes the tiles that it
    touches, one at a time, whatever the volume's size.

    Attributes:
        shape: (D, H, W), or (D, H, W, 3) in colour.
        spacing: mm between slices, down and across; NaN where unknown.
        affine: (4, 4), see `Scan.affine`; None where the scan is not placed in the patient.
        grid: how its NIfTI file placed it; None of other formats.
        read: (first and end along D, H and W) -> pixels.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    affine: npt.NDArray[np.float64] | None
    grid: NiftiGrid | None
    read: Callable[[tuple[slice, slice, slice]], Pixels]

    def slice(self, axis: int, number: int) -> Pixels:
        """One plane across ``axis`` 0, 1 or 2: (H, W), (D, W) or (D, H)."""
        self._check(axis, number)
        window = [slice(0, side) for side in self.shape[:3]]
        window[axis] = slice(number, number + 1)
        return np.ascontiguousarray(self.read((window[0], window[1], window[2])).squeeze(axis))

    def stack(self, axis: int, number: int, count: int) -> Pixels:
        """``count`` (odd) neighbouring planes around ``number``, the outermost repeated at the ends: (a, b, count).

        Raises:
            UsageError: an even count, colour, or a plane that is not there.
        """
        self._check(axis, number)
        if count < 1 or count % 2 == 0 or len(self.shape) > 3:
            raise UsageError(f"a stack of {count} slices of {self.shape}: give an odd number, of a grey volume")
        around = np.clip(np.arange(number - count // 2, number + count // 2 + 1), 0, self.shape[axis] - 1)
        window = [slice(0, side) for side in self.shape[:3]]
        window[axis] = slice(int(around[0]), int(around[-1]) + 1)
        planes = np.moveaxis(self.read((window[0], window[1], window[2])), axis, -1)
        return np.ascontiguousarray(planes[..., around - around[0]])

    def crop(self, start: Sequence[int], shape: Sequence[int]) -> Pixels:
        """The box of ``shape`` (d, h, w) that begins at ``start``.

        Raises:
            UsageError: it does not lie inside the volume.
        """
        ends = [first + side for first, side in zip(start, shape, strict=True)]
        if min(start) < 0 or min(shape) < 1 or any(end > side for end, side in zip(ends, self.shape, strict=False)):
            raise UsageError(f"a crop of {tuple(shape)} from {tuple(start)} does not lie inside {self.shape[:3]}")
        first, second, third = (slice(begin, end) for begin, end in zip(start, ends, strict=True))
        return self.read((first, second, third))

    def whole(self) -> Pixels:
        """All of it."""
        return self.crop((0, 0, 0), self.shape[:3])

    def _check(self, axis: int, number: int) -> None:
        if axis not in (0, 1, 2) or not 0 <= number < self.shape[axis]:
            raise UsageError(f"there is no slice {number} along axis {axis} of {self.shape[:3]}; axes are 0, 1 and 2")
