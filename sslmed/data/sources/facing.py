"""One pose for every scan of a patient, whatever format it came in."""

from dataclasses import replace

import numpy as np

from sslmed.data.scan import Scan


def facing(scan: Scan) -> Scan:
    """The scan with each axis growing to the patient's right, front or head, whichever of them it lies nearest to.

    Axes are flipped, never swapped: slices stay the slices that were taken. That is how NIfTI volumes are read; DICOM
    axial slices have the left and the back where these have the right and the front, and would be seen upside down
    beside them. A scan that is not placed in the patient stays as it is.
    """
    if scan.affine is None or scan.grid is not None or scan.kind == "clip":
        return scan
    axes = (0, 1, 2) if scan.kind == "volume" else (1, 2)
    affine, pixels, slices = scan.affine.copy(), scan.pixels, scan.slices
    flipped = [False, False, False]
    for axis in axes:
        direction = affine[:3, axis]
        if direction[np.abs(direction).argmax()] > 0:
            continue
        here = axis if scan.kind == "volume" else axis - 1  # the affine of an image has the slice first
        affine[:3, 3] += direction * (pixels.shape[here] - 1)
        affine[:3, axis] = -direction
        pixels = np.flip(pixels, here)
        slices = slices[::-1] if axis == 0 else slices
        flipped[axis] = True
    turned = (flipped[0], flipped[1], flipped[2])
    return replace(scan, pixels=np.ascontiguousarray(pixels), affine=affine, slices=slices, flipped=turned)
