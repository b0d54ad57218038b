"""Two gloo processes on the CPU, from one forkserver with the heavy imports done: only its start takes seconds."""

import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

WORLD = 2
PRELOAD = ["torch", "numpy", "sslmed.methods", "sslmed.commands.pretrain", "ranks"]


def context() -> Any:
    """A forkserver with the heavy imports done, shared by all tests that start processes."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    return processes


def on_two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function(*args)`` returns on rank 0 and on rank 1. It must be importable from this module's folder."""
    processes = context()
    answers = processes.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        ranks = [
            processes.Process(target=_rank, args=(rank, meeting, answers, function, args)) for rank in range(WORLD)
        ]
        for process in ranks:
            process.start()
        try:
            found = dict(answers.get(timeout=timeout) for _ in ranks)
        except Empty:
            raise TimeoutError(f"{function.__name__} did not come back from both ranks in {timeout} s") from None
        finally:
            for process in ranks:
                process.join(10)
                process.kill()
    for rank, answer in found.items():
        if isinstance(answer, str):
            raise RuntimeError(f"rank {rank} failed: {answer}")
    return [torch.load(io.BytesIO(found[rank]), weights_only=True) for rank in range(WORLD)]


def _rank(rank: int, meeting: str, answers: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        store = torch.distributed.FileStore(meeting, WORLD)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        whole = io.BytesIO()  # not the tensors themselves: they would live in memory that ends with this process
        torch.save(function(*args), whole)
        answers.put((rank, whole.getvalue()))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except Exception as error:
        answers.put((rank, f"{type(error).__name__}: {error}"))


def gather_gradient(rows: list[list[float]], weights: list[list[float]]) -> list[list[float]]:
    """The gradient, averaged over ranks as DDP does, of sum(gather(x) * weights) with respect to all x."""
    from sslmed import distributed

    local = torch.tensor(rows, dtype=torch.float64).chunk(WORLD)[distributed.rank()].clone().requires_grad_()
    (distributed.gather(local) * torch.tensor(weights, dtype=torch.float64)).sum().backward()
    assert local.grad is not None
    return local.grad.tolist()


def loss_gradient(
    loss: str, inputs: dict[str, torch.Tensor], settings: dict[str, Any], by: tuple[str, ...], sabotage: str | None
) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over ranks, and its gradient by this rank's rows of some inputs, as DDP scales it.

    ``sabotage`` names a wrong gather of this module to use instead.
    """
    from importlib import import_module

    from sslmed import distributed

    if sabotage:
        distributed.gather = globals()[sabotage]
    module, name = loss.rsplit(".", 1)
    local = {key: value.chunk(WORLD)[distributed.rank()].clone() for key, value in inputs.items()}
    for key in by:
        local[key].requires_grad_()
    value = getattr(import_module(module), name)(**local, **settings)
    value.backward()
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / WORLD, [local[key].grad / WORLD for key in by]


def gather_without_gradient(local: torch.Tensor) -> torch.Tensor:
    """The usual mistake: the right loss, and about half of its gradient."""
    parts = [torch.empty_like(local) for _ in range(WORLD)]
    torch.distributed.all_gather(parts, local.detach())
    parts[torch.distributed.get_rank()] = local
    return torch.cat(parts)


def parameter_gradient(method: str, batch: Any) -> dict[str, torch.Tensor]:
    """DDP's gradient of a method on this rank's half of the batch, by parameter name."""
    from sslmed import distributed

    return gradients(method, half(batch, distributed.rank()), average=True)


def half(batch: Any, rank: int) -> Any:
    """One rank's rows of a batch."""
    from sslmed.data.loading import Batch

    views = [view.chunk(WORLD)[rank] for view in batch.views]
    rest = [each.chunk(WORLD)[rank] for each in (batch.target, batch.ids, batch.groups)]
    return Batch(views, *rest, batch.seed, batch.epoch)


def gradients(method: str, batch: Any, average: bool = False) -> dict[str, torch.Tensor]:
    """The gradient of a small method without BatchNorm in float64; averaged over ranks when asked, as DDP does."""
    module = small_method(method, normalise_samples=True).double()
    module.loss(batch)["loss"].backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    if average:
        for gradient in found.values():
            torch.distributed.all_reduce(gradient)
            gradient /= WORLD
    return found


def small_method(name: str, normalise_samples: bool = False) -> Any:
    """A method on the small network that it names, always with the same weights; GroupNorm for BatchNorm when asked."""
    from sslmed.methods import METHODS
    from sslmed.models.backbones import build

    torch.manual_seed(0)
    kind = METHODS[name]
    method = kind(kind.Config(name=name, **kind.example_settings), build(kind.example, 32, 0))
    if normalise_samples:
        _without_batchnorm(method)
    return method


def _without_batchnorm(module: torch.nn.Module) -> None:
    """BatchNorm's statistics differ between one process and two; GroupNorm's do not."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
            norm = torch.nn.GroupNorm(1, child.num_features)
            activation = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]  # timm fuses them
            setattr(module, name, torch.nn.Sequential(norm, *activation))
        else:
            _without_batchnorm(child)


def pretrain_in_process(store: str, out: str, settings: tuple[str, ...], resume: bool, recipe: str) -> None:
    """Pretrain and end this process with the command's exit code, as the command line does."""
    from sslmed.commands.pretrain import pretrain
    from sslmed.config import SslmedError

    torch.set_num_threads(1)
    try:
        pretrain(recipe, store, out, overrides=settings, resume=resume)
    except SslmedError as error:
        raise SystemExit(error.exit_code) from None


def finetune_in_process(store: str, out: str, settings: tuple[str, ...], resume: bool, recipe: str) -> None:
    """Fine-tune from random weights and end this process with the command's exit code."""
    from sslmed.commands.finetune import finetune
    from sslmed.config import SslmedError

    torch.set_num_threads(1)
    try:
        finetune(recipe, store, out, overrides=settings, resume=resume)
    except SslmedError as error:
        raise SystemExit(error.exit_code) from None
