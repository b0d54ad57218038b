"""Small methods of clustering and self-distillation, and what processes do with them; see `ranks.on_two_ranks`."""

from typing import Any

import ranks
import torch


def made(name: str, **settings: Any) -> Any:
    """A method on its small network, always with the same weights."""
    from sslmed.methods import METHODS
    from sslmed.models.backbones import build

    torch.manual_seed(0)
    kind = METHODS[name]
    return kind(kind.Config(**kind.example_settings | settings), build(kind.example, 32, 0))


def batches(count: int, rows: int = 8, local_views: int = 1, epoch: int = 0) -> list[Any]:
    """Batches of two whole views of noise and some of half the sides; ids go on."""
    from sslmed.data.loading import Batch

    generator, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        sides = [32, 32, *[16] * local_views]
        views = [torch.randn(rows, 1, side, side, generator=generator) for side in sides]
        ids = torch.arange(rows) + rows * number
        found.append(Batch(views=views, target=ids, ids=ids, groups=ids, seed=3, epoch=epoch))
    return found


def step(method: Any, optimizer: torch.optim.Optimizer, parts: list[Any], progress: tuple[int, int]) -> None:
    """One optimizer step on the parts of a batch, as the trainer does it."""
    from sslmed import distributed
    from sslmed.methods.method import Progress

    number, total = progress
    for place, part in enumerate(parts):
        loss = method.loss(part)["loss"] / len(parts)
        if not place:
            optimizer.zero_grad()
        loss.backward()
    for parameter in method.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(distributed.mean(parameter.grad))
    method.before_step(Progress(number, total, number, 8))
    optimizer.step()
    method.after_step(Progress(number + 1, total, number + 1, 8))


def state_after(name: str, settings: dict[str, Any], count: int) -> dict[str, torch.Tensor]:
    """Parameters and buffers after some steps on this process's rows, in float64 and without BatchNorm."""
    from sslmed import distributed

    method = made(name, **settings)
    ranks._without_batchnorm(method)
    method = method.double()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for number, batch in enumerate(batches(count)):
        batch.views = [view.double() for view in batch.views]
        if distributed.world_size() > 1:
            batch = ranks.half(batch, distributed.rank())
        step(method, optimizer, [batch], (number, count))
    return {name: value.clone() for name, value in method.state_dict().items()}


def assigned(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """SwAV's assignments of this process's rows."""
    from sslmed import distributed
    from sslmed.methods.swav import assignments

    return assignments(scores.chunk(ranks.WORLD)[distributed.rank()], epsilon, iterations)
