"""Draws are nested, stratified, by patient and independent of row order; intervals resample patients, pair the arms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.config import UsageError
from sslmed.evaluation.metrics import METRICS, auroc
from sslmed.evaluation.protocol import (
    Budget,
    Draw,
    Interval,
    bootstrap_weights,
    draws,
    interval,
    parse,
    summarise,
    verdict,
)


def cohort(count: int, positives: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patients with one to three images of one class each, rows shuffled."""
    random = np.random.default_rng(seed)
    images = random.integers(1, 4, count)
    patients = np.repeat(np.array([b"patient%04d" % index for index in range(count)], dtype="S32"), images)
    target = np.repeat((np.arange(count) < positives).astype(np.int64), images)
    order = random.permutation(len(patients))
    return patients[order], target[order]


def drawn(patients: np.ndarray, draw: Draw) -> set[bytes]:
    return set(patients[draw.rows].tolist())


def test_parse() -> None:
    assert parse("1%, 10%,100%") == (Budget("1%", 0.01), Budget("10%", 0.1), Budget("100%", 1.0))
    assert parse("k=5")[0].each == 5


@pytest.mark.parametrize("text", ["", "0%", "101%", "ten", "k=0", "k=1.5", "-1%", "nan%", "10%,10.0%", "1%,,2%"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        parse(text)


@given(count=st.integers(10, 120), share=st.floats(0.1, 0.9), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_draws_are_nested_stratified_and_by_patient(count: int, share: float, seed: int) -> None:
    positives = max(1, min(count - 1, round(share * count)))
    patients, target = cohort(count, positives, seed)
    chosen, skipped = draws(patients, target, parse("5%,20%,50%,100%"), seeds=(0, 1))
    assert {part.budget for part in skipped} <= {"5%"}
    sizes = {"5%": 0.05, "20%": 0.2, "50%": 0.5, "100%": 1.0}
    for which in (0, 1):
        before: set[bytes] = set()
        for draw in (each for each in chosen if each.seed == which):
            inside = np.isin(patients, list(drawn(patients, draw)))
            assert np.array_equal(np.flatnonzero(inside), draw.rows)  # every image of a drawn patient, ascending
            assert before <= drawn(patients, draw)
            before = drawn(patients, draw)
            assert draw.patients == len(before) == math.floor(sizes[draw.budget.text] * count + 0.5)
            of_class_1 = len(set(patients[draw.rows][target[draw.rows] == 1].tolist()))
            assert 1 <= of_class_1 < draw.patients
            assert abs(of_class_1 - draw.patients * positives / count) <= 1  # Webster's bound for two classes


def test_seeds_differ_and_the_order_of_rows_does_not_matter() -> None:
    patients, target = cohort(80, 30)
    chosen, _ = draws(patients, target, parse("10%"), seeds=range(5))
    assert len({frozenset(drawn(patients, draw)) for draw in chosen}) > 1
    order = np.random.default_rng(1).permutation(len(patients))
    again, _ = draws(patients[order], target[order], parse("10%"), seeds=range(5))
    assert [drawn(patients, a) for a in chosen] == [drawn(patients[order], b) for b in again]


def test_at_100_percent_all_seeds_draw_everyone() -> None:
    patients, target = cohort(30, 10)
    chosen, _ = draws(patients, target, parse("50%,100%"), seeds=(0, 1))
    assert [draw.everyone for draw in chosen] == [False, False, True, True]
    assert all(len(draw.rows) == len(patients) for draw in chosen[2:])


def test_unlabelled_images_are_never_drawn() -> None:
    patients, target = cohort(30, 10)
    target[::3] = -1
    chosen, _ = draws(patients, target, parse("20%,100%"), seeds=(0,))
    assert all((target[draw.rows] >= 0).all() for draw in chosen)
    assert chosen[1].everyone


def test_a_budget_below_one_patient_a_class_is_skipped_by_name() -> None:
    patients, target = cohort(60, 20)
    chosen, skipped = draws(patients, target, parse("1%,10%,k=20,k=21"), seeds=(0, 1))
    assert [draw.budget.text for draw in chosen] == ["10%", "10%", "k=20", "k=20"]
    assert [part.budget for part in skipped] == ["1%", "k=21"]
    assert "below one patient a class" in skipped[0].why
    assert "60 labelled" in skipped[0].why
    assert "20 labelled" in skipped[1].why


def test_k_draws_that_many_patients_of_each_class() -> None:
    patients, target = cohort(60, 20)
    small, large = draws(patients, target, parse("k=2,k=7"), seeds=(0,))[0]
    for draw, each in ((small, 2), (large, 7)):
        labels = dict(zip(patients[draw.rows].tolist(), target[draw.rows].tolist(), strict=True))
        assert sorted(labels.values()) == [0] * each + [1] * each
    assert drawn(patients, small) < drawn(patients, large)


def test_a_patient_of_two_classes_counts_as_the_rarer() -> None:
    patients = np.array([b"a", b"a", b"b", b"c", b"d", b"e", b"f"])
    target = np.array([0, 1, 0, 0, 0, 0, 0])
    (draw,), _ = draws(patients, target, parse("k=1"), seeds=(0,))
    assert {0, 1} <= set(draw.rows.tolist())
    assert draw.patients == 2


def test_without_labels_everything_is_skipped() -> None:
    chosen, skipped = draws(np.array([b"a", b"b"]), np.array([-1, -1]), parse("100%"), seeds=(0,))
    assert not chosen
    assert skipped[0].why == "no training patient has a label"


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
    estimates = summarise({"arm": [scores]}, target, bootstrap_weights(patients, 1000, seed=0))
    value = next(each.value for each in estimates if each.metric == "balanced_accuracy")
    assert value.mean == pytest.approx((1 + 0.75) / 2)
    assert value.high - value.low == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / count), rel=0.15)


def test_summarise_averages_over_draws_under_the_same_replicates() -> None:
    random = np.random.default_rng(0)
    patients, target = cohort(60, 25)
    arms = {arm: [random.dirichlet([1, 1], len(target)) for _ in range(3)] for arm in ("random", "pretrained")}
    weights = bootstrap_weights(patients, 50, seed=0)
    estimates = summarise(arms, target, weights, reference="random")
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
    for each in summarise({"a": [scores], "b": [scores]}, target, weights, reference="a"):
        if each.arm == "b":
            assert each.difference == Interval(0.0, 0.0, 0.0, each.value.dropped)
            assert math.isnan(each.draw_sd)


def test_replicates_of_one_class_are_dropped_and_counted() -> None:
    patients, target = np.array([b"a", b"b", b"c", b"d"]), np.array([0, 0, 0, 1])
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    weights = bootstrap_weights(patients, 200, seed=0)
    lacking = int(((weights[:, 3] == 0) | (weights[:, 3] == 4)).sum())
    assert lacking > 0
    assert {each.value.dropped for each in summarise({"arm": [scores]}, target, weights)} == {lacking}


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


def test_a_patient_who_leaves_does_not_move_the_others() -> None:
    patients, target = cohort(60, 20)
    (before,), _ = draws(patients, target, parse("k=5"), seeds=(0,))
    absent = next(patient for patient in patients if patient not in drawn(patients, before))
    kept = patients != absent
    (after,), _ = draws(patients[kept], target[kept], parse("k=5"), seeds=(0,))
    assert drawn(patients[kept], after) == drawn(patients, before)
