"""The share of time that steps wait, by a clock that the tests turn."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sslmed.training.input_speed import Chosen
from sslmed.training.trainer import silence
from sslmed.training.wait_meter import GpuClock, WaitMeter

MORE = Chosen(workers=2, most=7)


class Turned:
    """A clock that others turn; a GPU is ``behind`` the program by so many seconds."""

    def __init__(self) -> None:
        self.now, self.behind = 0.0, 0.0

    def mark(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return mark + self.behind <= self.now

    def seconds(self, first: float, then: float) -> float:
        return then - first


class Training:
    """Calls the meter as Lightning does."""

    def __init__(self, chosen: Chosen = MORE, device: str = "cuda") -> None:
        self.clock, self.said = Turned(), list[str]()
        self.meter = WaitMeter(self.said.append, chosen, self.clock)
        self.meter.on_train_start(None, SimpleNamespace(device=torch.device(device)))

    def step(self, waiting: float, working: float, probe: float = 0.0) -> None:
        """Wait for a batch and work on it; another callback may take a while before the meter hears of the end."""
        self.clock.now += waiting
        self.meter.on_train_batch_start(None, None, None, 0)
        self.clock.now += working
        if probe:
            self.clock.now += probe
            self.meter.restart()
        self.meter.on_train_batch_end(None, None, None, None, 0)


@pytest.fixture
def training() -> Training:
    return Training()


def test_the_share_since_it_was_last_taken(training: Training) -> None:
    assert training.meter.take() is None
    training.step(100, 1)  # workers start
    assert training.meter.take() is None
    assert training.meter.share is None
    training.step(1, 3)
    training.step(3, 3)
    assert training.meter.take() == pytest.approx(0.4)
    training.step(0, 2)
    assert training.meter.take() == 0
    assert training.meter.take() is None
    assert training.meter.share == pytest.approx(4 / 12)


def test_the_share_of_the_last_fifty_steps(training: Training) -> None:
    for waiting in (9, *[9] * 30, *[1] * 50):
        training.step(waiting, 3)
    assert training.meter.share == pytest.approx(0.25)


def test_a_probe_or_a_save_is_neither(training: Training) -> None:
    for _ in range(3):
        training.step(1, 3)
    training.step(1, 3, probe=500)  # before the meter hears of the end of the step
    training.step(1, 3)
    training.clock.now += 300  # and after it
    training.meter.restart()
    training.step(1, 3)
    training.step(1, 3)
    assert training.meter.take() == pytest.approx(0.25)


def test_a_gpu_is_asked_only_for_what_it_has_done(training: Training) -> None:
    training.clock.behind = 5
    training.step(0, 4)
    training.step(1, 3)
    assert training.meter.take() is None
    training.step(1, 7)
    assert training.meter.take() == pytest.approx(0.25)
    training.clock.now += 5
    assert training.meter.take() == pytest.approx(0.125)


# The warning.


def test_it_warns_once_and_only_when_there_is_reason(training: Training) -> None:
    for _ in range(200):
        training.step(2, 8)
    assert training.said == []  # a fifth is not more than a fifth
    for _ in range(200):
        training.step(3, 7)
    assert training.said == [
        "warning: 20% of the last 50 steps' time was waiting for data. Raise data.workers (now 2, there are cores for "
        "7), or let the GPU augment with data.augment_on=device."
    ]


def test_it_looks_at_fifty_steps_and_not_at_the_first_ones(training: Training) -> None:
    training.step(60, 1)
    for _ in range(10):
        training.step(50, 1)  # the other workers have started later
    for _ in range(49):
        training.step(0.5, 1)
    assert training.said == []
    training.step(0.5, 1)
    assert training.said[0].startswith("warning: 33% of the last 50 steps' time was waiting for data.")
    quiet = Training()
    quiet.step(60, 1)
    for waiting in (*[50] * 10, *[0.1] * 200):
        quiet.step(waiting, 1)
    assert quiet.said == []


@pytest.mark.parametrize(
    ("chosen", "device", "advice"),
    [
        (Chosen(7, most=7), "cuda", "Give it more cores, and data.workers with them, or let the GPU augment with"),
        (Chosen(0, most=0), "cuda", "Give it more cores"),
        (Chosen(0, most=7), "cpu", "Raise data.workers (now 0, there are cores for 7)."),
        (Chosen(0, most=0), "cpu", None),  # making batches is work there, not waiting
    ],
)
def test_it_advises_what_can_be_done(chosen: Chosen, device: str, advice: str | None) -> None:
    training = Training(chosen, device)
    for _ in range(100):
        training.step(1, 1)
    assert len(training.said) == (advice is not None)
    assert advice is None or f"data. {advice}" in training.said[0]


# Real clocks.


class Slow(torch.utils.data.IterableDataset[torch.Tensor]):
    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        for _ in range(6):
            time.sleep(0.05)
            yield torch.zeros(4, 2)


def test_in_a_real_training() -> None:
    class Quick(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    silence()
    meter = WaitMeter(print, MORE)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[meter], enable_model_summary=False, **quiet)
    trainer.fit(Quick(), Slow())
    share = meter.take()
    assert share is not None
    assert 0.5 < share < 1


def test_the_clock_of_a_gpu_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1

        def record(self) -> None:
            self.at = 7

        def query(self) -> bool:
            return self.at > 0

        def elapsed_time(self, then: Any) -> float:
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = GpuClock()
    mark: Any = clock.mark()
    assert mark.at == 7
    assert clock.passed(mark)
    assert clock.seconds(mark, mark) == 1.5
