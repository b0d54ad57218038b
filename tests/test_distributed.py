"""What processes learn of each other; the gather: every rank's rows, with the gradient that DDP averages rightly."""

import time
from typing import Any

import pytest
import ranks
import torch

from sslmed import distributed
from sslmed.config import DataError


def test_a_world_of_one_gathers_nothing() -> None:
    local = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(local) is local
    assert distributed.total(local) is local
    assert torch.equal(distributed.summed(local), local)
    assert (distributed.world_size(), distributed.rank()) == (1, 0)


def test_a_world_of_one_asks_nobody() -> None:
    assert distributed.exchange({"a": 1}) == [{"a": 1}]
    assert distributed.first(lambda: 5) == 5
    assert distributed.largest(3) == 3
    assert distributed.means({"a": 0.1}) == {"a": 0.1}
    distributed.agree({"a": 1})
    local = torch.ones(2)
    assert distributed.gather_cpu(local)[0] is local
    with pytest.raises(DataError, match="mine"):
        distributed.first(lambda: fail(DataError("mine")))
    with pytest.raises(DataError, match="mine"), distributed.together():
        fail(DataError("mine"))


def fail(error: Exception) -> None:
    raise error


@pytest.mark.ddp
def test_two_ranks_get_the_gradient_of_the_whole() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    weights = [[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0]]
    both = ranks.on_two_ranks(ranks.gather_gradient, rows, weights)
    # each of the two ranks sums over all rows, so the sum of their losses has twice the weights as gradient
    assert torch.equal(torch.tensor(both).flatten(0, 1), 2 * torch.tensor(weights))


@pytest.mark.ddp
def test_two_ranks_get_the_gradient_of_a_sum_over_all() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    both = ranks.on_two_ranks(ranks.total_gradient, rows)
    whole = torch.tensor(rows, requires_grad=True)
    whole.sum(dim=0).square().sum().backward()
    # the loss is the same on each of the two ranks, so the sum of their losses has twice the gradient
    assert torch.equal(torch.tensor([gradient for gradient, _ in both]).flatten(0, 1), 2 * whole.grad)
    assert [summed for _, summed in both] == [[16.0, 20.0]] * 2


@pytest.mark.ddp
def test_what_two_processes_learn_of_each_other() -> None:
    both = ranks.on_two_ranks(ranks.what_they_hear)
    for rank, found in enumerate(both):
        assert found["world"] == [2, rank]
        snow = "größer ☃"
        assert found["exchange"] == [
            *([0, 1], [None, None], [snow, snow * 5001]),
            *([{"x": [0]}, {"x": []}], [[0.1, float("inf")], [1.1, float("inf")]]),
        ]
        assert found["first"] == [["from", 0, {"a": None}], None, [0] if rank == 0 else []]
        assert found["largest"] == [1, 0, 2**40]
        assert found["means"] == [{"b": 1.0, "a": 5e299, "n": 3.0}, {}]
        assert found["gather"].tolist() == [[[0, 2, 4], [1, 3, 5]], [[1, 3, 5], [2, 4, 6]]]


@pytest.mark.ddp
@pytest.mark.parametrize("name", ["together", "first"])
def test_a_failure_of_one_is_a_failure_of_all_and_told_by_one(name: str) -> None:
    """Nobody fails; rank 0; rank 1; both; a full disk on rank 0."""
    zero, one = ranks.on_two_ranks(ranks.who_fails, name)
    own, words = ["DataError", "broken\nin two lines", 65], "rank 0: broken\nin two lines"
    full = ["OSError", "[Errno 28] disk full", 74]
    if name == "first":  # rank 1 does nothing, and so cannot fail
        assert zero == [None, own, None, own, full]
        rank_1_alone: Any = None
    else:
        assert zero == [None, own, ["ElsewhereError", "rank 1: gone", 66], own, full]
        rank_1_alone = ["MissingInputError", "gone", 66]
    elsewhere = ["ElsewhereError", words, 65]
    assert one == [None, elsewhere, rank_1_alone, elsewhere, ["ElsewhereError", "rank 0: [Errno 28] disk full", 74]]


@pytest.mark.ddp
def test_a_bug_is_not_waited_for() -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank [01] failed: "):
        ranks.on_two_ranks(ranks.a_bug_on_rank_0)
    assert time.monotonic() - begin < 60


@pytest.mark.ddp
def test_processes_that_differ_do_not_train_together() -> None:
    facts: dict[str, Any] = {"recipe": "a: 1\n", "seed": 3, "none": None}
    assert ranks.on_two_ranks(ranks.agreement, [facts, facts]) == [None, None]
    said = ranks.on_two_ranks(ranks.agreement, [facts, facts | {"seed": 4}])
    assert said[0] is not None
    assert said[0].startswith("the processes differ in seed: rank 0 has 3, rank 1 has 4; start all")
    assert said[1].startswith("the processes differ in seed: rank 1 has 4, rank 0 has 3; start all")
