"""Method x processes x stop x workers x accumulation x kind of stop: every resume ends to the last bit as without it.

The world of one is gone through in this process, a part of it without the mark ``ddp`` too; of all cells with real
processes a pairwise cover, and under ``slow`` each of them, with a table.
"""

from pathlib import Path

import pytest
import resume_cells
from resume_cells import Cell, Outcome

from sslmed.data.store import Store
from sslmed.methods import METHODS

TABLE = Path(__file__).parents[2] / "docs" / "resume_matrix.md"
COMMAND = "pytest tests/commands/test_resume_matrix.py -m slow"
HERE = resume_cells.all_cells((1,))
QUICK = [cell for cell in HERE if not cell.workers and cell.accumulate == 2 and cell.how == "kill -9"]
COVER = resume_cells.pairwise()
OTHERS = [Cell(name, 1, "twice", 0, 2, "kill -9") for name in METHODS if name not in resume_cells.METHODS]
_undisturbed: dict[Cell, Outcome] = {}


def undisturbed(cell: Cell, store: Store, folder: Path) -> Outcome:
    twin = cell.never
    if twin not in _undisturbed:
        train = resume_cells.in_this_process if twin.world == 1 else None
        where = store if train else store.path
        _undisturbed[twin] = (train or resume_cells.in_processes)(twin, where, folder / "never")
    return _undisturbed[twin]


def check(cell: Cell, store: Store, folder: Path) -> None:
    whole = undisturbed(cell, store, folder)
    stopped = resume_cells.in_this_process(cell, store, folder / "stopped")
    assert len(whole.ids) == resume_cells.STEPS * cell.accumulate
    assert stopped.same(whole)


@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_stopped_training_ends_as_if_nothing_had_been(cell: Cell, phantom_store: Store, tmp_path: Path) -> None:
    check(cell, phantom_store, tmp_path)


@pytest.mark.parametrize("cell", OTHERS, ids=str)
def test_every_other_method_does_too(cell: Cell, phantom_store: Store, tmp_path: Path) -> None:
    check(cell, phantom_store, tmp_path)


@pytest.mark.ddp
@pytest.mark.parametrize("cell", [cell for cell in HERE if cell not in QUICK], ids=str)
def test_and_in_every_other_way(cell: Cell, phantom_store: Store, tmp_path: Path) -> None:
    check(cell, phantom_store, tmp_path)


def test_the_comparison_sees_another_order_and_another_weight(phantom_store: Store, tmp_path: Path) -> None:
    cell = HERE[0]
    whole = undisturbed(cell, phantom_store, tmp_path)
    first = next(iter(whole.weights))
    moved = Outcome({**whole.weights, first: whole.weights[first] + 1e-7}, whole.ids)
    swapped = Outcome(whole.weights, {**whole.ids, "0/5": whole.ids["0/5"][::-1]})
    assert whole.same(whole)
    assert not moved.same(whole)
    assert not swapped.same(whole)


def test_the_cover_has_every_pair() -> None:
    pairs = {pair for cell in resume_cells.all_cells((1, 2)) for pair in resume_cells._pairs(cell)}
    assert {pair for cell in COVER for pair in resume_cells._pairs(cell)} == pairs
    assert len(COVER) <= 20


@pytest.mark.ddp
@pytest.mark.timeout(600)
def test_real_processes_pair_by_pair(phantom_store: Store, tmp_path: Path) -> None:
    different = [str(cell) for cell, same in resume_cells.outcomes(COVER, phantom_store, tmp_path) if not same]
    assert different == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_cells(phantom_store: Store, tmp_path: Path) -> None:
    lines = [
        "| method | processes | stopped | workers | accumulate | by | same weights and samples |",
        "|" + "---|" * 7,
    ]
    all_same = True
    for cell, same in resume_cells.outcomes(resume_cells.all_cells((1, 2)), phantom_store, tmp_path, alone_here=True):
        all_same &= same
        facts = [*vars(cell).values(), "yes" if same else "NO"]
        lines.append(f"| {' | '.join(str(fact) for fact in facts)} |")
        print(lines[-1], flush=True)
    head = f"""# The resume matrix

Every cell is a pretraining of {resume_cells.STEPS} steps, {resume_cells.EPOCH} an epoch, with a checkpoint every third.
It is stopped, resumed, and compared with one that nothing has stopped: all weights bit by bit, and the ids of every
batch. CPU, fp32, the small networks of the contract tests, with stochastic depth. Two processes run the whole command,
and the second is stopped; one trains inside the test's process, where `kill -9` is an exception after which nothing is
done (`tests/commands/test_resume.py` really kills it).

Written by `{COMMAND}`.

"""
    TABLE.write_text(head + "\n".join(lines) + "\n")
    assert all_same
