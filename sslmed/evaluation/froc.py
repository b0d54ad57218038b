"""Free-response ROC: how many lesions are found at how many false positives an image.

The rule is that of LUNA16 (Setio et al. 2017, arXiv 1612.08012), on boxes, class by class and image by image:

* A detection hits a true box of its class when its centre lies inside, edges included.
* By descending score: of the free true boxes around its centre it takes the one whose centre is nearest, of equal ones
  the first. A true box is taken once, by the best scored.
* A detection inside true boxes that are all taken counts as nothing, neither hit nor false positive. One inside none
  is a false positive.

A cut keeps what scores at least as high, so that equal scores enter together. The sensitivity at a rate f is the
largest share of true boxes hit among the cuts with at most f false positives an image, over all images with or without
true boxes; nothing is interpolated. It is 0 where even the highest score brings more, and what a cut finds in an image
counts as often as the image weighs.

The score ``froc`` is the mean sensitivity at `RATES`, LUNA16's competition performance metric.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sslmed.data.annotations.boxes import Boxes
from sslmed.evaluation.detected_boxes import Array, Detected, Floats, Found, mean_over_classes, ratio
from sslmed.evaluation.protocol import interval

RATES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)

# False positives are counts, and the rate of a cut times the images may fall a rounding below its own count.
_SLACK = 1e-9


class Response(NamedTuple):
    """The D detections of one class that are a hit or a false positive, by descending score over all images.

    Attributes:
        image: (D,) positions of their images.
        hit: (D,), else they are false.
        ends: (cuts,) how many detections each cut keeps, ascending.
    """

    image: Array
    hit: npt.NDArray[np.bool_]
    ends: Array


def sensitivities(detected: Detected, label: int, weights: Floats, rates: Sequence[float] | Floats) -> Floats:
    """The sensitivity of one class at each rate.

    Args:
        weights: (U, R), how often each image counts.
        rates: (K,) false positives an image.

    Returns:
        (K, R) in [0, 1]; 0 where no true box has weight.
    """
    hits, false = _at_cuts(detected, label, weights)
    allowed = np.asarray(rates, np.float64)[:, None] * weights.sum(axis=0) + _SLACK
    at = np.empty(allowed.shape, np.int64)
    for column in range(weights.shape[1]):
        at[:, column] = np.searchsorted(false[:, column], allowed[:, column], side="right") - 1
    return ratio(np.take_along_axis(hits, at, axis=0), detected.truths[:, label] @ weights)


def curve(detected: Detected, label: int | None) -> tuple[Floats, Floats]:
    """The whole curve, every image counting once: a step at each rate, holding until the next.

    Args:
        label: class number; None for the mean over the classes that have true boxes.

    Returns:
        Rates (K,), ascending from 0, which are those of all cuts; sensitivities (K,), nan without true boxes.
    """
    chosen = _chosen(detected, label)
    every = np.ones((len(detected.row), 1))
    shown = [each for each in chosen if detected.truths[:, each].any()]
    counts = [_at_cuts(detected, each, every)[1][:, 0] for each in shown]
    rates = np.unique(np.concatenate([np.zeros(1), *counts])) / max(1, len(detected.row))
    if not shown:
        return rates, np.full(len(rates), np.nan)
    values = mean_over_classes(
        detected, shown, None, lambda each, weights: sensitivities(detected, each, weights, rates)
    )
    return rates, values[:, 0]


def bands(detected: Detected, weights: Array, rates: Sequence[float] | Floats) -> tuple[Floats, Floats]:
    """The 95 % percentile interval of the mean over classes, at each rate on its own.

    Args:
        weights: (R, U) from ``protocol.bootstrap_weights``.
        rates: (K,) false positives an image; K times R values are held at once, so a few hundred do.

    Returns:
        Lower and upper ends, (K,) each, over the replicates in which a class has a true box; nan without any.
    """
    values = mean_over_classes(
        detected,
        _chosen(detected, None),
        np.atleast_2d(weights),
        lambda each, block: sensitivities(detected, each, block, rates),
    )
    every = [interval(at) for at in np.broadcast_to(values, (len(rates), values.shape[-1]))]
    return np.array([each.low for each in every]), np.array([each.high for each in every])


def response(detected: Detected, label: int) -> Response:
    """The detections of one class, held against the truth."""
    return detected.once(_response, label)


def _at_cuts(detected: Detected, label: int, weights: Floats) -> tuple[Floats, Floats]:
    """Hits and false positives under (U, R) weights at each cut, (1 + cuts, R) each; the first keeps nothing."""
    one = response(detected, label)
    counts = []
    for side in (one.hit, ~one.hit):
        sums = np.zeros((int(side.sum()) + 1, weights.shape[1]))
        np.cumsum(weights[one.image[side]], axis=0, out=sums[1:])
        kept = np.concatenate([[0], np.cumsum(side)])[one.ends]  # how many of this side are among the kept
        counts.append(sums[np.concatenate([[0], kept])])
    return counts[0], counts[1]


def _response(detected: Detected, label: int) -> Response:
    image, score, hit = [np.zeros(0, np.int64)], [np.zeros(0)], [np.zeros(0, bool)]
    for number, (truth, found) in enumerate(zip(detected.truth, detected.found, strict=True)):
        own = found.classes == label
        hits, idle = _meet(truth, found, label)
        image.append(np.full(int((~idle).sum()), number))
        score.append(found.scores[own][~idle])
        hit.append(hits[~idle])
    scores = np.concatenate(score)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])) + 1, len(scores)) if len(scores) else np.zeros(0, np.int64)
    return Response(np.concatenate(image)[order], np.concatenate(hit)[order], ends)


def _meet(truth: Boxes, found: Found, label: int) -> tuple[Any, Any]:
    """Of the detections of a class in one image, (n,) each: which hit, and which count as nothing."""
    boxes = truth.xyxy[truth.classes == label].astype(np.float64)
    centres = _centres(found.xyxy[found.classes == label].astype(np.float64))
    inside = ((centres[:, None] >= boxes[:, :2]) & (centres[:, None] <= boxes[:, 2:])).all(axis=2)  # (n, truths)
    apart = ((centres[:, None] - _centres(boxes)) ** 2).sum(axis=2)
    hit, free = np.zeros(len(centres), bool), np.ones(len(boxes), bool)
    for at in np.flatnonzero(inside.any(axis=1)):
        around = np.flatnonzero(inside[at] & free)
        if len(around):
            free[around[apart[at, around].argmin()]] = False
            hit[at] = True
    return hit, inside.any(axis=1) & ~hit


def _centres(xyxy: Floats) -> Floats:
    return np.asarray((xyxy[:, :2] + xyxy[:, 2:]) / 2)


def _chosen(detected: Detected, label: int | None) -> Sequence[int]:
    return range(len(detected.classes)) if label is None else (label,)
