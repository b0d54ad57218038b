"""One pose for every scan of a patient, whatever format it came in."""

from dataclasses import replace

import numpy as np

from sslmed.data.readers.dicom_values import QUANTITIES
from sslmed.data.scan import NiftiGrid, Scan


def facing(scan: Scan) -> Scan:
    """The scan as viewers show its slices: rows go down to the patient's back or feet, columns to the left or the back.

    Slices go to the head, the front or the right. Axes are flipped, never swapped: slices stay the slices that were
    taken. DICOM slices mostly lie like that, and so do pictures of them; NIfTI volumes are read the other way round,
    and would be seen upside down beside them. A scan that is not placed in the patient stays as it is, and so does a
    picture that was made to be looked at: a radiograph has its own way up, and most of its kind say nothing of a place.
    """
    picture = scan.modality is not None and scan.modality not in QUANTITIES
    if picture or scan.affine is None or scan.kind == "clip":
        return scan
    axes = (0, 1, 2) if scan.kind == "volume" else (1, 2)
    affine, pixels, slices, grid = scan.affine.copy(), scan.pixels, scan.slices, scan.grid
    flipped = [False, False, False]
    for axis in axes:
        direction = affine[:3, axis]
        if (direction[np.abs(direction).argmax()] > 0) == (axis == 0):
            continue
        here = axis if scan.kind == "volume" else axis - 1  # the affine of an image has the slice first
        affine[:3, 3] += direction * (pixels.shape[here] - 1)
        affine[:3, axis] = -direction
        pixels = np.flip(pixels, here)
        slices = slices[::-1] if axis == 0 else slices
        grid = _turned(grid, axis) if grid is not None else None
        flipped[axis] = True
    turned = (flipped[0], flipped[1], flipped[2])
    pixels = np.ascontiguousarray(pixels)
    return replace(scan, pixels=pixels, affine=affine, slices=slices, grid=grid, flipped=turned)


def _turned(grid: NiftiGrid, axis: int) -> NiftiGrid:
    """The grid with the sign of the file's axis that became ``axis`` (slice, down, across: head, front, right)."""
    turn = grid.turn.copy()
    turn[turn[:, 0] == 2 - axis, 1] *= -1
    return replace(grid, turn=turn)
