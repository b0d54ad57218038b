"""How well boxes are found: COCO's average precision, and the free-response measures of ``froc``, with intervals.

Average precision (AP) follows COCO's evaluation (cocodataset.org, "Detection Evaluation"; Lin et al. 2014, arXiv
1405.0312), class by class:

* Of each image at most 100 detections of the class count, the best scored.
* Within an image and class, by descending score, a detection takes the free true box with which it has the largest
  IoU, where that reaches the level asked for. Each true box is taken once. What takes none is a false positive. Boxes
  of every size count.
* Over all images by descending score, equal scores in the order of the images: precision is made monotone (at each
  recall the largest precision at it or beyond) and averaged at the 101 recalls 0, 0.01, …, 1; it is 0 at a recall that
  is not reached.

``map50`` is AP at an IoU of 0.5, ``map`` its mean over the ten levels 0.5, 0.55, …, 0.95. Images without a true box
take part: what is found in them is false.

The matches are those of faster-coco-eval. Only what depends on weights is done here, for the library takes none, and a
thousand replicates would be a thousand runs of it. A weight w counts an image w times, each of its detections w times
in a row. On unweighted images the values are the library's own.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sslmed.evaluation import froc
from sslmed.evaluation.detected_boxes import NAME, Array, Detected, Floats, Found, mean_over_classes, ratio, read

__all__ = ["KINDS", "NAME", "Detected", "Found", "hits", "measures", "ranked", "read"]

Measure = Callable[..., Any]

LEVELS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of an image and class


class Ranked(NamedTuple):
    """The D detections of one class that count, by descending score over all images.

    Attributes:
        image: (D,) positions of their images.
        score: (D,).
        hit: (D,) whether they take a true box.
    """

    image: Array
    score: Floats
    hit: npt.NDArray[np.bool_]


def measures(classes: Sequence[str]) -> dict[str, Measure]:
    """What ``protocol.summarise`` is to compare: ``map50``, ``map``, ``froc``, ``sensitivity_at_1``, then
    ``map50:NAME`` and so on.

    Each takes what was detected and weights, (R, U) for (R,) values, (U,) or None for one float, in [0, 1]. Those of a
    class are nan where no true box of it has weight; the plain names are the mean over the classes that have one, nan
    without any.

    Args:
        classes: names, by their number.
    """
    everyone = tuple(range(len(classes)))
    return {kind: partial(_measure, kind, everyone) for kind in KINDS} | {
        f"{kind}:{name}": partial(_measure, kind, (label,)) for kind in KINDS for label, name in enumerate(classes)
    }


def hits(detected: Detected, level: int = 0) -> tuple[npt.NDArray[np.bool_], ...]:
    """(n,) of each image: which detections take a true box of their class at ``LEVELS[level]``.

    Beyond the best 100 of an image and class none does.
    """
    return detected.once(_hits, level)


def ranked(detected: Detected, label: int, level: int = 0) -> Ranked:
    """The detections of one class, held against the truth at ``LEVELS[level]``."""
    return detected.once(_ranked, label, level)


def _measure(kind: str, chosen: Sequence[int], detected: Detected, weights: Array | None = None) -> Any:
    """One measure, of one class or as the mean over all."""
    values = mean_over_classes(detected, chosen, weights, partial(_VALUES[kind], detected))
    return float(values[0]) if weights is None or np.ndim(weights) == 1 else values


def _average_precision(levels: Sequence[int], detected: Detected, label: int, weights: Floats) -> Floats:
    """(r,): the mean of AP over IoU levels under (U, r) weights."""
    truths = detected.truths[:, label] @ weights
    every = [ranked(detected, label, level) for level in levels]
    counted = weights[every[0].image]  # of every level the same, in the same order
    np.cumsum(counted, axis=0, out=counted)
    total = np.zeros(weights.shape[1])
    for one in every:
        # Precision peaks and recall rises at hits alone, so the rows between them need not be looked at.
        at = np.flatnonzero(one.hit)
        true = np.cumsum(weights[one.image[at]], axis=0)
        precision = ratio(true, counted[at])
        best = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        reached = np.searchsorted(RECALLS, ratio(true, truths), side="right")
        total += (np.diff(reached, axis=0, prepend=0) * best).sum(axis=0)
    return np.asarray(total / (len(RECALLS) * len(levels)))


def _free_response(rates: Sequence[float], detected: Detected, label: int, weights: Floats) -> Floats:
    return np.asarray(froc.sensitivities(detected, label, weights, rates).mean(axis=0))


_VALUES: dict[str, Callable[[Detected, int, Floats], Floats]] = {
    "map50": partial(_average_precision, (0,)),
    "map": partial(_average_precision, tuple(range(len(LEVELS)))),
    "froc": partial(_free_response, froc.RATES),
    "sensitivity_at_1": partial(_free_response, (1.0,)),
}
KINDS = tuple(_VALUES)


def _ranked(detected: Detected, label: int, level: int) -> Ranked:
    matched = hits(detected, level)
    image, score, hit = [], [], []
    for number, (found, own) in enumerate(zip(detected.found, matched, strict=True)):
        at = np.flatnonzero(found.classes == label)[:MOST]
        image.append(np.full(len(at), number))
        score.append(found.scores[at])
        hit.append(own[at])
    if not image:
        return Ranked(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    scores = np.concatenate(score)
    order = np.argsort(-scores, kind="stable")
    return Ranked(np.concatenate(image)[order], scores[order], np.concatenate(hit)[order])


def _hits(detected: Detected, level: int) -> tuple[npt.NDArray[np.bool_], ...]:
    counts = [len(found) for found in detected.found]
    taken = np.zeros(sum(counts), bool)
    truth = [box for at, boxes in enumerate(detected.truth) for box in _coco(at, boxes.xyxy, boxes.classes)]
    found = [box for at, boxes in enumerate(detected.found) for box in _coco(at, boxes.xyxy, boxes.classes)]
    if truth and found:  # the library refuses to compare with nothing
        for box, score in zip(found, np.concatenate([boxes.scores for boxes in detected.found]).tolist(), strict=True):
            box["score"] = score
        taken[:] = _matched(detected, truth, found, LEVELS[level])
    return tuple(np.split(taken, np.cumsum(counts)[:-1])) if counts else ()


def _coco(image: int, xyxy: Array, classes: Array) -> list[dict[str, Any]]:
    """The boxes of one image as COCO has them: left, top, width, height. Differences of float32 are exact in float64
    but for boxes far beyond any image."""
    corners = xyxy.astype(np.float64)
    sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return [
        {"image_id": image + 1, "category_id": label + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for box, label in zip(sides.tolist(), classes.tolist(), strict=True)
    ]


def _matched(detected: Detected, truth: list[dict[str, Any]], found: list[dict[str, Any]], level: float) -> list[bool]:
    """Of each found box whether the library calls it a true positive.

    It tells so of one IoU level at a time (its ``extra_calc``), by marks on the boxes.
    """
    # Imported here: it costs a tenth of a second, and only runs on boxes need it.
    from faster_coco_eval import COCO, COCOeval_faster

    for number, box in enumerate(truth):
        box["id"] = number + 1
    expected = COCO(
        {
            "images": [{"id": at + 1} for at in range(len(detected.row))],
            "annotations": truth,
            "categories": [{"id": at + 1, "name": name} for at, name in enumerate(detected.classes)],
        }
    )
    answered = expected.loadRes(found)
    evaluation = COCOeval_faster(expected, answered, "bbox", extra_calc=True)
    evaluation.params.iouThrs = np.array([level])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [MOST]
    evaluation.evaluate()
    evaluation.accumulate()
    if not evaluation.matched:
        raise RuntimeError("faster-coco-eval gave no matches")
    return [bool(answered.anns[number + 1].get("tp", False)) for number in range(len(found))]
