"""Images that look alike: a hash that survives another bit depth, size or JPEG quality, and the pairs that are near.

The hash is the perceptual one of the discrete cosine transform (Zauner, "Implementation and benchmarking of perceptual
image hash functions", 2010): which of the lowest frequencies are stronger than their median. It says "have a look",
never "the same": radiographs of one projection are alike by nature. Equal images are found by `SiteKey.content`.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.scan import Scan

BITS = 64
MOST = 3  # bits that differ between near images; docs/checks.md says what share of a clean set that is
_SIDE, _BLOCK = 32, 8  # pixels of the averaged image; frequencies each way
_CLIP = (1, 99)  # percentiles: one implant or marker must not decide the scale
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601
_FLAT = 1e-6  # of the largest value: below it a difference is rounding
_PAIRS = 2**20  # candidates that are looked at in one go: about 100 MB

Pixels = np.ndarray[Any, np.dtype[Any]]
Hashes = npt.NDArray[np.uint64]
Pairs = npt.NDArray[np.int64]


def scan_hash(scan: Scan) -> int:
    """The hash of a scan: of an image, of the mean of a volume's slices, or of the mean of a clip's frames."""
    return image_hash(scan.pixels if scan.kind == "image" else scan.pixels.mean(axis=0, dtype=np.float32))


def image_hash(pixels: Pixels) -> int:
    """64 bits of an image (H, W) or (H, W, 3); 0, which no other image has, when it is constant.

    Grey is averaged over areas to 32 x 32, cut off at its 1st and 99th percentile, transformed; a bit is whether one of
    the 8 x 8 lowest frequencies but the constant is above the median of them (and the first bit whether any is).
    """
    grey = pixels.astype(np.float32, copy=False)
    if grey.ndim == 3:
        grey = grey @ _GREY
    small = _areas(grey.shape[0]) @ grey @ _areas(grey.shape[1]).T
    low, high = np.percentile(small, _CLIP)
    if high - low <= _FLAT * max(abs(float(low)), abs(float(high)), 1e-30):
        low, high = float(small.min()), float(small.max())  # a small thing on an even ground
    if high - low <= _FLAT * max(abs(float(low)), abs(float(high)), 1e-30):
        return 0
    unit = np.clip((small - low) / (high - low), 0, 1)
    frequencies = (_cosines() @ unit @ _cosines().T).ravel()
    above = frequencies[1:] > np.median(frequencies[1:])
    return int(np.packbits(np.concatenate([[True], above])).view(">u8")[0])


def near(hashes: Hashes, most: int = MOST) -> Pairs:
    """All pairs of positions whose hashes differ in at most ``most`` bits: (P, 2), first < second, sorted.

    Constant images (hash 0) are in none. Found by bands: cut into ``most`` + 1 bands, two near hashes agree in one of
    them, so only images that share a band are compared. `survey` sums up without holding all pairs.
    """
    blocks = [pairs for pairs, _ in _blocks(np.asarray(hashes, np.uint64), most)]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *blocks])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


@dataclass(frozen=True, eq=False)
class Survey:
    """How much of a set is near something else.

    Attributes:
        images: how many images have a near one.
        pairs: how many pairs are near.
        groups: how many groups they form, where near to near is one group; ``largest`` is the images of the largest.
        closest: (n, 2) the nearest pairs, nearest first.
        distances: (n,) bits that differ in each of these.
    """

    images: int
    pairs: int
    groups: int
    largest: int
    closest: Pairs
    distances: npt.NDArray[np.int64]


def survey(hashes: Hashes, apart: npt.NDArray[np.int64], most: int = MOST, show: int = 20) -> Survey:
    """Near pairs in numbers, in memory that does not grow with their count.

    Args:
        hashes: (N,), 0 for a constant image.
        apart: (N,); only pairs whose numbers differ count, such as those of different patients.
        most: bits that may differ.
        show: how many of the nearest pairs are kept.
    """
    hashes = np.asarray(hashes, np.uint64)
    label = np.arange(len(hashes))
    touched = np.zeros(len(hashes), bool)
    count, closest, distances = 0, np.empty((0, 2), np.int64), np.empty(0, np.int64)
    for pairs, bits in _blocks(hashes, most):
        wanted = apart[pairs[:, 0]] != apart[pairs[:, 1]]
        pairs, bits = pairs[wanted], bits[wanted]
        count += len(pairs)
        touched[pairs.ravel()] = True
        label = _join(label, pairs)
        closest, distances = np.concatenate([closest, pairs]), np.concatenate([distances, bits])
        best = np.lexsort((closest[:, 1], closest[:, 0], distances))[:show]
        closest, distances = closest[best], distances[best]
    sizes = np.unique(label[touched], return_counts=True)[1]
    return Survey(int(touched.sum()), count, len(sizes), int(sizes.max(initial=0)), closest, distances)


def _join(label: npt.NDArray[np.int64], pairs: Pairs) -> npt.NDArray[np.int64]:
    """(N,) labels of the groups after ``pairs`` were joined too."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return label
    ends = label[pairs]
    edges = coo_array((np.ones(len(ends), np.int8), (ends[:, 0], ends[:, 1])), shape=(len(label), len(label)))
    return np.asarray(connected_components(edges, directed=False)[1][label], np.int64)


