"""Probes of several starts side by side at each label budget, and the table that shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.evaluation.metrics import LOWER_IS_BETTER, METRICS
from sslmed.evaluation.probes import knn_scores, linear_scores
from sslmed.evaluation.protocol import Draw, Interval, summarise, verdict

Array = npt.NDArray[Any]

PROBES = {"knn": knn_scores, "linear": linear_scores}
TITLES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "mcc": "MCC",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "specificity_at_90_sensitivity": "specificity at 90 % sensitivity",
    "ece": "ECE (lower is better)",
    "brier": "Brier score (lower is better)",
    "dice": "Dice",
    "iou": "IoU",
    "hd95": "HD95 (lower is better)",
    "asd": "average surface distance (lower is better)",
    "map50": "AP at IoU 0.5",
    "map": "AP at IoU 0.5 to 0.95",
    "froc": "FROC score",
    "sensitivity_at_1": "sensitivity at 1 false positive an image",
}


@dataclass(frozen=True)
class Features:
    """What one start makes of the images: (n, D) of the labelled train images, (m, D) of the test images."""

    train: Array
    test: Array


@dataclass(frozen=True)
class Row:
    """One metric of one arm, probe and budget.

    Attributes:
        patients: Labelled training patients in a draw.
        draws: How many draws the value is a mean of; 1 for one start where every seed draws the same patients (100 %).
        draw_sd: Standard deviation over draws; nan for one draw.
        difference: This arm minus the reference arm, paired by patient; None in the rows of the reference.
        verdict: What the difference allows one to say; None in the rows of the reference.
    """

    budget: str
    probe: str
    arm: str
    metric: str
    value: Interval
    patients: int
    draws: int
    draw_sd: float
    difference: Interval | None
    verdict: str | None


def compare(
    features: Mapping[str, Sequence[Features]],
    train_y: Array,
    test_y: Array,
    classes: int,
    drawn: Sequence[Draw],
    weights: Array,
    *,
    reference: str,
) -> list[Row]:
    """Train every probe on every draw for every arm, score the test images, and set each arm against ``reference``.

    Decisions are cut at 0.5 for findings and at the largest score for classes: a probe has no val to tune them on.

    Args:
        features: Of each arm one start for all draws, or one a seed, which the draw of that seed gets.
        train_y: (n,) classes, -1 for images that no draw holds; or (n, K) of 0, 1 and -1, findings, each of which gets
            a probe of its own.
        test_y: (m,) classes in [0, classes), or (m, K) findings.
        classes: How many classes or findings there are.
        drawn: From ``protocol.draws``, whose rows are positions in ``train_y``.
        weights: (R, m) from ``protocol.bootstrap_weights``.

    Returns:
        Budgets in the order of ``drawn``, within them probes, metrics, arms.
    """
    rows: list[Row] = []
    measures = {name: partial(metric, test_y) for name, metric in METRICS.items()}
    for budget in dict.fromkeys(draw.budget for draw in drawn):
        members = [draw for draw in drawn if draw.budget == budget]
        for probe, scores_of in PROBES.items():
            scores = {arm: _scores(scores_of, starts, train_y, classes, members) for arm, starts in features.items()}
            for found in summarise(scores, measures, weights, reference=reference):
                said = None
                if found.difference is not None:
                    said = verdict(found.difference, reference, lower_is_better=found.metric in LOWER_IS_BETTER)
                counts = (members[0].patients, len(scores[found.arm]))
                values = (found.arm, found.metric, found.value, *counts, found.draw_sd, found.difference, said)
                rows.append(Row(budget.text, probe, *values))
    return rows


def _scores(
    probe: Callable[..., Array], starts: Sequence[Features], train_y: Array, classes: int, members: Sequence[Draw]
) -> list[Array]:
    if len(starts) == 1 and all(draw.everyone for draw in members):
        members = members[:1]  # one start on the same patients under every seed: probes draw nothing themselves
    scores = []
    for draw in members:
        start = starts[draw.seed % len(starts)]
        train, labels = start.train[draw.rows], train_y[draw.rows]
        if labels.ndim == 2:
            scores.append(_finding_scores(probe, train, labels, start.test))
        else:
            scores.append(probe(train, labels, start.test, classes))
    return scores


def _finding_scores(probe: Callable[..., Array], train: Array, labels: Array, test: Array) -> Array:
    """(m, K): of each finding by a probe on the images where it is known; 0.5 where it is known nowhere."""
    scores = np.full((len(test), labels.shape[1]), 0.5)
    for finding, column in enumerate(labels.T):
        known = column >= 0
        if known.any():
            scores[:, finding] = probe(train[known], column[known], test, 2)[:, 1]
    return scores


def markdown(rows: Sequence[Row]) -> str:
    """All rows as one Markdown table."""
    lines = [
        "| budget | patients | draws | probe | metric | arm | value [95 %] | sd of draws | difference | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = "" if np.isnan(row.draw_sd) else f"{row.draw_sd:.3f}"
        about = [row.budget, str(row.patients), str(row.draws), row.probe, title(row.metric), row.arm]
        cells = [*about, text(row.value), spread, text(row.difference, signed=True), row.verdict or ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def title(metric: str) -> str:
    """A measure's name for people; of one class, such as ``dice:nerve``, with the class behind it."""
    name, _, label = metric.partition(":")
    return f"{TITLES[name]}, {label}" if label else TITLES[name]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The cells in columns as wide as their widest, two spaces apart."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return [line.rstrip() for line in lines]


def text(value: Interval | None, signed: bool = False) -> str:
    """``0.912 [0.880, 0.941]``; ``undefined`` for nan, nothing for None."""
    if value is None:
        return ""
    if np.isnan(value.mean):
        return "undefined"
    sign = "+" if signed else ""
    return f"{value.mean:{sign}.3f} [{value.low:{sign}.3f}, {value.high:{sign}.3f}]"
