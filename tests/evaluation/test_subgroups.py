"""Subgroups hold the right images, and their values are those of the images alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.evaluation.metrics import METRICS, Scored, auroc, measures
from sslmed.evaluation.protocol import bootstrap_weights
from sslmed.evaluation.subgroups import LEAST_PATIENTS, TooSmall, groups, table


def test_categories_are_groups_and_blanks_are_one() -> None:
    found = groups(np.array([0, 2, -1, 0]), ("f", "m", "other"))
    assert {name: members.tolist() for name, members in found.items()} == {
        "f": [True, False, False, True],
        "other": [False, True, False, False],
        "unknown": [False, False, True, False],
    }
    joined = groups(np.array([0, -1, 1]), ("unknown", "m"))
    assert {name: members.tolist() for name, members in joined.items()} == {
        "unknown": [True, True, False],
        "m": [False, False, True],
    }


def test_numbers_are_cut_at_their_tertiles() -> None:
    ages = np.array([90.0, 10, 20, np.nan, 30, 40, 50, 60])
    found = groups(ages)
    assert list(found) == ["up to 30", "above 30 to 50", "above 50", "unknown"]
    assert [sorted(ages[members].tolist()) for members in list(found.values())[:3]] == [
        [10, 20, 30],
        [40, 50],
        [60, 90],
    ]
    assert found["unknown"].tolist() == np.isnan(ages).tolist()


def test_few_numbers_are_groups_of_their_own() -> None:
    found = groups(np.array([1.0, 0, 1, 1.5]))
    assert {name: int(members.sum()) for name, members in found.items()} == {"0": 1, "1": 2, "1.5": 1}


@given(values=st.lists(st.floats(allow_infinity=False, width=32), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_every_image_is_in_one_group(values: list[float]) -> None:
    found = groups(np.array(values))
    assert np.sum(list(found.values()), axis=0).tolist() == [1] * len(values)
    assert all(members.dtype == bool for members in found.values())


def test_values_are_those_of_the_images_alone() -> None:
    random = np.random.default_rng(0)
    patients = np.repeat(np.array([b"%02d" % index for index in range(30)]), 2)
    target, sex = np.arange(60) // 2 % 2, np.repeat(np.arange(30) % 3, 2)
    sex[: 2 * LEAST_PATIENTS - 2][sex[: 2 * LEAST_PATIENTS - 2] < 3] = 3
    arms = {name: [Scored(random.dirichlet([1, 1], 60)) for _ in range(2)] for name in ("model", "base")}
    weights = bootstrap_weights(patients, 200, seed=0)
    members = groups(sex, ("a", "b", "c", "small"))
    measured, skipped = table(members, patients, arms, measures(target), weights, reference="base")
    assert skipped == [TooSmall("small", LEAST_PATIENTS - 1)]
    assert [group.name for group in measured] == ["a", "b", "c"]
    for group in measured:
        inside = members[group.name]
        assert (group.patients, group.images) == (len(set(patients[inside].tolist())), inside.sum())
        assert [(each.metric, each.arm) for each in group.estimates] == [(m, arm) for m in METRICS for arm in arms]
        first = group.estimates[0]
        points = [auroc(target[inside], scored.scores[inside]) for scored in arms["model"]]
        replicates = np.mean(
            [auroc(target[inside], scored.scores[inside], weights[:, inside]) for scored in arms["model"]], axis=0
        )
        assert first.value.mean == pytest.approx(np.mean(points))
        assert first.draw_sd == pytest.approx(np.std(points, ddof=1))
        assert (first.value.low, first.value.high) == pytest.approx(tuple(np.nanpercentile(replicates, [2.5, 97.5])))
        assert first.difference is not None


def test_a_group_of_one_class_is_undefined_not_zero() -> None:
    patients = np.array([b"%02d" % index for index in range(20)])
    target, sex = np.arange(20) // 10, np.arange(20) // 10
    scores = Scored(np.random.default_rng(0).dirichlet([1, 1], 20))
    weights = bootstrap_weights(patients, 100, seed=0)
    measured, _ = table(groups(sex, ("f", "m")), patients, {"model": [scores]}, measures(target), weights)
    assert all(
        np.isnan(each.value.mean) and each.value.dropped == 100 for group in measured for each in group.estimates
    )
