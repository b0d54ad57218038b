"""Two gloo processes on the CPU, from one forkserver with the heavy imports done: only its start takes seconds."""

import copy
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
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
    forkserver.ensure_running()  # with these, before a loader asks for its own
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


def total_gradient(rows: list[list[float]]) -> list[Any]:
    """The gradient by this rank's rows of the squared sum of all, and that sum without gradient."""
    from sslmed import distributed

    local = torch.tensor(rows).chunk(WORLD)[distributed.rank()].clone().requires_grad_()
    distributed.total(local.sum(dim=0)).square().sum().backward()
    assert local.grad is not None
    return [local.grad.tolist(), distributed.summed(local.sum(dim=0)).tolist()]


def loss_gradient(
    loss: str,
    inputs: dict[str, torch.Tensor],
    settings: dict[str, Any],
    by: tuple[str, ...],
    sabotage: str | None,
    shared: tuple[str, ...],
) -> tuple[float, list[torch.Tensor]]:
    """Mean loss over ranks, and its gradient by this rank's rows of some inputs, as DDP scales it.

    ``sabotage`` names a wrong gather of this module to use instead. Every rank has all of the ``shared`` inputs.
    """
    from importlib import import_module

    from sslmed import distributed

    if sabotage:
        distributed.gather = globals()[sabotage]
    module, name = loss.rsplit(".", 1)
    local = {
        key: (value if key in shared else value.chunk(WORLD)[distributed.rank()]).clone()
        for key, value in inputs.items()
    }
    for key in by:
        local[key].requires_grad_()
    value = scalar(getattr(import_module(module), name)(**local, **settings))
    value.backward()
    mean = value.detach().clone()
    torch.distributed.all_reduce(mean)
    return mean.item() / WORLD, [local[key].grad / WORLD for key in by]


def scalar(found: Any) -> torch.Tensor:
    """The loss, of a function that returns it alone or by name among its parts."""
    loss: torch.Tensor = found["loss"] if isinstance(found, dict) else found
    return loss


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


