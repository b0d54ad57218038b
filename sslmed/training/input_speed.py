"""Input that keeps up: how many processes make batches, and whether these fit in /dev/shm."""

import copy
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import Dataset

from sslmed import distributed
from sslmed.config import SslmedError
from sslmed.data.loading import MOST_WORKERS, PREFETCH, Collate, tensors
from sslmed.data.sampling import StreamSampler
from sslmed.data.workers import usable_cores

if TYPE_CHECKING:
    from sslmed.heads.head import Head
    from sslmed.methods.method import Method

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where processes hand batches over, not a place for files
ROOM = 0.8  # of what is free there
SAMPLES, SAMPLE_SECONDS = 6, 2.0  # how many are made to see how long one takes, and after how long no other
TRIES = 2  # of a step; the first finds its kernels
MARGIN = 1.25  # more workers than would do if all batches took equally long
NEGLIGIBLE = 0.05  # of a step, below which making its batch is not worth a process


@dataclass(frozen=True)
class Chosen:
    """How batches are made: ``workers`` processes of at most ``most``, ``prefetch`` batches ahead, and why."""

    workers: int
    prefetch: int = PREFETCH
    most: int = 0
    lines: tuple[str, ...] = ()


def choose(
    wanted: Literal["auto"] | int,
    dataset: Dataset[Any],
    sampler: StreamSampler,
    module: "Method | Head",
    *,
    device: torch.device,
    bf16: bool,
    processes_per_node: int = 1,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Chosen:
    """The number of worker processes, from what a few samples and two steps take.

    With a GPU b / s workers keep up, where making a batch takes b seconds and a step s. On a CPU they take cores from
    the trainer: a step that used all C takes s C / (C - n) beside n workers. Both sides are as fast when
    n = b / (s + b / C), which is the cores' share that making batches is of all work. Of two cores there is none to
    give: the threads of a step would wait for the one that shares its core.

    The steps run on a copy of ``module``, and torch's random state is put back, so that the result is not touched. With
    several processes all must call it at the same time, because a step gathers. The sampler is not at its end.

    Args:
        wanted: ``data.workers``. A number is only lowered, to what /dev/shm holds.
        collate: as `sslmed.data.loading.stream_loader` has it.

    Raises:
        SslmedError: a sample cannot be read.
    """
    collate = collate or Collate(sampler.seed)
    on_cpu = device.type == "cpu"
    cores = min(distributed.exchange(_cores(processes_per_node)))
    most = 0 if on_cpu and cores <= 2 else max(0, min(MOST_WORKERS, cores - 1))
    if not (most if wanted == "auto" else wanted):
        alone = "data: there is no core for a worker; steps wait until their batch is made"
        return Chosen(0, most=most, lines=() if on_cpu or wanted == 0 else (alone,))
    addresses = next(iter(sampler))
    devices = [] if on_cpu else [device]
    with torch.random.fork_rng(devices):
        samples, seconds = _make(dataset, addresses, SAMPLES if wanted == "auto" else 0)
        each = sum(tensor.nbytes for tensor in tensors(collate(samples[:1])))
        if wanted == "auto":
            speed = _measure(module, samples, seconds, addresses, collate, device, bf16)
            workers, lines = enough(speed, cores, most, on_cpu)
        else:
            workers, lines = wanted, []
    return _fitted(Chosen(workers, PREFETCH, most, tuple(lines)), each * len(addresses), processes_per_node)


@dataclass(frozen=True)
class Speed:
    """Seconds to make one batch in one process, and of one training step on it."""

    batch: float
    step: float


def enough(speed: Speed, cores: int, most: int, on_cpu: bool) -> tuple[int, list[str]]:
    """How many workers keep up, of at most ``most``, and what to tell the user; the rule is in `choose`."""
    measured = f"data: a batch takes {_in_words(speed.batch)} to make, a step {_in_words(speed.step)}"
    if speed.batch <= NEGLIGIBLE * speed.step:
        return 0, [f"{measured}: no workers"]
    needed = speed.batch / (speed.step + (speed.batch / cores if on_cpu else 0))
    workers = min(most, math.ceil(MARGIN * needed))
    lines = [f"{measured}: {workers} worker{'s' if workers > 1 else ''}"]
    if needed > workers:
        reason = f"{cores} cores" if most < MOST_WORKERS else f"{most} workers, the most that auto takes,"
        more = "" if most < MOST_WORKERS else "; with more cores give data.workers"
        lines.append(f"data: the step will wait: {reason} cannot make batches as fast as it uses them{more}")
    return workers, lines


def _make(dataset: Any, addresses: Sequence[Any], count: int) -> tuple[list[Any], float]:
    """The first sample, which opens files, and up to ``count`` others; the seconds that one of those takes."""
    with distributed.together():  # or the others would wait in the step for the process that has failed
        samples = [_good(dataset[addresses[0]])]
        started, took = time.perf_counter(), math.nan
        for done, address in enumerate((addresses[1:] or addresses)[:count], start=1):
            samples.append(_good(dataset[address]))
            took = (time.perf_counter() - started) / done
            if took * done > SAMPLE_SECONDS:
                break
    return samples, took


def _good(sample: Any) -> Any:
    if isinstance(sample, SslmedError):
        raise sample
    return sample


def _measure(
    module: "Method | Head",
    samples: list[Any],
    sample_seconds: float,
    addresses: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    device: torch.device,
    bf16: bool,
) -> Speed:
    """The speed with a batch of the few samples again and again, under the numbers of the rows that it stands for."""
    rows = [row for _, row in addresses]
    again = [replace(samples[place % len(samples)], row=row, group=row) for place, row in enumerate(rows)]
    started = time.perf_counter()
    batch = collate(again)
    made = len(rows) * sample_seconds + time.perf_counter() - started
    trial = copy.deepcopy(module).to(device)
    batch = trial.on_after_batch_transfer(batch.to(device), 0)
    seconds = [_step(trial, batch, device, bf16) for _ in range(TRIES)]
    del trial, batch
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Speed(made, seconds[-1])


def _step(module: "Method | Head", batch: Any, device: torch.device, bf16: bool) -> float:
    """Seconds of one forward and backward pass."""
    started = _now(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        loss = module.training_step(batch, 0)
    loss.backward()
    module.zero_grad()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cores(processes: int) -> int:
    """Those of this process, where ``processes`` share what they may use."""
    usable = usable_cores()
    if distributed.world_size() > 1:  # each may be bound to cores of its own, or all of a machine to the same
        host = platform.node()
        masks = [set(cores) for name, cores in distributed.exchange([host, usable]) if name == host]
        usable, processes = sorted(set[int]().union(*masks)), len(masks)
    return max(1, len(usable) // processes)


def _fitted(chosen: Chosen, nbytes: int, processes: int) -> Chosen:
    """Fewer batches ahead, then fewer workers, until they and the batch in use fit in /dev/shm.

    A worker that finds no room there is killed, or torch waits for its batch for ever.
    """
    try:
        about = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system, which hands batches over elsewhere
        return chosen
    free = about.f_bavail * about.f_frsize
    workers, prefetch = chosen.workers, chosen.prefetch
    total = (workers * prefetch + 1) * nbytes * processes
    while workers and (workers * prefetch + 1) * nbytes * processes > ROOM * free:
        workers, prefetch = (workers, prefetch - 1) if prefetch > 1 else (workers - 1, prefetch)
    if (workers, prefetch) == (chosen.workers, chosen.prefetch):
        return chosen
    made = f"{workers} of {chosen.workers} workers, {prefetch} ahead" if workers else "no workers"
    line = (
        f"warning: {SHARED_MEMORY} has {_size(free)} free, of which batches may take {ROOM:.0%}; {_size(nbytes)} each, "
        f"they would take {_size(total)}: {made}. Make it larger (of a container with --shm-size={_gigabytes(total)}g)"
    )
    return replace(chosen, workers=workers, prefetch=prefetch, lines=(*chosen.lines, line))


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _gigabytes(nbytes: float) -> int:
    return math.ceil(nbytes / ROOM / 2**30)


def _in_words(seconds: float) -> str:
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
