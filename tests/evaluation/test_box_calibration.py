import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.data.annotations.boxes import Boxes
from sslmed.evaluation.box_calibration import calibrated, ece, fit, hits, thresholds
from sslmed.evaluation.detections import Detected, Found

TRUE, NEAR, OFF = (0, 0, 10, 10), (0, 0, 10, 6), (50, 50, 60, 60)  # an IoU of 1, 0.6 and 0 with TRUE


def detected(scene: list[tuple[list[Any], list[Any]]]) -> Detected:
    """Of each image (box, class), and (box, score, class) by descending score."""
    truth = [
        Boxes(np.array([b for b, _ in true], np.float32).reshape(-1, 4), np.int16([c for _, c in true]))
        for true, _ in scene
    ]
    found = [
        Found(
            np.array([b for b, _, _ in said], np.float32).reshape(-1, 4),
            np.float64([s for _, s, _ in said]),
            np.int16([c for _, _, c in said]),
        )
        for _, said in scene
    ]
    patients = np.array([b"p"] * len(scene), "S32")
    return Detected(np.arange(len(scene)), patients, tuple(truth), tuple(found), ("nodule", "mass"))


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


def loss(scores: Any, hit: Any, temperature: float, offset: float) -> float:
    p = sigmoid(np.log(scores / (1 - scores)) / temperature + offset)
    return float(-np.where(hit, np.log(p), np.log(1 - p)).mean())


def test_a_hit_takes_a_box_of_its_class_at_half_overlap() -> None:
    said = [(OFF, 0.9, 0), (NEAR, 0.8, 1), (NEAR, 0.7, 0), (TRUE, 0.6, 0), ((0, 0, 10, 4.9), 0.5, 1)]
    found = hits(detected([([(TRUE, 0)], said), ([], []), ([(TRUE, 1)], [(TRUE, 0.1, 1)])]))
    assert [each.tolist() for each in found] == [[False, False, True, False, False], [], [True]]
    assert hits(detected([])) == ()


@pytest.mark.parametrize(("temperature", "offset"), [(1.0, 0.0), (2.0, -1.5), (0.5, 1.0), (4.0, 2.0)])
def test_what_made_the_hits_is_found_again(temperature: float, offset: float) -> None:
    random = np.random.default_rng(0)
    scores = sigmoid(random.normal(0, 2, 100_000))
    hit = random.random(len(scores)) < sigmoid(np.log(scores / (1 - scores)) / temperature + offset)
    found = fit(scores, hit)
    assert found == pytest.approx((temperature, offset), rel=0.04, abs=0.03)
    np.testing.assert_allclose(
        calibrated(scores, *found), sigmoid(np.log(scores / (1 - scores)) / found[0] + found[1]), rtol=1e-7
    )


