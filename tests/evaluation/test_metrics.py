"""Our metrics against scikit-learn's and torchmetrics', one weight vector at a time, ties and zero weights included."""

import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.evaluation.metrics import (
    LOWER_IS_BETTER,
    METRICS,
    Scored,
    auroc,
    average_precision,
    balanced_accuracy,
    brier,
    ece,
    f1,
    mcc,
    measures,
    one_versus_rest,
    precision,
    recall,
    sensitivity_at_90_specificity,
    specificity_at_90_sensitivity,
)


class Case(NamedTuple):
    target: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray | None


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few distinct scores, so that ties are common; weights with many zeros, fractions too; unknown findings."""
    findings = draw(st.booleans())
    columns = draw(st.integers(1, 3)) if findings else draw(st.integers(2, 4))
    count = draw(st.integers(2, 24))
    replicates = draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    raw = random.integers(1, levels + 1, (count, columns)).astype(float)
    weights = random.integers(0, 4, (replicates, count)) * draw(st.sampled_from([1.0, 0.3]))
    thresholds = random.choice([0.2, 0.5, 0.9], columns) if draw(st.booleans()) else None
    if findings:
        return Case(random.integers(-1, 2, (count, columns)), raw / (levels + 1), weights, thresholds)
    return Case(random.integers(0, columns, count), raw / raw.sum(axis=1, keepdims=True), weights, thresholds)


def problems(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each class or finding what is true, its score, what is called, and where it is known."""
    target, scores, _, cuts = case
    columns = scores.shape[1]
    if target.ndim == 2:
        for k in range(columns):
            yield target[:, k] == 1, scores[:, k], scores[:, k] >= (0.5 if cuts is None else cuts[k]), target[:, k] >= 0
    elif columns == 2:
        called = scores[:, 1] > scores[:, 0] if cuts is None else scores[:, 1] >= cuts[1]
        yield target == 1, scores[:, 1], called, np.ones(len(target), bool)
    else:
        for k in range(columns):
            yield target == k, scores[:, k], scores.argmax(axis=1) == k, np.ones(len(target), bool)


def calibration_error(confidence: np.ndarray, right: np.ndarray, weight: np.ndarray) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    total = 0.0
    for number in range(15):
        low, high = number / 15 + 1e-9, (number + 1) / 15 + 1e-9
        inside = (confidence > low) & (confidence <= high)
        if weight[inside].sum() > 0:
            gap = np.average(right[inside], weights=weight[inside]) - np.average(
                confidence[inside], weights=weight[inside]
            )
            total += weight[inside].sum() / weight.sum() * abs(gap)
    return total


def best_share(truth: np.ndarray, score: np.ndarray, weight: np.ndarray, sensitivity: bool) -> float:
    alarms, hits, _ = sk.roc_curve(truth, score, sample_weight=weight, drop_intermediate=False)
    best, kept = (hits, 1 - alarms) if sensitivity else (1 - alarms, hits)
    return float(best[kept >= 0.9 - 1e-9].max())


def binary(name: str, truth: np.ndarray, score: np.ndarray, called: np.ndarray, weight: np.ndarray) -> float:
    """scikit-learn on one problem whose two sides have weight."""
    if name in ("sensitivity_at_90_specificity", "specificity_at_90_sensitivity"):
        return best_share(truth, score, weight, name.startswith("sensitivity"))
    if name == "ece":
        return calibration_error(np.maximum(score, 1 - score), (score > 0.5) == truth, weight)
    if name == "mcc" and len(set(called.tolist())) == 1:
        return 0.0  # scikit-learn's rule, which with fractional weights it misses by a rounding
    if name in ("auroc", "average_precision", "brier"):
        score_of = {
            "auroc": sk.roc_auc_score,
            "average_precision": sk.average_precision_score,
            "brier": sk.brier_score_loss,
        }
        return float(score_of[name](truth, score, sample_weight=weight))
    kind: dict[str, Any] = {"sample_weight": weight}
    if name in ("f1", "precision", "recall"):
        kind["zero_division"] = 0.0
    named = {"f1": sk.f1_score, "precision": sk.precision_score, "recall": sk.recall_score, "mcc": sk.matthews_corrcoef}
    named["balanced_accuracy"] = sk.balanced_accuracy_score
    return float(named[name](truth, called, **kind))


