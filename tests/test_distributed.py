"""The gather: every rank's rows, with the gradient that DDP then averages to the right one."""

import pytest
import ranks
import torch

from sslmed import distributed


def test_a_world_of_one_gathers_nothing() -> None:
    local = torch.randn(3, 2, requires_grad=True)
    assert distributed.gather(local) is local
    assert (distributed.world_size(), distributed.rank()) == (1, 0)


@pytest.mark.ddp
def test_two_ranks_get_the_gradient_of_the_whole() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    weights = [[1.0, -1.0], [2.0, -2.0], [3.0, -3.0], [4.0, -4.0]]
    both = ranks.on_two_ranks(ranks.gather_gradient, rows, weights)
    # each of the two ranks sums over all rows, so the sum of their losses has twice the weights as gradient
    assert torch.equal(torch.tensor(both).flatten(0, 1), 2 * torch.tensor(weights))
