"""How long steps wait for data."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from sslmed.training.input_speed import Chosen

WINDOW, SETTLING = 50, 10  # steps that the warning looks at, and those before them, while workers start
MOST_WAITING = 0.2


class Clock(Protocol):
    """Marks moments, and says later how far they lie apart."""

    def mark(self) -> Any:
        """This moment."""

    def passed(self, mark: Any) -> bool:
        """Whether it has come: a GPU is behind the program."""

    def seconds(self, first: Any, then: Any) -> float:
        """From one to the other; both have passed."""


class HostClock:
    """The program's own time."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def seconds(self, first: float, then: float) -> float:
        return then - first


class GpuClock:
    """The time of a GPU, which has work for a while when the program already waits for the next batch."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, first: torch.cuda.Event, then: torch.cuda.Event) -> float:
        return float(first.elapsed_time(then)) / 1000


class WaitMeter(pl.Callback):
    """The share of time that steps wait for data: from the end of one to the start of the next, of both together.

    The first batch, for which workers start, does not count. Put it behind the other callbacks and call ``restart``
    after a probe or a save, so that these are neither.

    Args:
        say: is told once, when of the last 50 steps more than a fifth went by waiting.
        chosen: what may be advised. On a CPU without a core to spare making batches is work, no waiting, and nothing is
            said.
    """

    def __init__(self, say: Callable[[str], None], chosen: Chosen, clock: Clock | None = None) -> None:
        self._say, self._chosen, self._clock = say, chosen, clock
        self._on_gpu = False
        self._pending: deque[tuple[Any, Any, Any]] = deque()  # end of the last step, start and end of this one
        self._last: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # waiting, and all
        self._taken = [0.0, 0.0]
        self._counted, self._warned = 0, False
        self.restart()

    @property
    def share(self) -> float | None:
        """Of the last 50 steps, from 0 to 1; None before there is one."""
        self._settle()
        return _share(sum(wait for wait, _ in self._last), sum(both for _, both in self._last))

    def take(self) -> float | None:
        """The share since it was last taken; None when no step was measured since."""
        self._settle()
        share, self._taken = _share(*self._taken), [0.0, 0.0]
        return share

    def restart(self) -> None:
        """What goes on now is neither waiting nor a step."""
        self._ended: Any = None
        self._started: Any = None

    def arrived(self) -> None:
        """The batch of the next step is here; the loader says so."""
        if self._clock is not None and self._started is None:
            self._started = self._clock.mark()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._on_gpu = pl_module.device.type == "cuda"
        self._clock = self._clock or (GpuClock() if self._on_gpu else HostClock())
        self.restart()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.arrived()  # where the loader has not said so: what is done with a batch on its way counts as waiting

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._clock is not None  # noqa: S101
        end = self._clock.mark()
        if self._ended is not None and self._started is not None:
            self._pending.append((self._ended, self._started, end))
        self._ended, self._started = end, None
        self._settle()
        self._warn()

    def _settle(self) -> None:
        while self._clock is not None and self._pending and self._clock.passed(self._pending[0][2]):
            before, start, end = self._pending.popleft()
            wait, both = self._clock.seconds(before, start), self._clock.seconds(before, end)
            self._last.append((wait, both))
            self._taken = [self._taken[0] + wait, self._taken[1] + both]
            self._counted += 1

    def _warn(self) -> None:
        if self._warned or self._counted < SETTLING + WINDOW or (not self._on_gpu and not self._chosen.most):
            return
        share = self.share
        if share is not None and share > MOST_WAITING:
            self._warned = True
            self._say(f"warning: {share:.0%} of the last {WINDOW} steps' time was waiting for data. {self._advice()}")

    def _advice(self) -> str:
        ways = []
        if self._chosen.workers < self._chosen.most:
            ways.append(f"raise data.workers (now {self._chosen.workers}, there are cores for {self._chosen.most})")
        else:
            ways.append("give it more cores, and data.workers with them")
        if self._on_gpu:
            ways.append("let the GPU augment with data.augment_on=device")
        text = ", or ".join(ways)
        return f"{text[0].upper()}{text[1:]}."


def _share(waiting: float, both: float) -> float | None:
    return waiting / both if both > 0 else None
