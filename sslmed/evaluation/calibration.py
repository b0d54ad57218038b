"""What val patients decide after training: a temperature for the logits, and thresholds for decisions.

A temperature changes no class that scores most, and with two classes or findings no ranking of images either. Both are
read from val alone, every image counting once.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

# Logits that part val without a mistake have no best temperature: the loss falls for ever as T goes to 0, and every
# probability would become 0 or 1 on the word of a few patients. So logits are stretched at most fourfold. Towards
# large T the bound keeps a model that val contradicts from becoming a coin: its scores would tie in float32.
COOLEST, HOTTEST = 0.25, 10.0


def temperature(logits: Array, target: Array) -> float:
    """The T that makes ``logits / T`` likeliest on val (temperature scaling, Guo et al. 2017, arXiv 1706.04599, 4.2).

    Softmax cross-entropy of one class an image; binary cross-entropy, over known values, of findings, which share T.

    Args:
        logits: (N, K).
        target: (N,) in [0, K), or (N, K) of 0, 1 and -1 for unknown.

    Returns:
        T in [0.25, 10]; 1 where nothing is known.
    """
    # Imported here: it costs a tenth of a second, and is needed once a run.
    from scipy.optimize import minimize_scalar

    logits = np.asarray(logits, dtype=np.float64)
    loss = _findings_loss if np.ndim(target) == 2 else _class_loss
    if np.ndim(target) == 2 and not (target >= 0).any():
        return 1.0
    # The loss is convex in 1 / T, so it has one valley in log T too.
    bounds = (np.log(COOLEST), np.log(HOTTEST))
    found = minimize_scalar(
        lambda log_t: loss(logits / np.exp(log_t), target), bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return float(np.clip(np.exp(found.x), COOLEST, HOTTEST))


def thresholds(target: Array, scores: Array) -> Floats | None:
    """The cut of each finding, or of the second of two classes, with the largest Youden's J (Cancer 1950) on val.

    J is sensitivity plus specificity minus 1. A cut lies midway between two neighbouring scores, so that no val patient
    stands on it. Of cuts that are equally good the one nearest to 0.5 is taken, of two as near the lower.

    Args:
        target: (N,) in [0, K), or (N, K) of 0, 1 and -1 for unknown.
        scores: (N, K) probabilities.

    Returns:
        (K,) as the metrics take them: for two classes (1 - t, t). 0.5 where val does not show both sides, or no cut
        has a J above 0. None for three or more classes, where the largest score decides.
    """
    if np.ndim(target) == 2:
        known = target >= 0
        columns = range(scores.shape[1])
        return np.array([_youden(target[known[:, k], k] == 1, scores[known[:, k], k]) for k in columns])
    if scores.shape[1] > 2:
        return None
    cut = _youden(target == 1, scores[:, 1])
    return np.array([1 - cut, cut])


def _class_loss(logits: Floats, target: Array) -> float:
    highest = logits.max(axis=1, keepdims=True)
    normaliser = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    return float((normaliser - logits[np.arange(len(target)), target]).mean())


def _findings_loss(logits: Floats, target: Array) -> float:
    known = target >= 0
    return float(np.logaddexp(0, np.where(target == 1, -logits, logits))[known].mean())


def _youden(positive: Array, scores: Array) -> float:
    distinct, place = np.unique(scores.astype(np.float64), return_inverse=True)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if positives == 0 or negatives == 0 or len(distinct) < 2:
        return 0.5
    middle = distinct[:-1] + (distinct[1:] - distinct[:-1]) / 2
    cuts = np.where(middle > distinct[:-1], middle, distinct[1:])  # of two neighbouring floats the upper is the cut
    below = [np.cumsum(np.bincount(place[side], minlength=len(distinct)))[:-1] for side in (positive, ~positive)]
    # J times both counts, in integers: ties are exact.
    gain = (positives - below[0]) * negatives - (negatives - below[1]) * positives
    if gain.max() <= 0:
        return 0.5
    best = cuts[gain == gain.max()]
    return float(best[np.abs(best - 0.5).argmin()])
