"""What the intensities of a scan are measured by: taken once from the whole of it, applied to every part."""

from typing import NamedTuple


class Intensity(NamedTuple):
    """Of a whole scan, in stored units. A slice or crop of it is normalised by these, never by its own.

    Attributes:
        low, high: what lies outside is clipped; low < high.
        mean, std: what becomes 0 and what 1; std > 0.
    """

    low: float
    high: float
    mean: float
    std: float