def batchnorm_on_ranks(
    layer: torch.nn.Module, inputs: torch.Tensor, weights: torch.Tensor, rows: tuple[int, int], synchronised: bool
) -> dict[str, torch.Tensor]:
    """One BatchNorm on this rank's rows, and the gradient of the sum of outputs times weights over all ranks.

    Gradients of parameters are summed over ranks. The input's gradient is this rank's rows.
    """
    from sslmed import distributed
    from sslmed.models.sync_batchnorm import synchronise

    rank = distributed.rank()
    layer = copy.deepcopy(layer)  # what is passed to processes is memory that they share
    if synchronised:
        layer = synchronise(layer, "cpu")
    mine = inputs.split(rows)[rank].clone().requires_grad_()
    outputs = layer(mine)
    (outputs.to(weights.dtype) * weights.split(rows)[rank]).sum().backward()
    for parameter in layer.parameters():
        torch.distributed.all_reduce(parameter.grad)
    found = {"outputs": outputs.detach(), "by inputs": mine.grad}
    found |= {f"by {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def batchnorm_gradient(method: str, batch: Any, synchronised: bool, checkpointed: bool = False) -> dict[str, Any]:
    """DDP's gradient of a method with its BatchNorm on this rank's half of the batch, and its buffers afterwards."""
    from sslmed import distributed
    from sslmed.models.sync_batchnorm import synchronise

    module = small_method(method).double()
    if synchronised:
        assert synchronise(module, "cpu") is module
    if checkpointed:
        module.backbone.checkpoint_gradients()
    module.loss(half(batch, distributed.rank()))["loss"].backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    for gradient in found.values():
        torch.distributed.all_reduce(gradient)
        gradient /= WORLD
    return found | dict(module.named_buffers())


def what_they_hear() -> dict[str, Any]:
    """What the processes learn of each other through each of sslmed.distributed's questions."""
    from sslmed import distributed

    me = distributed.rank()
    asked: list[int] = []

    def work() -> list[Any]:
        asked.append(me)
        return ["from", me, {"a": None}]

    return {
        "world": [distributed.world_size(), me],
        "exchange": [
            distributed.exchange(value)
            for value in (me, None, "größer ☃" * (1 + 5000 * me), {"x": [me] * (1 - me)}, [0.1 + me, float("inf")])
        ],
        "first": [distributed.first(work), distributed.first(lambda: None), asked],
        "largest": [distributed.largest(me), distributed.largest(-me), distributed.largest((1 - me) * 2**40)],
        "means": [distributed.means({"b": me + 0.5, "a": 1e300 * me, "n": 3.0}), distributed.means({})],
        "gather": torch.stack(distributed.gather_cpu(torch.arange(6, dtype=torch.uint8).view(3, 2).T + me)),
    }


def who_fails(name: str) -> list[Any]:
    """How ``sslmed.distributed.NAME`` ends on this process, for each of several ways to fail: class, words and code."""
    import errno

    from sslmed import distributed
    from sslmed.config import DataError, MissingInputError, SslmedError

    me = distributed.rank()
    errors = [DataError("broken\nin two lines"), MissingInputError("gone")]
    full = OSError(errno.ENOSPC, "disk full")
    plans: list[dict[int, Exception]] = [{}, {0: errors[0]}, {1: errors[1]}, {0: errors[0], 1: errors[1]}, {0: full}]
    ends: list[Any] = []
    for plan in plans:
        try:
            if name == "together":
                with distributed.together():
                    _fail(plan.get(me))
            elif name == "first":
                distributed.first(lambda plan=plan: _fail(plan.get(me)))  # type: ignore[misc]
            ends.append(None)
        except (SslmedError, OSError) as error:
            ends.append([type(error).__name__, str(error), getattr(error, "exit_code", 74)])
    return ends


def _fail(error: Exception | None) -> None:
    if error is not None:
        raise error


def a_bug_on_rank_0() -> None:
    """It does not come to the end of the block; the other process must not wait for it."""
    from sslmed import distributed

    with distributed.together():
        if distributed.rank() == 0:
            raise ZeroDivisionError


def agreement(facts: list[dict[str, Any]]) -> str | None:
    """What is said when each process has its own of ``facts``."""
    from sslmed import distributed
    from sslmed.config import UsageError

    try:
        distributed.agree(facts[distributed.rank()])
    except UsageError as error:
        return str(error)
    return None


def one_run(folder: str) -> dict[str, Any]:
    """What the processes of one training have of their run, and how it refuses them."""
    import fcntl

    from sslmed import distributed
    from sslmed.run import Run

    path, me = Path(folder) / "run", distributed.rank()
    with Run.start(path, "pretrain", "recipe", {"seed": 3}) as run:
        run.say(f"hello from {me}")
        run.log(1, loss=0.5 + me)
        run.log(2, loss=0.5)
        run.rewind(1)
        run.finish({"of": me})
        distributed.exchange("said")
        found: dict[str, Any] = {"id": run.fact("id"), "seed": run.fact("seed"), "result": run.result}
    distributed.exchange("closed")
    found["resumed"] = [_resumed(path), _refusal(lambda: Run.start(path, "pretrain", "recipe", {}))]
    found["other command"] = _refusal(lambda: Run.resume(path, "finetune"))
    found["absent"] = _refusal(lambda: Run.resume(path / "absent", "pretrain"))
    found["in the way"] = _refusal(lambda: Run.start(path / "run.json" / "run", "pretrain", "recipe", {}))
    with (path / ".lock").open() as lock:
        if me == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        found["locked"] = _refusal(lambda: Run.resume(path, "pretrain"))
    return found


def _resumed(path: Path) -> list[Any]:
    from sslmed.run import Run

    run = Run.resume(path, "pretrain")
    found = [run.fact("id"), run.done, run.result]
    run.close()
    return found


def _refusal(open_it: Callable[[], Any]) -> list[Any]:
    from sslmed.config import SslmedError

    try:
        open_it().close()
    except SslmedError as error:
        return [type(error).__name__, error.exit_code]
    except OSError as error:
        return [type(error).__name__, 74]
    return []


def pretrain_on_ranks(store: str, out: str, settings: tuple[str, ...], bad: int = 0) -> list[Any]:
    """Pretrain with SimCLR as one of several processes; the loss number ``bad`` of rank 1 alone is not a number.

    The error's class, code and words, or nothing; then the weights of this process as it has left them.
    """
    from sslmed import distributed
    from sslmed.commands import pretrain as commands
    from sslmed.config import SslmedError
    from sslmed.methods.simclr import SimCLR

    me = str(distributed.rank())
    os.environ |= {"RANK": me, "LOCAL_RANK": me, "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    fitted: list[Any] = []
    loss, fit, calls = SimCLR.loss, commands.fit, iter(range(1, 1000))

    def sometimes_bad(method: Any, batch: Any) -> dict[str, torch.Tensor]:
        outputs = loss(method, batch)
        return outputs | {"loss": outputs["loss"] * float("nan")} if next(calls) == bad and me == "1" else outputs

    def noted(module: Any, *rest: Any, **named: Any) -> Any:
        fitted.append(module)
        return fit(module, *rest, **named)

    SimCLR.loss, commands.fit = sometimes_bad, noted  # type: ignore[method-assign]
    try:
        commands.pretrain("xray/simclr_resnet18", store, out, overrides=settings)
        ended = []
    except SslmedError as error:
        ended = [type(error).__name__, error.exit_code, str(error)]
    return [ended, dict(fitted[0].state_dict()) if fitted else {}]


def started_again(out: str) -> bool:
    """Whether a run goes on by itself when torchrun has counted a restart on the second machine alone."""
    from sslmed import distributed
    from sslmed.training.launch import goes_on

    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(distributed.rank())
    return goes_on(out)
