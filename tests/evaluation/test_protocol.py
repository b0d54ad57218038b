"""Intervals resample patients and pair the arms."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from sslmed.evaluation.metrics import METRICS, auroc
from sslmed.evaluation.protocol import Interval, bootstrap_weights, interval, summarise, verdict


def cohort(count: int, positives: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patients with one to three images of one class each, rows shuffled."""
    random = np.random.default_rng(seed)
    images = random.integers(1, 4, count)
    patients = np.repeat(np.array([b"patient%04d" % index for index in range(count)], dtype="S32"), images)
    target = np.repeat((np.arange(count) < positives).astype(np.int64), images)
    order = random.permutation(len(patients))
    return patients[order], target[order]


def every(target: np.ndarray) -> dict[str, Any]:
    """Every metric against a target, of plain scores."""
    return {name: partial(metric, target) for name, metric in METRICS.items()}


def test_bootstrap_resamples_whole_patients() -> None:
    patients, _ = cohort(40, 20)
    weights = bootstrap_weights(patients, 200, seed=0)
    ids, first, owner = np.unique(patients, return_index=True, return_inverse=True)
    assert weights.shape == (200, len(patients))
    assert np.array_equal(weights, weights[:, first][:, owner])  # images of one patient go together
    assert (weights[:, first].sum(axis=1) == len(ids)).all()
    assert weights[:, first].var() == pytest.approx(1 - 1 / len(ids), abs=0.05)  # a multinomial's
    order = np.random.default_rng(0).permutation(len(patients))
    assert np.array_equal(bootstrap_weights(patients[order], 200, seed=0), weights[:, order])
    assert not np.array_equal(bootstrap_weights(patients, 200, seed=1), weights)


def test_interval_drops_and_counts_what_is_undefined() -> None:
    values = np.append(np.arange(101.0), [np.nan] * 4)
    assert interval(values) == Interval(50.0, 2.5, 97.5, 4)
    assert interval(values, 49.0).mean == 49.0
    nothing = interval(np.full(3, np.nan), 0.5)
    assert nothing.mean == 0.5
    assert math.isnan(nothing.low)
    assert nothing.dropped == 3


def test_the_interval_of_a_mean_agrees_with_theory() -> None:
    """Balanced accuracy of one recall that varies: width 2 x 1.96 x sqrt(p (1 - p) / n) / 2."""
    count = 1000
    patients = np.array([b"%05d" % index for index in range(2 * count)])
    target = np.repeat([0, 1], count)
    positive = np.concatenate([np.zeros(count), np.arange(count) % 4 > 0])
    scores = np.stack([1 - positive, positive], axis=1)
    estimates = summarise({"arm": [scores]}, every(target), bootstrap_weights(patients, 1000, seed=0))
    value = next(each.value for each in estimates if each.metric == "balanced_accuracy")
    assert value.mean == pytest.approx((1 + 0.75) / 2)
    assert value.high - value.low == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / count), rel=0.15)


def test_summarise_averages_over_draws_under_the_same_replicates() -> None:
    random = np.random.default_rng(0)
    patients, target = cohort(60, 25)
    arms = {arm: [random.dirichlet([1, 1], len(target)) for _ in range(3)] for arm in ("random", "pretrained")}
    weights = bootstrap_weights(patients, 50, seed=0)
    estimates = summarise(arms, every(target), weights, reference="random")
    assert [(each.arm, each.metric) for each in estimates] == [(arm, metric) for metric in METRICS for arm in arms]
    by_hand = {
        arm: np.array([[auroc(target, scores, weight) for scores in each] for weight in weights]).mean(axis=1)
        for arm, each in arms.items()
    }
    base, other = estimates[:2]
    assert base.difference is None
    assert other.difference is not None
    points = [auroc(target, scores, np.ones(len(target))) for scores in arms["pretrained"]]
    assert other.value.mean == pytest.approx(np.mean(points))
    assert other.draw_sd == pytest.approx(np.std(points, ddof=1))
    low, high = np.percentile(by_hand["pretrained"] - by_hand["random"], [2.5, 97.5])
    assert (other.difference.low, other.difference.high) == (pytest.approx(low), pytest.approx(high))


def test_an_arm_that_equals_the_reference_differs_by_exactly_nothing() -> None:
    """Pairing: with separate replicates the interval of the difference would be as wide as the arms'."""
    patients, target = cohort(40, 20)
    scores = np.random.default_rng(0).dirichlet([1, 1], len(target))
    weights = bootstrap_weights(patients, 100, seed=0)
    for each in summarise({"a": [scores], "b": [scores]}, every(target), weights, reference="a"):
        if each.arm == "b":
            assert each.difference == Interval(0.0, 0.0, 0.0, each.value.dropped)
            assert math.isnan(each.draw_sd)


def test_replicates_of_one_class_are_dropped_and_counted() -> None:
    patients, target = np.array([b"a", b"b", b"c", b"d"]), np.array([0, 0, 0, 1])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    weights = bootstrap_weights(patients, 200, seed=0)
    lacking = int(((weights[:, 3] == 0) | (weights[:, 3] == 4)).sum())
    assert lacking > 0
    assert {each.value.dropped for each in summarise({"arm": [scores]}, every(target), weights)} == {lacking}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.2, "better than random (interval above zero)"),
        (-0.1, 0.2, "no difference shown (interval covers zero)"),
        (0.0, 0.2, "no difference shown (interval covers zero)"),
        (-0.3, -0.1, "worse than random (interval below zero)"),
        (math.nan, math.nan, "cannot be said (a class is missing)"),
    ],
)
def test_verdict(low: float, high: float, words: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high), "random") == words


def test_where_lower_is_better_the_verdict_turns() -> None:
    said = partial(verdict, reference="random", lower_is_better=True)
    assert said(Interval(0.1, 0.01, 0.2)) == "worse than random (interval above zero)"
    assert said(Interval(-0.1, -0.2, -0.01)) == "better than random (interval below zero)"
    assert said(Interval(0.0, -0.2, 0.1)) == "no difference shown (interval covers zero)"


def test_what_is_measured_is_the_callers() -> None:
    """Predictions of any form, and measures that know what to do with them."""

    def share(words: str, weights: np.ndarray | None) -> Any:
        is_a = np.array([letter == "a" for letter in words])
        return is_a.mean() if weights is None else weights @ is_a / weights.sum(axis=1)

    weights = bootstrap_weights(np.array([b"1", b"2", b"3", b"4"]), 100, seed=0)
    first, second = summarise({"x": ["aabb", "aaab"], "y": ["bbbb"]}, {"a": share}, weights, reference="y")
    assert (first.arm, first.metric, first.value.mean) == ("x", "a", 0.625)
    assert second.value == Interval(0.0, 0.0, 0.0)
    assert first.difference is not None
    assert (first.difference.low, first.difference.high) == (first.value.low, first.value.high)
