"""How many processes make batches: the rule, what it is measured on, and that nobody notices the measurement."""

import contextlib
import copy
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import ranks
import torch

from sslmed.config import DataError
from sslmed.data.loading import MOST_WORKERS, Batch, Sample, ViewDataset
from sslmed.data.modality import MODALITIES
from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.heads import HEADS
from sslmed.methods import METHODS
from sslmed.models.backbones import build
from sslmed.training import input_speed
from sslmed.training.input_speed import Chosen, Speed, choose, enough

CPU, GPU = torch.device("cpu"), torch.device("cuda")
XRAY = MODALITIES["xray"]
SIZE = 32


class Time:
    """A clock that stands still until somebody spends time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bf16 = False

    def perf_counter(self) -> float:
        return self.now

    def __deepcopy__(self, memo: Any) -> "Time":  # a copy of a module spends the same time
        return self


class Images(torch.utils.data.Dataset[Any]):
    """Samples of 1 x 10 x 10 floats that take ``seconds`` each, but the first, which takes a minute more."""

    def __init__(self, clock: Time, seconds: float) -> None:
        self.clock, self.seconds, self.read = clock, seconds, list[tuple[int, int]]()

    def __getitem__(self, address: tuple[int, int]) -> Sample | DataError:
        self.clock.now += self.seconds + 60 * (not self.read)
        self.read.append(address)
        epoch, row = address
        return Sample([torch.randn(1, 10, 10)], row, torch.tensor(-1), row, epoch)


class Noisy(pl.LightningModule):
    """All that a step may change: BatchNorm's statistics, torch's random state, gradients, modes, attributes."""

    def __init__(self, clock: Time, seconds: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Dropout(), torch.nn.Conv2d(1, 1, 3))
        self.register_buffer("queue", torch.zeros(3))
        self.clock, self.seconds, self.monitored, self.rows = clock, seconds, dict[str, Any](), list[int]()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.clock.now += self.seconds + 60 * (not self.rows)  # the first try is the slow one
        assert len(set(batch.ids.tolist())) == len(batch.ids) == len(set(batch.groups.tolist()))
        self.rows += batch.ids.tolist()
        self.clock.bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        self.queue += 1
        self.layers[1].eval()
        loss = self.layers(batch.views[0]).square().mean() + torch.rand(())
        self.monitored = {"loss": loss.detach()}
        return loss


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(input_speed, "time", clock)
    return clock


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """So many cores, and so many bytes free in /dev/shm."""

    def pretend(cores: int, free: float = 1e12) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=int(free), f_frsize=1))

    return pretend


def stream(batch: int, start: int = 0) -> StreamSampler:
    return StreamSampler(torch.arange(100).numpy(), batch, steps=3, seed=0, start=start)


# The rule.


@pytest.mark.parametrize(
    ("batch", "step", "cores", "workers", "words"),
    [
        (0.9, 0.3, 16, 4, "a batch takes 0.90 s to make, a step 0.30 s: 4 workers"),  # 1.25 x 3
        (0.3, 0.3, 16, 2, "2 workers"),
        (0.06, 0.3, 16, 1, "a batch takes 60 ms to make, a step 0.30 s: 1 worker"),
        (0.014, 0.3, 16, 0, "no workers"),  # less than a twentieth
        (0.9, 0.3, 4, 3, "3 workers"),  # just enough, without the margin
        (0.9, 0.3, 3, 2, "the step will wait: 3 cores cannot make batches as fast as it uses them"),
        (12.0, 0.3, 64, MOST_WORKERS, "the step will wait: 8 workers, the most that auto takes, cannot"),
    ],
)
def test_workers_that_feed_a_gpu(batch: float, step: float, cores: int, workers: int, words: str) -> None:
    found, lines = enough(Speed(batch, step), cores, min(MOST_WORKERS, cores - 1), on_cpu=False)
    assert found == workers
    assert words in lines[-1]
    assert len(lines) == 1 + ("will wait" in words)


@pytest.mark.parametrize("cores", [3, 4, 8, 64])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 3.0, 10.0])
def test_on_a_cpu_workers_and_the_step_are_as_fast_once_they_share_the_cores(cores: int, ratio: float) -> None:
    def waits(workers: int) -> bool:  # whether batches come slower than a step on the cores that are left
        return ratio / workers > cores / (cores - workers) if workers < cores else False

    found, lines = enough(Speed(ratio, 1.0), cores, min(MOST_WORKERS, cores - 1), on_cpu=True)
    assert 1 <= found < cores
    if len(lines) == 1:
        assert not waits(found)
    else:
        assert waits(found)
        assert found == min(MOST_WORKERS, cores - 1)
    fewer = [count for count in range(1, found) if not waits(count)]
    assert len(fewer) <= 1 + found // 4, "the margin is a quarter"


# What is measured.


def test_it_measures_a_few_samples_and_the_second_of_two_steps(clock: Time, machine: Any) -> None:
    machine(64)
    dataset, module = Images(clock, 0.1), Noisy(clock, 3.0)
    chosen = choose("auto", dataset, stream(50, start=1), module, device=CPU, bf16=False)
    assert chosen.lines == ("data: a batch takes 5.00 s to make, a step 3.00 s: 3 workers",)  # 1.25 x 5 / (3 + 5 / 64)
    assert (chosen.workers, chosen.prefetch, chosen.most) == (3, 2, MOST_WORKERS)
    begun = next(iter(stream(50, start=1)))
    assert dataset.read == begun[:7]


def test_slow_samples_are_not_waited_for(clock: Time, machine: Any) -> None:
    machine(8)
    dataset = Images(clock, 1.5)
    chosen = choose("auto", dataset, stream(50), Noisy(clock, 3.0), device=CPU, bf16=False)
    assert len(dataset.read) == 3
    assert chosen.lines[0].startswith("data: a batch takes 75 s to make, a step 3.00 s")


@pytest.mark.parametrize(
    ("wanted", "cores", "processes", "device", "workers", "most"),
    [
        ("auto", 2, 1, CPU, 0, 0),
        ("auto", 5, 2, CPU, 0, 0),  # two for each
        ("auto", 1, 1, GPU, 0, 0),
        (0, 64, 1, GPU, 0, MOST_WORKERS),
        (3, 2, 1, CPU, 3, 0),  # who asks gets them
        (20, 4, 1, GPU, 20, 3),
    ],
)
def test_nothing_is_measured_where_nothing_is_to_choose(
    wanted: Any,
    cores: int,
    processes: int,
    device: torch.device,
    workers: int,
    most: int,
    clock: Time,
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(cores)
    monkeypatch.setattr(torch.random, "fork_rng", contextlib.nullcontext)
    dataset, module = Images(clock, 0.1), Noisy(clock)
    found = choose(wanted, dataset, stream(50), module, device=device, bf16=False, processes_per_node=processes)
    alone = ("data: there is no core for a worker; steps wait until their batch is made",)
    assert found == Chosen(workers, 2, most, alone if device == GPU and cores == 1 else ())
    assert len(dataset.read) == bool(workers)  # one, for the size of a batch
    assert module.rows == []


def test_a_sample_that_cannot_be_read_is_an_error(clock: Time, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(8)
    dataset = Images(clock, 0.1)
    monkeypatch.setattr(Images, "__getitem__", lambda *_: DataError("shard 3 is damaged"))
    with pytest.raises(DataError, match="shard 3"):
        choose("auto", dataset, stream(8), Noisy(clock), device=CPU, bf16=False)


# Nobody notices.


def assert_untouched(module: pl.LightningModule, measure: Callable[[], Chosen]) -> None:
    before, modes = copy.deepcopy(module.state_dict()), [each.training for each in module.modules()]
    torch.manual_seed(5)
    random = torch.get_rng_state()
    assert "a step" in measure().lines[0]
    assert torch.equal(torch.get_rng_state(), random)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [each.training for each in module.modules()] == modes
    assert module.monitored == {}


@pytest.mark.parametrize("bf16", [False, True])
def test_a_module_is_as_it_was(bf16: bool, clock: Time, machine: Any) -> None:
    machine(8)
    module = Noisy(clock, 1.0)
    dataset = Images(clock, 0.1)
    assert_untouched(module, lambda: choose("auto", dataset, stream(8), module, device=CPU, bf16=bf16))
    assert clock.bf16 is bf16
    assert module.rows == []
    assert torch.equal(module.queue, torch.zeros(3))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_as_it_was(name: str, bf16: bool, phantom_store: Store, machine: Any) -> None:
    machine(8)
    method = ranks.small_method(name).train()
    dataset = ViewDataset(phantom_store, XRAY, method.views(XRAY), SIZE, 1, seed=0, target=None)
    sampler = StreamSampler(phantom_store.rows("train")[:8], 8, steps=2, seed=0)
    assert_untouched(method, lambda: choose("auto", dataset, sampler, method, device=CPU, bf16=bf16))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_as_it_was(name: str, machine: Any) -> None:
    machine(8)
    kind = HEADS[name]
    network = build(ranks.small_method("simclr").example, SIZE, 0)
    head = kind(kind.Config(name=name), network, 2, kind.kinds[0]).train()

    class Labelled(Images):
        def __getitem__(self, address: tuple[int, int]) -> Sample:
            mask, box = torch.zeros(SIZE, SIZE, dtype=torch.int64), torch.tensor([[4.0, 4.0, 20.0, 24.0, 1.0]])
            target = {"mask": mask, "boxes": box}.get(head.kind, torch.tensor(1))
            return Sample([torch.randn(1, SIZE, SIZE)], address[1], target, address[1], 0)

    assert_untouched(head, lambda: choose("auto", Labelled(Time(), 0), stream(8), head, device=CPU, bf16=False))


# /dev/shm. A batch of 10 samples has 10 x (400 + 3 x 8) bytes; one batch is in use beside those that are ahead.

BATCH = 10 * 424


@pytest.mark.parametrize(
    ("wanted", "batches", "processes", "workers", "prefetch"),
    [
        (4, 9, 1, 4, 2),
        (4, 8, 1, 4, 1),
        (4, 5, 1, 4, 1),
        (4, 4, 1, 3, 1),
        (4, 2, 1, 1, 1),
        (4, 1, 1, 0, 1),
        (4, 9, 2, 3, 1),  # another process on this machine has as many
        ("auto", 3, 1, 2, 1),
    ],
)
def test_what_is_ahead_fits_in_four_fifths_of_the_shared_memory(
    wanted: Any, batches: int, processes: int, workers: int, prefetch: int, clock: Time, machine: Any
) -> None:
    machine(64 * processes, batches * BATCH / 0.8 + 1)
    dataset, module = Images(clock, 0.5), Noisy(clock, 1.0)
    found = choose(wanted, dataset, stream(10), module, device=CPU, bf16=False, processes_per_node=processes)
    assert (found.workers, found.prefetch) == (workers, prefetch)
    if (wanted, workers, prefetch) == (4, 4, 2):
        assert found.lines == ()
    else:
        assert found.lines[-1].startswith("warning: /dev/shm has 0.0 MB free, of which batches may take 80%")
        assert "--shm-size=1g" in found.lines[-1]
        assert (f"{workers} of" if workers else "no workers") in found.lines[-1]


def test_the_line_says_how_large_it_should_be(clock: Time, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(64, 64 * 2**20)
    monkeypatch.setattr(input_speed, "tensors", lambda _: [SimpleNamespace(nbytes=2**24)])  # 160 MiB a batch
    found = choose(8, Images(clock, 0.5), stream(10), Noisy(clock), device=CPU, bf16=False)
    assert found.workers == 0
    assert found.lines == (
        "warning: /dev/shm has 67.1 MB free, of which batches may take 80%; 167.8 MB each, they would take 2.9 GB: "
        "no workers. Make it larger (of a container with --shm-size=4g)",  # 17 x 160 MiB / 0.8 = 3.3 GiB
    )


def test_a_system_without_it(clock: Time, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(input_speed, "SHARED_MEMORY", tmp_path / "absent")
    found = choose(5, Images(clock, 0.5), stream(10), Noisy(clock), device=CPU, bf16=False)
    assert (found.workers, found.prefetch, found.lines) == (5, 2, ())
