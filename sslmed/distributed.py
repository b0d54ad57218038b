"""World size, rank, what processes agree on, and a gather that keeps its gradient.

Everything works without a process group: a world of one. Control messages travel on the CPU, so that asking for one
never waits for a GPU.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sslmed.config import DiskError, ElsewhereError, SslmedError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for what one process does while the others wait: probes, scores, artifacts
_patient: dist.ProcessGroup | None = None


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def group(backend: str, seconds: float, **meeting: Any) -> Iterator[None]:
    """Inside the block this process is one of many.

    Args:
        seconds: after which a collective gives up on the others.
        meeting: where processes find each other, as ``torch.distributed.init_process_group`` takes it.
    """
    global _patient
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds), **meeting)
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    alone = False
    try:
        yield
    except BaseException as error:
        alone = not (isinstance(error, SslmedError) and error.agreed)
        raise
    finally:
        _patient = None
        if not (alone and "nccl" in backend):  # NCCL would wait for others that wait for this one: the end frees it
            dist.destroy_process_group()


def exchange(value: Any) -> list[Any]:
    """What every process gives, JSON's types, in rank order. All must call it; it waits for the last."""
    if world_size() == 1:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=_patient)
    longest = int(max(lengths))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=_patient)
    texts = [bytes(part[: int(length)].tolist()) for part, length in zip(parts, lengths, strict=True)]
    return [json.loads(text) for text in texts]


def first(work: Callable[[], T]) -> T:
    """What ``work`` returns on rank 0, which alone does it, on every rank; JSON's types.

    Raises:
        ElsewhereError: on the other ranks, when rank 0 raises an error of sslmed or of the disk.
    """
    found: list[T] = []
    with together():
        if rank() == 0:
            found.append(work())
    result: T = exchange(found[0] if found else None)[0] if world_size() > 1 else found[0]
    return result


@contextmanager
def together() -> Iterator[None]:
    """What fails on one process within the block fails on all at its end, and one of them tells it.

    Every process must come to the end of the block; an error that is a bug is not waited for.

    Raises:
        ElsewhereError: on those that are not the first to fail.
    """
    error: SslmedError | OSError | None = None
    try:
        yield
    except (SslmedError, OSError) as caught:
        error = caught
    code = error.exit_code if isinstance(error, SslmedError) else DiskError.exit_code
    try:
        failures = exchange(None if error is None else [str(error), code])
    except RuntimeError:  # another process is gone; what failed here is the better word
        if error is not None:
            raise error from None
        raise
    teller = next((number for number, failure in enumerate(failures) if failure), None)
    if teller is None:
        return
    if error is not None and teller == rank():
        raise error
    raise ElsewhereError(f"rank {teller}: {failures[teller][0]}", failures[teller][1]) from error


def agree(facts: dict[str, Any]) -> None:
    """Refuse to train together when processes differ in ``facts``, JSON's types.

    Raises:
        UsageError: with the first difference.
    """
    for number, others in enumerate(exchange(facts)):
        for name, value in facts.items():
            if others[name] != value:
                raise UsageError(
                    f"the processes differ in {name}: rank {rank()} has {value}, rank {number} has {others[name]}; "
                    "start all of them with the same command, on the same files"
                )


def largest(value: int) -> int:
    """The greatest of all processes' numbers."""
    if world_size() == 1:
        return value
    tensor = torch.tensor([value])
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def means(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over the processes, which all have the same names."""
    if world_size() == 1 or not values:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(tensor)
    return dict(zip(values, (tensor / world_size()).tolist(), strict=True))


def mean(value: torch.Tensor) -> torch.Tensor:
    """A tensor's mean over the processes, without gradient; on each the same."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def summed(value: torch.Tensor) -> torch.Tensor:
    """A tensor's sum over the processes, without gradient; on each the same."""
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_cpu(local: torch.Tensor) -> list[torch.Tensor]:
    """A tensor on the CPU of every process, of one shape, in rank order."""
    if world_size() == 1:
        return [local]
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return parts


def gather(local: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order, with gradient: (N, ...) on each rank -> (N * world, ...).

    Every rank must hold the same N. The backward pass sums the gradients that all ranks have for this rank's rows;
    DDP then averages over ranks, which together is the gradient of the mean loss of the whole batch. A gather without
    gradient gives the right loss and about half of the gradient.
    """
    if world_size() == 1:
        return local
    everyone: torch.Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return everyone


def total(local: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, with gradient; on each the same.

    The backward pass sums the gradients that all ranks have for the sum. A reduction in place gives the right loss and
    one world-size-th of the gradient (measured: Barlow Twins' reference does).
    """
    if world_size() == 1:
        return local
    everyone: torch.Tensor = _Total.apply(local)  # type: ignore[no-untyped-call]
    return everyone


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, local: torch.Tensor) -> torch.Tensor:
        return summed(local)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return summed(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        start = rank() * ctx.rows
        return total[start : start + ctx.rows]