def _blocks(hashes: Hashes, most: int) -> Iterator[tuple[Pairs, npt.NDArray[np.int64]]]:
    """Near pairs and their distances, a bounded number at a time, each pair once."""
    if not 0 <= most < BITS:
        raise ValueError(f"most is {most}; allowed: 0 to {BITS - 1}")
    edges = np.linspace(0, BITS, most + 2).astype(int)
    bands = [_band(hashes, int(first), int(last)) for first, last in itertools.pairwise(edges)]
    kept = np.flatnonzero(hashes)
    if not len(kept):
        return
    for number, band in enumerate(bands):
        order = kept[np.argsort(band[kept], kind="stable")]
        starts = np.flatnonzero(np.concatenate([[True], band[order][1:] != band[order][:-1]]))
        ends = np.append(starts[1:], len(order))
        for one, other in _candidates(starts, ends):
            pairs = np.sort(np.stack([order[one], order[other]], axis=1), axis=1)
            bits = np.bitwise_count(hashes[pairs[:, 0]] ^ hashes[pairs[:, 1]]).astype(np.int64)
            found = bits <= most
            for earlier in bands[:number]:  # a pair that shares two bands is told at the first
                found &= earlier[pairs[:, 0]] != earlier[pairs[:, 1]]
            yield pairs[found], bits[found]


def _candidates(starts: Pairs, ends: Pairs) -> Iterator[tuple[Pairs, Pairs]]:
    """All pairs of places inside each stretch from a start to before its end, at most about ``_PAIRS`` at a time."""
    place = np.arange(ends[-1])
    after = np.repeat(ends, ends - starts) - place - 1  # partners behind each place
    upto = np.cumsum(after)
    first = 0
    while first < len(place):
        done = upto[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(upto, done + _PAIRS, side="right")))
        many = after[first:last]
        one = np.repeat(place[first:last], many)
        within = np.arange(len(one)) - np.repeat(np.cumsum(many) - many, many)
        if len(one):
            yield one, one + 1 + within
        first = last


def _band(hashes: Hashes, first: int, last: int) -> Hashes:
    return (hashes >> np.uint64(first)) & np.uint64(2 ** (last - first) - 1)


@functools.lru_cache(maxsize=64)
def _areas(size: int) -> npt.NDArray[np.float32]:
    """(32, size): the share that each pixel has in each of 32 equal stretches; rows add up to 1."""
    edges = np.linspace(0, size, _SIDE + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.asarray(np.clip(overlap, 0, None) * (_SIDE / size), np.float32)


@functools.lru_cache(maxsize=1)
def _cosines() -> npt.NDArray[np.float64]:
    """(8, 32): the lowest rows of the orthonormal cosine transform (DCT-II)."""
    wave = np.cos(np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * np.arange(_BLOCK)[:, None]) * np.sqrt(2 / _SIDE)
    wave[0] /= np.sqrt(2)
    return np.asarray(wave)
