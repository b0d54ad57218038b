"""Draws are nested, stratified where they should be, by patient and independent of row order."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.config import UsageError
from sslmed.evaluation.budgets import Budget, Draw, default_budgets, draws, parse


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


def test_a_patient_who_leaves_does_not_move_the_others() -> None:
    patients, target = cohort(60, 20)
    (before,), _ = draws(patients, target, parse("k=5"), seeds=(0,))
    absent = next(patient for patient in patients if patient not in drawn(patients, before))
    kept = patients != absent
    (after,), _ = draws(patients[kept], target[kept], parse("k=5"), seeds=(0,))
    assert drawn(patients[kept], after) == drawn(patients, before)


def findings(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Patients with one to three images and three findings: common, rarer, rare; many have none."""
    random = np.random.default_rng(seed)
    images = random.integers(1, 4, count)
    patients = np.repeat(np.array([b"patient%04d" % index for index in range(count)], dtype="S32"), images)
    target = (random.uniform(size=(len(patients), 3)) < [0.4, 0.15, 0.08]).astype(np.int64)
    target[0], target[-1] = [1, 1, 1], [0, 0, 0]
    return patients, target


def shown(patients: np.ndarray, target: np.ndarray, who: set[bytes]) -> np.ndarray:
    """(3,) how many of the patients show each finding."""
    return np.array([len(set(patients[target[:, k] == 1].tolist()) & who) for k in range(target.shape[1])])


@given(count=st.integers(40, 100), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_draws_of_findings_show_every_finding(count: int, seed: int) -> None:
    patients, target = findings(count, seed)
    everyone = set(patients.tolist())
    none = {each for each in everyone if not (target[patients == each] == 1).any()}
    chosen, skipped = draws(patients, target, parse("k=1,k=2,10%,50%,100%"), seeds=(0, 1))
    assert {part.budget for part in skipped} <= {"k=2", "10%"}
    for which in (0, 1):
        own = [each for each in chosen if each.seed == which]
        for draw in own:
            who = drawn(patients, draw)
            least = draw.budget.each or 1
            assert (shown(patients, target, who) >= least).all()
            assert bool(none & who) == bool(none)
            assert np.array_equal(np.flatnonzero(np.isin(patients, list(who))), draw.rows)
        shares = [drawn(patients, draw) for draw in own if draw.budget.share]
        each = [drawn(patients, draw) for draw in own if draw.budget.each]
        assert all(small <= large for row in (shares, each) for small, large in pairwise(row))


def test_classes_as_what_is_shown_give_the_draws_of_classes() -> None:
    patients, target = cohort(60, 20)
    for budgets in ("k=3,k=20,10%,100%", "1%,k=21"):
        one, skipped = draws(patients, target, parse(budgets), seeds=(0, 1))
        other, also = draws(patients, target[:, None] == np.arange(2), parse(budgets), seeds=(0, 1))
        assert [a.rows.tolist() for a in one] == [b.rows.tolist() for b in other]
        assert skipped == also


def test_unknown_and_unlabelled_rows_are_never_drawn() -> None:
    patients, target = findings(60)
    target[::4] = -1
    chosen, _ = draws(patients, target, parse("50%,100%"), seeds=(0,))
    assert all((target[draw.rows] >= 0).any() for draw in chosen)
    assert chosen[1].everyone


@given(count=st.integers(20, 60), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_without_strata_k_counts_patients_in_all(count: int, seed: int) -> None:
    patients, _ = cohort(count, 5, seed)
    target = np.ones((len(patients), 2), bool)  # every image shows both classes, as masks do
    chosen, skipped = draws(patients, target, parse("k=5,k=20,10%,100%"), seeds=(0, 1), stratified=False)
    assert not skipped
    sizes = {"k=5": 5, "k=20": 20, "10%": math.floor(count / 10 + 0.5), "100%": count}
    for which in (0, 1):
        own = {draw.budget.text: drawn(patients, draw) for draw in chosen if draw.seed == which}
        assert {text: len(who) for text, who in own.items()} == sizes
        ordered = sorted(own.values(), key=len)
        assert all(small <= large for small, large in pairwise(ordered))


def test_without_strata_chance_alone_decides() -> None:
    """One patient of forty shows the first class: strata draw it always, chance seldom, and then it is skipped."""
    patients = np.array([b"%02d" % index for index in range(40)])
    target = np.stack([np.arange(40) == 7, np.arange(40) >= 0], axis=1)
    budgets = parse("k=4,k=41,100%")
    chosen, skipped = draws(patients, target, budgets, seeds=range(9), stratified=False, classes=("lesion", "organ"))
    assert {draw.budget.text for draw in chosen} == {"100%"}
    assert skipped[0].why == "no lesion in a draw of 4 of 40 labelled training patients"
    assert skipped[1].why == "there are 40 labelled training patients"
    alone = [len(draws(patients, target, budgets[:1], seeds=(seed,), stratified=False)[0]) for seed in range(60)]
    assert 1 <= sum(alone) <= 15  # by chance 6


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("k=3", "rare is shown by 2 labelled training patients"),
        ("5%", "below one patient a class: no rare, no patient without any finding in a draw of 1 of 22 labelled"),
    ],
)
def test_what_is_skipped_names_the_missing(budget: str, why: str) -> None:
    patients = np.array([b"%02d" % index for index in range(22)])
    common, rare = np.arange(22) < 18, np.arange(22) >= 20
    target = np.stack([common, rare], axis=1)
    _, (skipped,) = draws(patients, target, parse(budget), seeds=(0,), classes=("common", "rare"))
    assert skipped.why.startswith(why)


def test_a_class_counts_with_every_patient_who_shows_it() -> None:
    """Two patients have the common class alone; with those of the rarer one who have both there are five."""
    patients = np.array([b"%02d" % index for index in range(7)])
    target = np.array([[1, 0]] * 2 + [[1, 1]] * 3 + [[0, 1]] + [[0, 0]])
    (draw,), skipped = draws(patients, target, parse("k=4"), seeds=(0,))
    assert not skipped
    assert draw.patients == 7


def test_default_budgets() -> None:
    assert default_budgets(199) == "k=1,k=5,k=10,100%"
    assert default_budgets(200) == "1%,10%,100%"
    assert default_budgets(20, drawn=True) == "k=5,k=20,100%"
    for wanted in ((50, {}), (5000, {}), (50, {"drawn": True})):
        options: dict[str, Any] = wanted[1]
        assert parse(default_budgets(wanted[0], **options))
