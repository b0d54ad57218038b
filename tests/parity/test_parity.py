"""Every method's loss by value and gradient: the paper's formula, lightly, one process and two, bf16, flat images."""

import fidelity
import measure
import pytest
from case import Case
from cases import CASES

from sslmed.methods import METHODS

VALUE = GRADIENT = 1e-6
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}, {case.name}")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_case(name: str) -> None:
    assert any(case.method == name for case in CASES), "add one to tests/parity/cases.py, with the paper's formula"


@each_case
def test_it_equals_the_papers_formula(case: Case) -> None:
    value, gradient = measure.against(case, case.formula)
    assert value < VALUE
    assert gradient < GRADIENT


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.lightly], ids=lambda case: f"{case.method}, {case.name}"
)
def test_it_equals_lightly_where_that_is_right(case: Case) -> None:
    assert case.lightly is not None
    value, gradient = measure.against(case, case.lightly)
    assert value < VALUE
    assert gradient < GRADIENT


@pytest.mark.ddp
@each_case
def test_two_processes_equal_one(case: Case) -> None:
    value, gradient = measure.two_processes(case)
    assert value < VALUE
    assert gradient < GRADIENT


@pytest.mark.ddp
def test_a_gather_without_gradient_fails_by_gradient_alone() -> None:
    """The suite would see the commonest mistake of all, which the loss's value hides."""
    case = next(case for case in CASES if case.method == "simclr")
    value, gradient = measure.two_processes(case, sabotage="gather_without_gradient")
    assert value < VALUE
    assert gradient > 0.1


@pytest.mark.ddp
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_the_parameter_gradients_of_one(name: str) -> None:
    cosine, ratio = measure.parameter_gradients(name)
    assert cosine > 0.999999
    assert abs(ratio - 1) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_bf16_stays_within_a_hundredth(name: str) -> None:
    assert measure.bf16(name) < 1e-2


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("level", [0.0, -2.0, 1.5])
def test_flat_images_give_a_finite_loss_and_gradient(name: str, level: float) -> None:
    assert measure.flat_is_finite(name, level)


@each_case
def test_a_hundredth_too_much_is_seen(case: Case) -> None:
    value, gradient = measure.against(case, lambda **given: 1.01 * case.formula(**given))
    assert value > VALUE
    assert gradient > GRADIENT


def test_the_page_shows_every_case_within_its_bar() -> None:
    """docs/fidelity.md is generated; a case or method that it does not show means that it is stale."""
    rows = [line.strip("| \n").split(" | ") for line in fidelity.PAGE.read_text(encoding="utf-8").splitlines()]
    for case in CASES:
        (row,) = [row for row in rows if row[:2] == [case.method, case.name]]
        assert row[2] == case.source
        assert all(float(cell) <= VALUE for cell in row[3:] if cell.strip()), row
    assert {row[0] for row in rows if row[-1] == "finite"} == {case.method for case in CASES}
