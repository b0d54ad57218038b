"""The side-by-side table: which draws count, what is compared with what, and how it is written."""

import math

import numpy as np
import pytest

from sslmed.evaluation import detections
from sslmed.evaluation.comparison import TITLES, Features, aligned, compare, markdown, text, title
from sslmed.evaluation.metrics import LOWER_IS_BETTER, METRICS, auroc
from sslmed.evaluation.overlap import KINDS
from sslmed.evaluation.probes import linear_scores
from sslmed.evaluation.protocol import Interval, bootstrap_weights, draws, parse


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    train_y, test_y = np.arange(40) % 2, np.arange(30) % 2
    train, test = random.normal(size=(40, 4)), random.normal(size=(30, 4))
    train[:, 0] += 3 * train_y
    test[:, 0] += 3 * test_y
    ids = np.array([b"%02d" % index for index in range(40)])
    return {"train": train, "test": test, "train_y": train_y, "test_y": test_y, "train_ids": ids, "test_ids": ids[:30]}


def test_rows_hold_the_probes_on_the_draws(case: dict[str, np.ndarray]) -> None:
    noise = np.random.default_rng(1).normal(size=(70, 4))
    features = {"good": [Features(case["train"], case["test"])], "noise": [Features(noise[:40], noise[40:])]}
    drawn, _ = draws(case["train_ids"], case["train_y"], parse("20%,100%"), seeds=range(3))
    weights = bootstrap_weights(case["test_ids"], 100, seed=0)
    rows = compare(features, case["train_y"], case["test_y"], 2, drawn, weights, reference="noise")
    assert len(rows) == 2 * 2 * len(METRICS) * 2
    assert {(row.budget, row.draws, row.patients) for row in rows} == {("20%", 3, 8), ("100%", 1, 40)}
    (row,) = [row for row in rows if (row.budget, row.probe, row.arm, row.metric) == ("20%", "linear", "good", "auroc")]
    by_hand = [
        auroc(
            case["test_y"],
            linear_scores(case["train"][draw.rows], case["train_y"][draw.rows], case["test"], 2),
        )
        for draw in drawn[:3]
    ]
    assert row.value.mean == pytest.approx(np.mean(by_hand))
    assert row.draw_sd == pytest.approx(np.std(by_hand, ddof=1))
    assert row.verdict == "better than noise (interval above zero)"
    assert markdown(rows).count("\n") == len(rows) + 2


def test_findings_have_a_probe_each(case: dict[str, np.ndarray]) -> None:
    """On the images where it is known; one that a draw does not know gets 0.5."""
    noise = np.random.default_rng(1).integers(0, 2, 40)
    noise[:30] = -1
    train_y = np.stack([case["train_y"], noise, np.full(40, -1)], axis=1)
    test_y = np.stack([case["test_y"], case["test_y"], case["test_y"]], axis=1)
    features = {"good": [Features(case["train"], case["test"])]}
    drawn, _ = draws(case["train_ids"], train_y, parse("100%"), seeds=[0])
    weights = bootstrap_weights(case["test_ids"], 100, seed=0)
    rows = compare(features, train_y, test_y, 3, drawn, weights, reference="good")
    (row,) = [row for row in rows if (row.probe, row.metric) == ("linear", "auroc")]
    first = linear_scores(case["train"], case["train_y"], case["test"], 2)
    second = linear_scores(case["train"][30:], noise[30:], case["test"], 2)
    want = (auroc(case["test_y"], first) + auroc(case["test_y"], second) + 0.5) / 3
    assert row.value.mean == pytest.approx(want)


def test_every_metric_has_a_title_and_a_direction(case: dict[str, np.ndarray]) -> None:
    assert TITLES.keys() == METRICS.keys() | set(KINDS) | set(detections.KINDS)
    assert title("dice:nerve") == "Dice, nerve"
    noise = np.random.default_rng(1).normal(size=(70, 4))
    features = {"good": [Features(case["train"], case["test"])], "noise": [Features(noise[:40], noise[40:])]}
    drawn, _ = draws(case["train_ids"], case["train_y"], parse("100%"), seeds=[0])
    rows = compare(
        features,
        case["train_y"],
        case["test_y"],
        2,
        drawn,
        bootstrap_weights(case["test_ids"], 100, seed=0),
        reference="noise",
    )
    said = {row.metric: row.verdict for row in rows if (row.probe, row.arm) == ("linear", "good")}
    assert METRICS.keys() >= LOWER_IS_BETTER
    assert said["brier"] == "better than noise (interval below zero)"
    assert said["mcc"] == "better than noise (interval above zero)"


def test_text() -> None:
    assert text(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"
    assert text(Interval(0.1, -0.02, 0.3), signed=True) == "+0.100 [-0.020, +0.300]"
    assert text(Interval(math.nan, math.nan, math.nan)) == "undefined"
    assert text(None) == ""
    assert aligned([["a", "bcd", ""], ["ef", "g", "h"]]) == ["a   bcd", "ef  g    h"]
