"""What is written is read, for classes and findings, and runs are compared patient by patient."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.evaluation import metrics, predictions, protocol
from sslmed.evaluation.predictions import NAME, Predictions, compare, read

PATIENTS = 20
RANDOM = np.random.default_rng(0)


def made(skill: float, seed: int = 0, **changes: Any) -> Predictions:
    """Predictions of two images a patient; ``skill`` 0 guesses."""
    target = np.repeat(np.arange(PATIENTS) % 2, 2)
    noise = np.random.default_rng(seed).normal(size=2 * PATIENTS)
    high = 1 / (1 + np.exp(-(skill * (2 * target - 1) + noise)))
    patients = np.repeat(np.array([f"{number:032x}".encode() for number in range(PATIENTS)], "S32"), 2)
    rows = np.arange(100, 100 + 2 * PATIENTS)
    whole = Predictions(rows, patients, target.astype(np.int64), np.column_stack([1 - high, high]), ("clear", "nodule"))
    return replace(whole, **changes)


def runs(folder: Path, *each: Predictions) -> list[Path]:
    paths = [folder / str(number) for number in range(len(each))]
    for path, one in zip(paths, each, strict=True):
        path.mkdir(parents=True)
        one.write(path)
    return paths


def test_what_is_written_is_read(tmp_path: Path) -> None:
    whole = made(1, classes=("no, never", 'a "nodule"'))
    (path,) = runs(tmp_path, whole)
    again = read(path)
    assert again.same_test(whole)
    np.testing.assert_allclose(again.scores, whole.scores, rtol=1e-8)
    np.testing.assert_allclose(again.scores.sum(axis=1), 1, rtol=1e-8)
    assert list(path.iterdir()) == [path / NAME]


def test_the_file_is_for_people_too(tmp_path: Path) -> None:
    (path,) = runs(tmp_path, made(1))
    header, first, *_ = (path / NAME).read_text().splitlines()
    assert header == "row,patient,target,probability:clear,probability:nodule,called:clear,called:nodule"
    assert first.startswith(f"100,{0:032x},clear,0.")


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "row,patient\n1,2\n",
        "row,patient,target\n1,b,a\n",
        "row,patient,target,probability:a\n1,y,a,1\n",
        "row,patient,target,probability:a,called:a\nx,y,a,1,1\n",
        "row,patient,target,probability:a,called:a\n1,y,b,1,1\n",
        "row,patient,target,probability:a,called:a\n1,y,a,1,yes\n",
        "row,patient,target,probability:a,called:a\n1,y,a,1\n",
        "row,patient,target,probability:a,called:a\n1,y,a,0.5,0.5,1\n",
        "row,patient,target:a,probability:b,called:b\n1,y,1,1,1\n",
        "row,patient,target:a,probability:a,called:a\n1,y,2,1,1\n",
    ],
)
def test_what_is_no_prediction_is_a_data_error(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match=NAME):
        read(tmp_path)


def findings(skill: float, seed: int = 0) -> Predictions:
    """Two findings of the images of ``made``, some unknown."""
    whole = made(skill, seed)
    target = np.stack([whole.target, 1 - whole.target], axis=1)
    target[::5, 0], target[3, 1] = -1, -1
    return replace(whole, target=target, thresholds=np.array([0.3, 0.6]))


def test_findings_are_written_with_what_is_unknown_blank(tmp_path: Path) -> None:
    whole = findings(1)
    (path,) = runs(tmp_path, whole)
    header, first, second, *_ = (path / NAME).read_text().splitlines()
    names = (
        "target:clear",
        "target:nodule",
        "probability:clear",
        "probability:nodule",
        "called:clear",
        "called:nodule",
    )
    assert header == ",".join(("row", "patient", *names))
    assert first.startswith(f"100,{0:032x},,1,0.")
    assert second.startswith(f"101,{0:032x},0,1,0.")
    again = read(path)
    assert again.same_test(whole)
    assert again.target.dtype == np.int64
    np.testing.assert_allclose(again.scores, whole.scores, rtol=1e-8)
    np.testing.assert_array_equal(again.called, whole.called)
    assert 0 < whole.called.mean() < 1


def test_findings_and_thresholds_are_compared(tmp_path: Path) -> None:
    better, base = findings(2, 1), replace(findings(0.5, 2), thresholds=None)
    paths = runs(tmp_path, better, base)
    at_hand = compare({"pretrained": [better], "random": [base]}, "random", replicates=50)
    read_again = compare({"pretrained": paths[:1], "random": paths[1:]}, "random", 50)
    for one, other in zip(at_hand, read_again, strict=True):
        assert one.value.mean == pytest.approx(other.value.mean)
    found = {(each.arm, each.metric): each.value.mean for each in at_hand}
    for name, metric in metrics.METRICS.items():
        want = metric(better.target, better.scores, thresholds=np.array([0.3, 0.6]))
        assert found["pretrained", name] == pytest.approx(want)
    plain = replace(better, thresholds=None)
    uncut = {(each.arm, each.metric): each.value.mean for each in compare({"pretrained": [plain]}, "pretrained", 50)}
    assert uncut["pretrained", "recall"] != found["pretrained", "recall"]
    assert uncut["pretrained", "auroc"] == pytest.approx(found["pretrained", "auroc"])


def test_arms_are_compared_patient_by_patient(tmp_path: Path) -> None:
    better = [made(2, seed) for seed in (1, 2, 3)]
    base = [made(0.5, seed) for seed in (1, 2, 3)]
    arms = {"pretrained": runs(tmp_path / "a", *better), "random": runs(tmp_path / "b", *base)}
    estimates = {(each.arm, each.metric): each for each in compare(arms, "random", replicates=300)}
    auroc = estimates["pretrained", "auroc"]
    expected = {
        arm: np.mean([metrics.auroc(one.target, one.scores) for one in each])
        for arm, each in (("pretrained", better), ("random", base))
    }
    assert auroc.value.mean == pytest.approx(expected["pretrained"])
    assert auroc.difference is not None
    assert auroc.difference.mean == pytest.approx(expected["pretrained"] - expected["random"])
    assert estimates["random", "auroc"].difference is None
    # paired: what makes a replicate hard for one arm makes it hard for the other, so the difference varies less
    unpaired = np.hypot(
        auroc.value.high - auroc.value.low,
        estimates["random", "auroc"].value.high - estimates["random", "auroc"].value.low,
    )
    assert auroc.difference.high - auroc.difference.low < unpaired


def test_an_arm_against_itself_differs_by_exactly_nothing(tmp_path: Path) -> None:
    paths = runs(tmp_path, made(1))
    for each in compare({"one": paths, "other": paths}, "other", replicates=100):
        if each.difference is not None:
            assert (each.difference.mean, each.difference.low, each.difference.high) == (0, 0, 0)


def test_patients_are_resampled_not_images(tmp_path: Path) -> None:
    """Twice the same image of each patient says no more than one of them."""
    twice = made(0.7)
    once = Predictions(*(getattr(twice, name)[::2] for name in ("row", "patient", "target", "scores")), twice.classes)
    doubled = replace(twice, scores=np.repeat(once.scores, 2, axis=0))
    (narrow,), (wide,) = ([path] for path in runs(tmp_path, doubled, once))
    intervals = [
        next(each.value for each in compare({"arm": [path]}, "arm", replicates=200) if each.metric == "auroc")
        for path in (narrow, wide)
    ]
    assert intervals[0] == intervals[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"row": np.arange(2 * PATIENTS)},
        {"patient": np.array([b"somebody else"] * 2 * PATIENTS, "S32")},
        {"target": np.zeros(2 * PATIENTS, np.int64)},
        {"classes": ("clear", "effusion")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_that_were_tested_on_something_else_are_not_compared(changes: dict[str, Any], tmp_path: Path) -> None:
    one, other = runs(tmp_path, made(1), made(1, **changes))
    with pytest.raises(DataError, match="tested on different images"):
        compare({"one": [one], "other": [other]}, "one")
    with pytest.raises(DataError, match="tested on different images"):
        compare({"one": [one, other]}, "one")


def test_the_default_number_of_replicates_is_the_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    weights = protocol.bootstrap_weights

    def noted(patients: Any, replicates: int, seed: int) -> Any:
        asked.append((replicates, seed))
        return weights(patients, 10, seed)

    monkeypatch.setattr(predictions.protocol, "bootstrap_weights", noted)
    compare({"one": runs(tmp_path, made(1))}, "one")
    assert asked == [(1000, 0)]  # as in finetune, so that its own intervals come out again
