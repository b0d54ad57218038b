"""Robust outliers: by deviations where numbers vary, by a factor where they do not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslmed.data.checks.outliers import ENOUGH, astray


def places(values: list[float]) -> list[int]:
    return [place for place, _ in astray(np.array(values))]


def test_one_that_differs_among_equal_ones() -> None:
    assert astray(np.array([1.0, 1.0, 1.2, 1.0, 1.0])) == [(2, 1.0)]
    assert places([1.0, 1.0, 1.04, 1.0, 1.0]) == []  # less than 5 % is the same


def test_the_deviation_is_scaled_to_how_much_they_vary() -> None:
    usual = [0.9, 0.95, 1.0, 1.05, 1.1] * 20  # MAD 0.05: five scaled ones are 0.37
    assert places([*usual, 1.36]) == []
    assert places([*usual, 1.38]) == [100]
    assert places([*usual, 0.62]) == [100]


@pytest.mark.parametrize(("factor", "found"), [(2.9, []), (3.1, [20]), (1 / 3.1, [20])])
def test_three_times_off_is_one_however_much_they_vary(factor: float, found: list[int]) -> None:
    usual = np.linspace(0.4, 1.6, 20).tolist()
    assert places([*usual, float(np.median(usual)) * factor]) == found


@given(st.lists(st.floats(0.1, 10), max_size=ENOUGH - 1))
def test_few_numbers_have_no_usual_one(values: list[float]) -> None:
    assert places(values) == []


@given(st.lists(st.floats(0.97, 1.0), min_size=ENOUGH, max_size=30), st.floats(0.01, 100))
def test_what_lies_close_together_is_never_one(values: list[float], unit: float) -> None:
    assert places([value * unit for value in values]) == []