@given(st.integers(0, 2**32 - 1), st.integers(10, 60))
@settings(deadline=None, max_examples=40)
def test_nothing_near_is_likelier(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    scores, hit = random.random(count) * 0.98 + 0.01, random.random(count) < 0.3
    temperature, offset = fit(scores, hit)
    assert 0.25 <= temperature <= 10
    assert -5 <= offset <= 5
    if hit.all() or not hit.any():
        assert (temperature, offset) == (1, 0)
        return
    best = loss(scores, hit, temperature, offset)
    assert best <= loss(scores, hit, 1, 0) + 1e-12
    for factor in (0.97, 1, 1.03):
        for step in (-0.05, 0, 0.05):
            other = (np.clip(temperature * factor, 0.25, 10), np.clip(offset + step, -5, 5))
            assert best <= loss(scores, hit, *other) + 1e-9


def test_no_fit_leaves_its_bounds() -> None:
    scores = np.linspace(0.01, 0.99, 50)
    assert fit(scores, scores > 0.5)[0] == pytest.approx(0.25)  # parted without a mistake
    assert fit(scores, scores < 0.5)[0] == pytest.approx(10)  # the contrary of what scores say
    rare = np.arange(1000) == 0
    assert fit(np.full(1000, 0.5), rare)[1] == pytest.approx(-5)  # 0.001 is below sigmoid(-5) = 0.0067


def test_scores_of_zero_and_one_are_safe() -> None:
    scores, hit = np.array([0.0, 1.0] * 20), np.array([False, True] * 19 + [True, False])
    temperature, offset = fit(scores, hit)
    assert np.isfinite([temperature, offset]).all()
    assert calibrated(scores, temperature, offset)[:2] == pytest.approx([0.05, 0.95], abs=1e-3)
    assert ((calibrated(scores, 0.25, 5) >= 0) & (calibrated(scores, 0.25, 5) <= 1)).all()


@pytest.mark.parametrize(("count", "share"), [(0, 0.5), (9, 0.5), (50, 0), (50, 1)])
def test_too_little_is_not_fitted(count: int, share: float) -> None:
    assert fit(np.linspace(0.1, 0.9, count), np.arange(count) < share * count) == (1, 0)


def test_the_cut_has_the_largest_f1() -> None:
    # By descending score: hit, false, hit, false, false. F1 is 2/4, 2/5, 4/6, 4/7, 4/8 with three true boxes.
    true = [(TRUE, 0), ((20, 0, 30, 10), 0), ((40, 0, 50, 10), 0)]
    said = [(TRUE, 0.9, 0), (OFF, 0.8, 0), ((20, 0, 30, 10), 0.6, 0), (OFF, 0.5, 0), (OFF, 0.2, 0)]
    found = thresholds(detected([(true, [*said, (OFF, 0.1, 1)]), ([], [])]))
    assert found == pytest.approx((0.55, 0.5))  # of a class without truth nothing is known
    shown = sorted([*said, (OFF, 0.19, 0), (OFF, 0.18, 0)], key=lambda each: -each[1])
    assert thresholds(detected([(true, shown)]))[0] == pytest.approx(0.55)


def test_of_equally_good_cuts_the_highest_is_taken() -> None:
    true = [(TRUE, 0), ((20, 0, 30, 10), 0)]
    # F1 is 2/3, then 2/4, 2/5 and 4/6.
    said = [(TRUE, 0.9, 0), (OFF, 0.7, 0), (OFF, 0.6, 0), ((20, 0, 30, 10), 0.2, 0)]
    assert thresholds(detected([(true, said)]))[0] == pytest.approx(0.8)


def test_equal_scores_are_on_one_side() -> None:
    true = [(TRUE, 0), ((20, 0, 30, 10), 0)]
    said = [(TRUE, 0.6, 0), (OFF, 0.6, 0), ((20, 0, 30, 10), 0.6, 0), (OFF, 0.2, 0)]
    assert thresholds(detected([(true, said)]))[0] == pytest.approx(0.4)


@pytest.mark.parametrize("score", [1.0, 0.3, 5e-324, 0.0])
def test_the_lowest_cut_keeps_the_lowest_score(score: float) -> None:
    cut = thresholds(detected([([(TRUE, 0)], [(TRUE, score, 0)])]))[0]
    assert 0 <= cut <= score
    assert cut == pytest.approx(score / 2)


@pytest.mark.parametrize("upper", [0.7, float(np.nextafter(0.7, 1))])  # their middle is rounded up, and down
def test_neighbouring_floats_are_parted(upper: float) -> None:
    lower = float(np.nextafter(upper, 0))
    assert thresholds(detected([([(TRUE, 0)], [(TRUE, upper, 0), (OFF, lower, 0)])]))[0] == upper


@pytest.mark.parametrize("said", [[], [(OFF, 0.9, 0)], [(TRUE, 0.9, 1)]])
def test_without_a_hit_the_cut_is_a_half(said: list[Any]) -> None:
    assert thresholds(detected([([(TRUE, 0)], said)])) == (0.5, 0.5)


def test_ece_is_the_gap_between_score_and_share_of_hits() -> None:
    random = np.random.default_rng(0)
    scores = random.random(500)
    hit = random.random(500) < scores**2
    edges = np.linspace(0, 1, 16)
    expected = 0.0
    for low, high in pairwise(edges):
        own = (scores > low) & (scores <= high)
        expected += abs(scores[own].mean() - hit[own].mean()) * own.mean() if own.any() else 0
    assert ece(scores, hit) == pytest.approx(expected, abs=1e-12)
    # Scores that say nothing, of which few are hits: a half on average is half wrong, and no sides cancel.
    assert ece(scores, np.arange(500) == 0) == pytest.approx(scores.mean(), abs=0.01)
    assert ece(calibrated(scores, *fit(scores, hit)), hit) < ece(scores, hit) / 2


@pytest.mark.parametrize("count", [0, 5])
def test_ece_of_one_side_is_undefined(count: int) -> None:
    assert math.isnan(ece(np.full(count, 0.5), np.ones(count, bool)))
    assert math.isnan(ece(np.full(count, 0.5), np.zeros(count, bool)))
