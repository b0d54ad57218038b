"""Where slices lie in the patient: a plane a slice, and what makes planes a volume.

Positions are mm in DICOM's patient coordinates: x to the left, y to the back, z to the head (PS3.3, C.7.6.2.1.1). What
leaves here is RAS+: x to the right, y to the front, z to the head, as in NIfTI.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslmed.data.readers.refusal import RefusedError

GAP_TOLERANCE = 0.02  # of the gap: positions are often written with one decimal
MM_TOLERANCE = 0.01
ORIENTATION_TOLERANCE = 1e-3  # of each direction cosine: 0.06 degrees
TILT_TOLERANCE = 0.1  # degrees

Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Plane:
    """One slice: centre of its first pixel in mm, unit vectors along a row and down a column, (down, across) in mm."""

    origin: Vector
    across: Vector
    down: Vector
    spacing: tuple[float, float]

    @property
    def normal(self) -> Vector:
        return np.cross(self.across, self.down)

    @property
    def position(self) -> float:
        return float(self.origin @ self.normal)


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices as a volume.

    Attributes:
        order: of the given planes, along the normal.
        gap: mm from slice to slice along the normal.
        slide: (down, across) in pixels by which each slice is shifted against the one before; zero without tilt.
        affine: (4, 4), from (d, h, w, 1) to mm in RAS+, of slices that are not shifted against the first.
    """

    order: list[int]
    gap: float
    slide: tuple[float, float]
    affine: Vector


def plane(origin: Sequence[float], orientation: Sequence[float], spacing: Sequence[float]) -> Plane:
    """From ImagePositionPatient, ImageOrientationPatient and PixelSpacing.

    Raises:
        RefusedError: not 3, 6 and 2 finite numbers, directions that are no right angle, a spacing that is not positive.
    """
    numbers = [np.asarray(given, np.float64).reshape(-1) for given in (origin, orientation, spacing)]
    if [len(given) for given in numbers] != [3, 6, 2] or not all(np.isfinite(given).all() for given in numbers):
        raise RefusedError("has a damaged geometry: position, orientation and spacing need 3, 6 and 2 numbers")
    across, down = numbers[1][:3], numbers[1][3:]
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01 or abs(across @ down) > 0.01:
        raise RefusedError(f"has an orientation that is no pair of directions at right angles: {numbers[1].tolist()}")
    if numbers[2].min() <= 0:
        raise RefusedError(f"has a pixel spacing of {numbers[2].tolist()} mm; it must be positive")
    return Plane(numbers[0], across / lengths[0], down / lengths[1], (float(numbers[2][0]), float(numbers[2][1])))


def affine(first: Plane, gap: float = 1.0) -> Vector:
    """(4, 4) from (d, h, w, 1) to mm in RAS+ for slices ``gap`` mm apart along the normal of the first."""
    matrix = np.eye(4)
    matrix[:3, 0] = first.normal * gap
    matrix[:3, 1] = first.down * first.spacing[0]
    matrix[:3, 2] = first.across * first.spacing[1]
    matrix[:3, 3] = first.origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ matrix


def letters(matrix: Vector) -> str:
    """Where the axes (across, down, normal) of an `affine` point, in nibabel's letters: "L" grows to the left."""
    from nibabel.orientations import aff2axcodes

    return "".join(str(letter) for letter in aff2axcodes(matrix[:, [2, 1, 0, 3]]))


