"""What val images decide of a detector after training: what its scores are worth, and which boxes are shown.

A detection is a hit where it takes a true box of its class at an IoU of 0.5, as COCO matches (``detections``).
"""

import numpy as np
import numpy.typing as npt

from sslmed.evaluation import detections, reliability
from sslmed.evaluation.calibration import COOLEST, HOTTEST
from sslmed.evaluation.detected_boxes import Array, Detected, Floats

FURTHEST = 5.0  # of the offset, for the reason that bounds the temperature: a val without mistakes has no best one
FEWEST = 10  # detections, below which two numbers are not fitted
_EDGE = 1e-6  # scores of 0 and 1 have no logit; this far from them the sigmoid is flat


def hits(detected: Detected) -> tuple[npt.NDArray[np.bool_], ...]:
    """(n,) of each image: which detections are hits. Beyond the best 100 of an image and class none is."""
    return detections.hits(detected)


def fit(scores: Array, hit: Array) -> tuple[float, float]:
    """The temperature T and offset b that make ``sigmoid(logit(score) / T + b)`` likeliest to say what is a hit.

    Platt scaling (Platt 1999, "Probabilistic outputs for support vector machines", without its smoothed targets), on
    the logit of the score: binary cross-entropy over all detections, which is convex in 1 / T and b.

    Args:
        scores: (n,) in [0, 1], of all images and classes together.
        hit: (n,) booleans.

    Returns:
        T in [0.25, 10] and b in [-5, 5]; (1, 0) for fewer than 10 detections, or where all or none are hits.
    """
    # Imported here: it costs a tenth of a second, and is needed once a run.
    from scipy.optimize import minimize

    scores, hit = np.asarray(scores, np.float64), np.asarray(hit, bool)
    if len(scores) < FEWEST or hit.all() or not hit.any():
        return 1.0, 0.0
    logits = _logits(scores)

    def loss(at: Floats) -> tuple[float, Floats]:
        raised = at[0] * logits + at[1]
        excess = _sigmoid(raised) - hit
        value = np.logaddexp(0, np.where(hit, -raised, raised)).mean()
        return float(value), np.array([(excess * logits).mean(), excess.mean()])

    bounds = [(1 / HOTTEST, 1 / COOLEST), (-FURTHEST, FURTHEST)]
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 500}
    slope, offset = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return float(np.clip(1 / slope, COOLEST, HOTTEST)), float(np.clip(offset, -FURTHEST, FURTHEST))


def calibrated(scores: Array, temperature: float, offset: float) -> Floats:
    """(n,) probabilities of being a hit, in [0, 1], in the order of the scores; what `fit` means."""
    return _sigmoid(_logits(np.asarray(scores, np.float64)) / temperature + offset)


def thresholds(detected: Detected) -> tuple[float, ...]:
    """Of each class the score from which on boxes are shown: the cut with the largest F1 at an IoU of 0.5.

    F1 is 2 hits / (shown + true boxes) over all images. A cut lies midway between two neighbouring scores, the lowest
    midway between 0 and the lowest score, so that no val box stands on it. Of cuts that are equally good the highest is
    taken: it shows the fewest false boxes. 0.5 for a class without true boxes or of which nothing is ever hit.

    Returns:
        (C,) in [0, 1]; a box is shown when it scores at least as high.
    """
    return tuple(_cut(detected, label) for label in range(len(detected.classes)))


def ece(scores: Array, hit: Array) -> float:
    """Expected calibration error of detections: how far scores and shares of hits lie apart, in 15 bins of the score.

    The D-ECE of Küppers et al. 2020 (arXiv 2004.13546) by confidence alone, with the bins of ``reliability.ece``.
    Unlike that of a finding, a low score is not turned into a high confidence of the contrary: scores of 0.3 and 0.7
    would then share a bin, where too high and too low cancel.

    Args:
        scores: (n,) in [0, 1].
        hit: (n,) booleans.

    Returns:
        In [0, 1]; nan without detections, or where all or none are hits.
    """
    if not len(scores):
        return float("nan")
    # Three classes of which the first is called, with the score as confidence, and true where it is a hit.
    called = np.asarray(scores, np.float64)[:, None] * [1.0, 0.0, 0.0]
    return float(reliability.ece(np.where(hit, 0, 1), called))


def _cut(detected: Detected, label: int) -> float:
    one, truths = detections.ranked(detected, label), detected.truths[:, label].sum()
    if not one.hit.any():
        return 0.5
    ends = np.append(np.flatnonzero(np.diff(one.score)), len(one.score) - 1)
    f1 = 2 * np.cumsum(one.hit)[ends] / (ends + 1 + truths)
    best = int(f1.argmax())  # the first: the highest cut
    upper, lower = one.score[ends][best], np.append(one.score[ends], 0.0)[best + 1]
    middle = lower + (upper - lower) / 2
    return float(middle if middle > lower else upper)  # of two neighbouring floats the upper is the cut


def _logits(scores: Floats) -> Floats:
    kept = np.clip(scores, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(kept) - np.log1p(-kept))


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(values / 2)))
