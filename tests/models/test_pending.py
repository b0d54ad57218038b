"""What waits for the end of a step, and what a skipped step leaves."""

import torch
from torch import nn

from sslmed.models.pending import Pending


def test_parts_of_a_step_come_out_in_order_and_without_gradient() -> None:
    module, pending = nn.Linear(2, 1), Pending()
    first, second = module(torch.ones(1, 2)), module(torch.zeros(1, 2))
    pending.add(module, first)
    first.sum().backward()
    pending.add(module, second)
    taken = pending.take()
    assert [each.requires_grad for each in taken] == [False, False]
    assert torch.equal(torch.cat(taken), torch.cat([first, second]).detach())
    assert pending.take() == []


def test_a_skipped_step_leaves_nothing() -> None:
    module, pending = nn.Linear(2, 1), Pending()
    pending.add(module, torch.tensor(1.0))
    module(torch.ones(1, 2)).sum().backward()
    module.zero_grad()  # what the guard does to the gradients of a step that it skips
    pending.add(module, torch.tensor(2.0))
    assert pending.take() == [torch.tensor(2.0)]


def test_the_last_steps_gradients_are_still_there_when_the_next_begins() -> None:
    module, pending = nn.Linear(2, 1), Pending()
    module(torch.ones(1, 2)).sum().backward()
    pending.add(module, torch.tensor(3.0))
    module.zero_grad()
    assert pending.take() == [torch.tensor(3.0)]