def stack(planes: Sequence[Plane], resample_tilt: bool = False) -> Stack:
    """Sort slices along their normal and see that they are evenly spaced, parallel and alike.

    Raises:
        RefusedError: fewer than two slices, mixed orientations or pixel spacings, two slices at one position, a
            tilt of more than 0.1 degrees unless it will be resampled, gaps that differ by more than 2 % (or 0.01 mm)
            from the median, slices that do not lie on one line.
    """
    if len(planes) < 2:
        raise RefusedError("is one slice; a volume needs at least two")
    _check_parallel(planes)
    normal = planes[0].normal
    along = np.array([float(one.origin @ normal) for one in planes])
    order = [int(number) for number in np.argsort(along, kind="stable")]
    along = along[order]
    gaps = np.diff(along)
    twins = gaps < 1e-3
    if twins.any():
        raise RefusedError(
            f"has {int(twins.sum()) + 1} slices at a position of another, the first at {along[:-1][twins][0]:.2f} mm: "
            "several times, echoes or reconstructions in one series"
        )
    first, last = planes[order[0]], planes[order[-1]]
    steps = len(order) - 1
    gap = float(along[-1] - along[0]) / steps
    step = (last.origin - first.origin) / steps
    sideways = float(step @ first.down), float(step @ first.across)
    tilt = float(np.degrees(np.arctan2(np.hypot(*sideways), gap)))
    tilted = tilt > TILT_TOLERANCE and np.hypot(*sideways) * steps > MM_TOLERANCE
    if tilted and not resample_tilt:
        raise RefusedError(
            f"was taken with a tilted gantry ({tilt:.1f} degrees): its slices slide sideways; "
            "it is read only when it may be resampled (--resample-tilt)"
        )
    median = float(np.median(gaps))
    worst = float(gaps[np.abs(gaps - median).argmax()])
    if abs(worst - median) > max(GAP_TOLERANCE * median, MM_TOLERANCE):
        raise RefusedError(
            f"has uneven gaps between its slices: {median:.3f} mm, but one of {worst:.3f} mm; "
            "slices are missing or too many"
        )
    for count, number in enumerate(order):
        astray = float(np.linalg.norm(planes[number].origin - first.origin - count * step))
        if astray > max(2 * GAP_TOLERANCE * gap, MM_TOLERANCE):
            raise RefusedError(f"has slices that do not lie on one line: one is {astray:.2f} mm aside")
    slide = (sideways[0] / first.spacing[0], sideways[1] / first.spacing[1]) if tilted else (0.0, 0.0)
    return Stack(order, gap, slide, affine(first, gap))


def _check_parallel(planes: Sequence[Plane]) -> None:
    first = planes[0]
    for other in planes:
        turned = max(np.abs(other.across - first.across).max(), np.abs(other.down - first.down).max())
        if turned > ORIENTATION_TOLERANCE:
            raise RefusedError(
                f"has slices of mixed orientation: {_numbers(first.across, first.down)} and "
                f"{_numbers(other.across, other.down)}"
            )
        if not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            raise RefusedError(f"has slices of different pixel spacing: {first.spacing} and {other.spacing} mm")


def upright(volume: np.ndarray[Any, np.dtype[Any]], found: Stack, fill: float) -> tuple[np.ndarray[Any, Any], Vector]:
    """Shear a tilted volume back, slice by slice, with linear interpolation.

    The grid grows by as many pixels as the slices move, so that nothing is cut off; what no slice covers is ``fill``.
    The middle slice stays where it is.

    Args:
        volume: (D, H, W).
        found: how its slices lie.
        fill: the value of nothing.

    Returns:
        The volume (D, H', W') in float32 and its affine.
    """
    from scipy.ndimage import shift

    depth = len(volume)
    middle = (depth - 1) // 2
    reach = max(middle, depth - 1 - middle)
    margin = [int(np.ceil(abs(slide) * reach)) for slide in found.slide]
    padded = np.pad(volume, ((0, 0), *((side, side) for side in margin)), constant_values=fill).astype(np.float32)
    for number in range(depth):
        offset = [(number - middle) * slide for slide in found.slide]
        padded[number] = shift(padded[number], offset, order=1, mode="constant", cval=fill)
    corner = [middle * slide - side for slide, side in zip(found.slide, margin, strict=True)]
    matrix = found.affine.copy()
    matrix[:3, 3] += matrix[:3, 1] * corner[0] + matrix[:3, 2] * corner[1]
    return padded, matrix


def _numbers(*vectors: Vector) -> str:
    return "\\".join(f"{value:.3f}" for vector in vectors for value in vector)
