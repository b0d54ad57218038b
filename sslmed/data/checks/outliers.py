"""Numbers that are far from where the others lie, robustly."""

from typing import Any

import numpy as np
import numpy.typing as npt

DEVIATIONS = 5.0  # median absolute deviations, scaled to a normal distribution's standard deviation
TIMES = 3.0  # off the median by this factor is an outlier in any case
LEAST = 0.05  # of the median: closer is the same
ENOUGH = 5  # fewer numbers have no usual one
_NORMAL = 1.4826


def astray(values: npt.NDArray[np.floating[Any]]) -> list[tuple[int, float]]:
    """(position, median) of each of ``values`` (N,), all above 0, that is an outlier.

    More than ``DEVIATIONS`` scaled median absolute deviations, and more than ``LEAST``, off the median; or ``TIMES``
    smaller or larger than it.
    """
    if len(values) < ENOUGH:
        return []
    usual = float(np.median(values))
    off = np.abs(values - usual)
    far = off > max(DEVIATIONS * _NORMAL * float(np.median(off)), LEAST * usual)
    far |= (values > TIMES * usual) | (values * TIMES < usual)
    return [(int(place), usual) for place in np.flatnonzero(far)]
