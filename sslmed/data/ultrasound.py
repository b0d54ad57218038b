"""The beam of an ultrasound without what the machine has drawn around and over it.

A picture from the machine shows a sector of tissue, and beside it text, scales and logos by which a network tells
machines and patients apart instead of findings. What is outside the sector becomes 0; coloured marks inside it are
filled from beside them. What cannot be told for sure is left as it is.
"""

from typing import Any

import numpy as np

from sslmed.config import DataError

Pixels = np.ndarray[Any, np.dtype[Any]]

DARK = 0.004  # of the brightest: what is darker is nothing
MOVING = 0.01  # likewise: what changes less stands still; compression alone changes less
COLOURED = 0.12  # of the dtype's range between channels: above JPEG's colour bleeding (3 %), below any marker
MOST_COLOUR = 0.02  # of the sector; callipers and text cover less, a Doppler box more
LEAST_SECTOR = 0.1  # of the image; a smaller one is more likely a mistake than a sector
MOST_LOST = 0.25  # likewise, when a quarter of all bright pixels lies outside
PIECE = 0.1  # of the largest: a shadow parts a sector into pieces of this size and more, letters are smaller
_GAP, _LETTER = 0.012, 0.04  # of the shorter side: speckle leaves smaller holes than lines of text; letters are thinner

RECORD = {  # stores say by which they were made: when the way changes, raise the version
    "version": 1,
    "dark": DARK,
    "moving": MOVING,
    "coloured": COLOURED,
    "most_colour": MOST_COLOUR,
}


def beam(pixels: Pixels, colour: bool) -> Pixels:
    """The grey picture (H, W) or clip (D, H, W), 0 outside the sector; dtype unchanged.

    Args:
        pixels: (H, W) or (D, H, W), with three channels behind where ``colour``.
        colour: whether there are channels.

    Raises:
        DataError: so much colour in the sector that it is no annotation: Doppler, elastography, a coloured scale.
    """
    if not colour:
        inside = sector(pixels)
        return pixels if inside is None else np.where(inside, pixels, np.zeros((), pixels.dtype))
    grey, coloured = _parted(pixels)
    inside = sector(grey, coloured)
    everywhere = np.ones(grey.shape[-2:], bool)
    share = float(coloured[..., everywhere if inside is None else inside].mean())
    if share > MOST_COLOUR:
        raise DataError(
            f"is in colour over {share:.0%} of its sector (Doppler, elastography or a coloured scale), more than "
            f"annotations need ({MOST_COLOUR:.0%}): colour there is no tissue. Leave it out, or cut the colour off"
        )
    filled = _filled(grey, coloured)
    return filled if inside is None else np.where(inside, filled, np.zeros((), filled.dtype))


def sector(grey: Pixels, coloured: Pixels | None = None) -> Pixels | None:
    """Where the beam is, (H, W) bool, of a picture (H, W) or clip (D, H, W); None where that cannot be told.

    In a clip the beam changes and what is drawn around it does not; a picture has its largest bright region. The sector
    is the hull, so that shadows and fluid inside stay.

    Args:
        coloured: of the shape of ``grey``; what is drawn for sure.
    """
    frames = grey if grey.ndim == 3 else grey[None]
    drawn = False if coloured is None else coloured if coloured.ndim == 2 else coloured.any(axis=0)
    brightest = frames.max(axis=0)
    limit = DARK * float(brightest.max())
    candidates = [brightest > limit]
    if len(frames) > 1:
        candidates.insert(0, brightest.astype(np.float64) - frames.min(axis=0) > MOVING * float(brightest.max()))
    for bright in candidates:
        bright &= ~np.asarray(drawn)
        inside = _hull(_largest(bright))
        if inside.mean() >= LEAST_SECTOR and bright[~inside].sum() <= MOST_LOST * bright.sum():
            return inside
    return None


def _largest(bright: Pixels) -> Pixels:
    """The largest connected region, with its pieces, after gaps were closed and what is thin was taken away."""
    from scipy import ndimage

    side = min(bright.shape)
    gap, letter = (max(1, round(share * side / 2)) for share in (_GAP, _LETTER))
    # as minima and maxima of squares, which are fast; outside the picture is whatever disturbs least
    closed = ndimage.minimum_filter(ndimage.maximum_filter(bright, 2 * gap + 1), 2 * gap + 1, mode="nearest")
    core = ndimage.minimum_filter(closed, 2 * letter + 1, mode="nearest")
    opened = ndimage.maximum_filter(core, 2 * letter + 1)
    regions, count = ndimage.label(opened)
    sizes = np.bincount(regions.ravel(), minlength=count + 1)
    sizes[0] = 0
    pieces: Pixels = (sizes >= max(1, PIECE * sizes.max()))[regions]
    return pieces


def _hull(mask: Pixels) -> Pixels:
    """The convex hull of a mask, filled."""
    filled = np.zeros_like(mask)
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return filled
    first = mask[rows].argmax(axis=1)
    last = mask.shape[1] - 1 - mask[rows][:, ::-1].argmax(axis=1)
    between = np.arange(rows[0], rows[-1] + 1)
    left = np.ceil(np.interp(between, *_lower(rows, first)) - 1e-9)
    right = np.floor(-np.interp(between, *_lower(rows, -last)) + 1e-9)
    columns = np.arange(mask.shape[1])
    filled[between] = (columns >= left[:, None]) & (columns <= right[:, None])
    return filled


def _lower(x: Pixels, y: Pixels) -> tuple[Pixels, Pixels]:
    """The lower convex hull of points sorted by ``x`` (Andrew's monotone chain)."""
    kept: list[tuple[int, int]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(kept) > 1 and _turn(kept[-2], kept[-1], point) <= 0:
            kept.pop()
        kept.append(point)
    corners = np.array(kept, float)
    return corners[:, 0], corners[:, 1]


def _turn(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> int:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _parted(pixels: Pixels) -> tuple[Pixels, Pixels]:
    """(..., H, W, 3) -> the mean of the channels, and where they differ by more than a picture of grey leaves them."""
    if pixels.ndim == 4:  # a frame at a time: a clip in float32 would be four times as large
        frames = [_parted(frame) for frame in pixels]
        return np.stack([grey for grey, _ in frames]), np.stack([coloured for _, coloured in frames])
    spread = pixels.max(axis=-1).astype(np.float32) - pixels.min(axis=-1)
    whole = pixels.dtype.kind in "ui"
    mean = pixels.mean(axis=-1, dtype=np.float32)
    coloured = spread > COLOURED * (np.iinfo(pixels.dtype).max if whole else 1.0)
    return (np.rint(mean) if whole else mean).astype(pixels.dtype), coloured


def _filled(grey: Pixels, coloured: Pixels) -> Pixels:
    """What is coloured becomes as the nearest pixel of its frame that is not."""
    from scipy import ndimage

    filled = grey.copy()
    for frame, marks in zip(*((each if grey.ndim == 3 else each[None]) for each in (filled, coloured)), strict=True):
        if marks.any():
            around = ndimage.binary_dilation(marks, iterations=2)  # colour bleeds over its edge
            nearest = ndimage.distance_transform_edt(around, return_distances=False, return_indices=True)
            frame[...] = frame[tuple(nearest)]
    return filled
