"""The temperature is found again, thresholds are Youden's by brute force, and what val cannot decide is left alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.evaluation.calibration import COOLEST, HOTTEST, temperature, thresholds
from sslmed.evaluation.metrics import auroc, brier, ece, f1


def softmax(logits: np.ndarray) -> np.ndarray:
    high = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(high / high.sum(axis=1, keepdims=True))


def drawn(count: int, classes: int, true: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and targets drawn from softmax(logits / true)."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, classes)) * 4
    chance = softmax(logits / true).cumsum(axis=1)
    return logits, (random.uniform(size=(count, 1)) > chance[:, :-1]).sum(axis=1)


@pytest.mark.parametrize("true", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_known_temperature_is_found(true: float, classes: int) -> None:
    logits, target = drawn(20_000, classes, true)
    assert temperature(logits, target) == pytest.approx(true, rel=0.05)


def test_a_known_temperature_of_findings_is_found_on_what_is_known() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(10_000, 3)) * 4
    target = (random.uniform(size=logits.shape) < 1 / (1 + np.exp(-logits / 2.5))).astype(np.int64)
    assert temperature(logits, target) == pytest.approx(2.5, rel=0.05)
    hidden = random.uniform(size=target.shape) < 0.3
    wrong = np.where(hidden, 1 - target, target)  # what is hidden must not count
    known = np.where(hidden, -1, target)
    assert temperature(logits, known) == pytest.approx(2.5, rel=0.05)
    assert temperature(logits, wrong) > 4


@pytest.mark.parametrize("classes", [2, 4])
def test_no_other_temperature_is_likelier(classes: int) -> None:
    logits, target = drawn(60, classes, 2.0, seed=3)
    found = temperature(logits, target)

    def loss(t: float) -> float:
        return float(F.cross_entropy(torch.from_numpy(logits / t), torch.from_numpy(target)))

    grid = np.geomspace(COOLEST, HOTTEST, 500)
    assert loss(found) <= min(loss(t) for t in grid) + 1e-9
    findings = (np.arange(120).reshape(60, 2) * 7 % 3 == 0).astype(np.int64)
    pair = logits[:, :2]
    found = temperature(pair, findings)
    loss_of = [
        float(F.binary_cross_entropy_with_logits(torch.from_numpy(pair / t), torch.from_numpy(findings).double()))
        for t in (found, *grid)
    ]
    assert loss_of[0] <= min(loss_of) + 1e-6  # a search within bounds ends a step before the bound


def test_it_mends_confidence_and_leaves_ranking_alone() -> None:
    logits, target = drawn(4000, 2, 3.0)
    other, unseen = drawn(4000, 2, 3.0, seed=1)
    found = temperature(logits, target)
    before, after = softmax(other), softmax(other / found)
    assert ece(unseen, before) > 0.1
    assert ece(unseen, after) < 0.03
    assert brier(unseen, after) < brier(unseen, before)
    assert auroc(unseen, after) == pytest.approx(auroc(unseen, before), abs=1e-9)
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))


def test_it_is_bounded() -> None:
    apart = np.array([[4.0, -4.0], [-3.0, 3.0]])
    assert temperature(apart, np.array([0, 1])) == pytest.approx(COOLEST, rel=1e-4)
    assert temperature(apart, np.array([1, 0])) == pytest.approx(HOTTEST, rel=1e-4)
    assert temperature(1e4 * apart, np.array([0, 1])) >= COOLEST  # no overflow either
    assert temperature(apart, np.full((2, 2), -1)) == 1.0
    assert COOLEST <= temperature(np.zeros((4, 2)), np.array([0, 1, 1, 0])) <= HOTTEST


def youden(positive: np.ndarray, scores: np.ndarray, cut: float) -> float:
    return float((scores[positive] >= cut).mean() + (scores[~positive] < cut).mean() - 1)


@given(count=st.integers(1, 20), levels=st.sampled_from([1, 2, 4, 1000]), seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_thresholds_are_youdens(count: int, levels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    target, high = random.integers(0, 2, count), random.integers(0, levels + 1, count) / levels
    low, cut = thresholds(target, np.stack([1 - high, high], axis=1))
    assert low == 1 - cut
    (alone,) = thresholds(target[:, None], high[:, None])
    assert alone == cut
    positive = target == 1
    if positive.all() or not positive.any():
        assert cut == 0.5
        return
    distinct = np.unique(high)
    middles = (distinct[1:] + distinct[:-1]) / 2
    gains = np.array([youden(positive, high, middle) for middle in middles])
    if gains.max(initial=0) <= 1e-12:
        assert cut == 0.5
        return
    best = middles[gains > gains.max() - 1e-12]
    assert youden(positive, high, cut) == pytest.approx(gains.max())
    assert cut == pytest.approx(min(best, key=lambda each: (abs(each - 0.5), each)))
    assert cut not in high


def test_thresholds_of_findings_and_of_many_classes() -> None:
    target = np.array([[0, 1, -1], [1, 1, -1], [-1, 1, -1], [0, -1, -1]])
    scores = np.array([[0.1, 0.9, 0.9], [0.3, 0.1, 0.2], [0.01, 0.3, 0.1], [0.2, 0.3, 0.2]])
    np.testing.assert_allclose(thresholds(target, scores), [0.25, 0.5, 0.5])
    assert thresholds(np.array([0, 1, 2]), np.eye(3)) is None


def test_of_equally_good_cuts_the_one_nearest_to_a_half_is_taken() -> None:
    target = np.array([0, 0, 1, 0, 1, 0, 1, 1])
    for scores, cut in (
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 0.45),
        ([0.1, 0.2, 0.21, 0.22, 0.24, 0.38, 0.44, 0.9], 0.41),
        ([0.6, 0.7, 0.8, 0.82, 0.84, 0.86, 0.9, 0.95], 0.75),
    ):
        assert thresholds(target[:, None], np.array(scores)[:, None]) == pytest.approx([cut])


def test_neighbouring_floats_are_parted() -> None:
    low = 0.25
    high = np.nextafter(low, 1)
    (cut,) = thresholds(np.array([[0], [1]]), np.array([[low], [high]]))
    assert low < cut <= high


def test_tuned_decisions_are_better_where_scores_are_skewed() -> None:
    random = np.random.default_rng(0)
    target = random.integers(0, 2, 400)
    high = 0.2 * random.uniform(size=400) + 0.1 * target
    scores = np.stack([1 - high, high], axis=1)
    cuts = thresholds(target[:200], scores[:200])
    assert f1(target[200:], scores[200:]) == 0
    assert f1(target[200:], scores[200:], thresholds=cuts) > 0.6