def oracle(name: str, case: Case, weight: np.ndarray) -> float:
    """One weight vector, under this package's rule for classes without weight."""
    many = case.target.ndim == 1 and case.scores.shape[1] > 2
    kept = weight > 0
    if many and name in ("ece", "brier", "balanced_accuracy"):
        target, scores, w = case.target[kept], case.scores[kept], weight[kept]
        if len(set(target.tolist())) < 2:
            return float("nan")
        if name == "ece":
            return calibration_error(scores.max(axis=1), scores.argmax(axis=1) == target, w)
        if name == "brier":
            labels = list(range(scores.shape[1]))
            return float(sk.brier_score_loss(target, scores, sample_weight=w, labels=labels))
        return float(sk.balanced_accuracy_score(target, scores.argmax(axis=1), sample_weight=w))
    values = []
    for truth, score, called, known in problems(case):
        rows = known & kept
        if len(set(truth[rows].tolist())) == 2:
            values.append(binary(name, truth[rows], score[rows], called[rows], weight[rows]))
    return float(np.mean(values)) if values else float("nan")


@pytest.mark.parametrize("name", sorted(METRICS))
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_equals_scikit_learn(name: str, case: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = METRICS[name](case.target, case.scores, case.weights, thresholds=case.thresholds)
        alone = METRICS[name](case.target, case.scores, case.weights[0], thresholds=case.thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = [oracle(name, case, weight) for weight in case.weights]
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert isinstance(alone, float)
    assert alone == pytest.approx(want[0], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", sorted(METRICS))
@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_replicates_equal_a_loop_and_blocks_change_nothing(name: str, case: Case) -> None:
    target, scores, weights, thresholds = case
    whole = METRICS[name](target, scores, weights, thresholds=thresholds)
    loop = [METRICS[name](target, scores, weight, thresholds=thresholds) for weight in weights]
    np.testing.assert_allclose(whole, loop, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslmed.evaluation.problems._BLOCK_CELLS", 1)
        np.testing.assert_allclose(METRICS[name](target, scores, weights, thresholds=thresholds), whole, atol=1e-12)


@pytest.mark.parametrize("name", sorted(METRICS))
@given(case=cases(), label=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_one_class_against_the_rest(name: str, case: Case, label: int) -> None:
    label %= case.scores.shape[1]
    truth, score, called, known = _of(case, label)
    alone = one_versus_rest(case.target, case.scores, label, case.thresholds)
    got = METRICS[name](alone.target, alone.scores, case.weights, thresholds=alone.thresholds)
    for value, weight in zip(got, case.weights, strict=True):
        rows = known & (weight > 0)
        if len(set(truth[rows].tolist())) < 2:
            assert np.isnan(value)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert value == pytest.approx(binary(name, truth[rows], score[rows], called[rows], weight[rows]), abs=1e-9)


def _of(case: Case, label: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    each = list(problems(case))
    if len(each) == case.scores.shape[1]:
        return each[label]
    ((truth, _, called, known),) = each  # of two classes
    return (truth, case.scores[:, 1], called, known) if label else (~truth, case.scores[:, 0], ~called, known)


def test_a_finding_alone_is_the_same_as_two_classes() -> None:
    random = np.random.default_rng(0)
    target, high = random.integers(0, 2, 50), random.uniform(size=50)
    for metric in METRICS.values():
        two = metric(target, np.stack([1 - high, high], axis=1))
        assert metric(target[:, None], high[:, None]) == pytest.approx(two)


def test_macro_auroc_equals_scikit_learns_own_average() -> None:
    random = np.random.default_rng(0)
    target, scores = np.arange(60) % 3, random.dirichlet(np.ones(3), 60)
    labels = {"multi_class": "ovr", "average": "macro"}
    assert auroc(target, scores) == pytest.approx(sk.roc_auc_score(target, scores, **labels))


@pytest.mark.parametrize("classes", [2, 5])
def test_ece_and_cuts_equal_torchmetrics(classes: int) -> None:
    from torchmetrics.functional.classification import (
        binary_sensitivity_at_specificity,
        binary_specificity_at_sensitivity,
        multiclass_calibration_error,
    )

    random = np.random.default_rng(4)
    target, scores = random.integers(0, classes, 300), random.dirichlet(np.ones(classes), 300)
    as_torch = torch.from_numpy(scores), torch.from_numpy(target)
    want = multiclass_calibration_error(*as_torch, num_classes=classes, n_bins=15, norm="l1")
    assert ece(target, scores) == pytest.approx(float(want), abs=1e-6)
    positive = (target == 1).astype(np.int64)
    given_ = torch.from_numpy(scores[:, 1]), torch.from_numpy(positive)
    alone = positive[:, None], scores[:, [1]]
    sensitivity, _ = binary_sensitivity_at_specificity(*given_, min_specificity=0.9)
    specificity, _ = binary_specificity_at_sensitivity(*given_, min_sensitivity=0.9)
    assert sensitivity_at_90_specificity(*alone) == pytest.approx(float(sensitivity), abs=1e-6)
    assert specificity_at_90_sensitivity(*alone) == pytest.approx(float(specificity), abs=1e-6)


def test_by_hand() -> None:
    target = np.array([0, 0, 1, 1])
    positive = np.array([0.1, 0.4, 0.4, 0.8])
    scores, ones = np.stack([1 - positive, positive], axis=1), np.ones(4)
    assert auroc(target, scores, ones) == pytest.approx(3.5 / 4)
    assert average_precision(target, scores, ones) == pytest.approx((1 + 2 / 3) / 2)
    assert balanced_accuracy(target, scores, ones) == pytest.approx(0.75)
    assert f1(target, scores, ones) == pytest.approx(2 / 3)
    assert (precision(target, scores), recall(target, scores)) == (1, 0.5)
    assert mcc(target, scores) == pytest.approx(1 / np.sqrt(3))
    assert sensitivity_at_90_specificity(target, scores) == 0.5  # the tie at 0.4 would call a negative
    assert specificity_at_90_sensitivity(target, scores) == 0.5
    assert brier(target, scores) == pytest.approx((0.01 + 0.16 + 0.36 + 0.04) / 4)
    assert ece(target, scores) == pytest.approx((0.1 + 2 * abs(0.6 - 0.5) + 0.2) / 4)
    assert f1(target, scores) == f1(target, scores, ones)


def test_the_share_that_must_pass_may_be_reached_exactly() -> None:
    """Nine of ten negatives cleared is enough, by weights that are no binary fractions too."""
    target = np.array([0] * 10 + [1])
    high = np.array([0.1] * 9 + [0.9, 0.5])
    for weight in (1.0, 0.1, 0.3):
        assert sensitivity_at_90_specificity(target[:, None], high[:, None], np.full(11, weight)) == 1.0
        assert specificity_at_90_sensitivity(1 - target[:, None], 1 - high[:, None], np.full(11, weight)) == 1.0
    assert sensitivity_at_90_specificity(target[1:, None], high[1:, None]) == 0.0  # eight of nine is not


def test_certain_probabilities_are_in_the_last_bin() -> None:
    target, scores = np.array([0, 1, 1]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert ece(target, scores) == pytest.approx(1 / 3)
    assert ece(target[:2], scores[:2]) == 0
    assert brier(target, np.column_stack([scores, np.zeros(3)])) == pytest.approx(2 / 3)


def test_only_decisions_read_thresholds() -> None:
    random = np.random.default_rng(0)
    target, scores = random.integers(0, 2, 80), random.dirichlet(np.ones(2), 80)
    moved = {
        name
        for name, metric in METRICS.items()
        if metric(target, scores, thresholds=[0.1, 0.9]) != metric(target, scores)
    }
    assert moved == {"balanced_accuracy", "f1", "precision", "recall", "mcc"}
    three, scores = random.integers(0, 3, 80), random.dirichlet(np.ones(3), 80)
    for metric in METRICS.values():
        assert metric(three, scores, thresholds=[0.9, 0.9, 0.9]) == metric(three, scores)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_class_without_weight(name: str) -> None:
    metric = METRICS[name]
    two = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    got = metric(np.array([0, 1, 1]), two, np.array([[1, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]]))
    assert np.isnan(got).tolist() == [False, True, True, True]
    findings, scores = np.array([[1, 1], [0, 1], [-1, 1]]), np.array([[0.9, 0.2], [0.3, 0.2], [0.1, 0.2]])
    alone = metric(findings[:2, :1], scores[:2, :1])  # the second finding is in no mean, the third image unknown
    assert metric(findings, scores) == pytest.approx(alone)
    assert alone == pytest.approx({"ece": 0.2, "brier": 0.05}[name] if name in LOWER_IS_BETTER else 1.0)
    assert np.isnan(metric(np.array([[-1], [-1]]), np.array([[0.5], [0.5]])))


def test_measures_are_the_metrics_of_a_target() -> None:
    random = np.random.default_rng(0)
    target, scores = random.integers(0, 3, 40), random.dirichlet(np.ones(3), 40)
    weights = random.integers(0, 3, (5, 40))
    found = measures(target)
    assert list(found) == list(METRICS)
    for name, measure in found.items():
        np.testing.assert_array_equal(measure(Scored(scores), weights), METRICS[name](target, scores, weights))
    alone = measures(target, 2)["recall"](Scored(scores, None), None)
    assert alone == pytest.approx(np.mean(scores.argmax(axis=1)[target == 2] == 2))
    findings = np.stack([target == 0, target == 1], axis=1).astype(int)
    cut = Scored(scores[:, :2], np.array([0.2, 0.9]))
    assert measures(findings, 0)["recall"](cut, None) == pytest.approx(np.mean(scores[target == 0, 0] >= 0.2))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_weight_is_a_repetition(name: str) -> None:
    random = np.random.default_rng(1)
    target, scores = random.integers(0, 2, 30), random.dirichlet(np.ones(2), 30).round(1)
    counts = random.integers(0, 4, 30)
    repeated = np.repeat(np.arange(30), counts)
    want = METRICS[name](target[repeated], scores[repeated], np.ones(len(repeated)))
    assert METRICS[name](target, scores, counts) == pytest.approx(want)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_thousand_replicates_take_well_under_a_second(name: str) -> None:
    random = np.random.default_rng(3)
    target, scores = random.integers(0, 2, 1000), random.dirichlet(np.ones(2), 1000)
    weights = random.poisson(1, (1000, 1000)).astype(np.uint16)
    started = time.process_time()
    METRICS[name](target, scores, weights)
    assert time.process_time() - started < 1.5  # about 0.05 s; a loop over scikit-learn takes over 2 s


TWO = np.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("target", "scores", "weights", "word"),
    [
        (np.array([0, 2]), TWO, np.ones(2), "target"),
        (np.array([0, -1]), TWO, np.ones(2), "target"),
        (np.array([0.0, 1.0]), TWO, np.ones(2), "target"),
        (np.array([[0, 2], [0, 1]]), TWO, np.ones(2), "target"),
        (np.array([[0], [1]]), TWO, np.ones(2), "scores"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]), np.ones(2), "finite"),
        (np.array([0, 1]), np.full((2, 1), 0.5), np.ones(2), "scores"),
        (np.array([0, 1]), TWO, np.ones(3), "weights"),
        (np.array([0, 1]), TWO, np.array([1.0, -1.0]), "non-negative"),
    ],
)
def test_refuses(target: np.ndarray, scores: np.ndarray, weights: np.ndarray, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        auroc(target, scores, weights)


def test_refuses_thresholds_and_scores_that_are_none() -> None:
    for thresholds in ([0.5], [0.5, np.nan], [0.5, 0.5, 0.5]):
        with pytest.raises(ValueError, match="thresholds"):
            f1(np.array([0, 1]), TWO, thresholds=thresholds)
    for metric in (ece, brier):
        with pytest.raises(ValueError, match="probabilities"):
            metric(np.array([0, 1]), 3 * TWO)
