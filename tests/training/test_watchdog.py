"""A hang leaves every thread's stack; a training that goes on leaves nothing."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sslmed.run import Run
from sslmed.training.watchdog import Watchdog


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    with closing(Run.start(tmp_path / "run", "pretrain", "", {})) as run:
        yield run


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_hang_writes_down_where_every_thread_is(training: Any, run: Run) -> None:
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    dog, module = Watchdog(run, 0.05), training.Tiny(at={3: lambda _: hang_here(0.4)})
    try:
        training(module, [dog])
    finally:
        dog.close()
        leave.set()
        other.join()
    assert module.steps == 6, "training goes on"
    text = (run.path / "debug" / "hang-rank-0.txt").read_text()
    assert "in hang_here" in text
    assert "in wait" in text, "of the other thread"
    assert text.count("in hang_here") == 1


def test_it_is_the_time_of_one_step_that_counts(training: Any, run: Run) -> None:
    """Six steps of 0.06 s take longer than 0.3 s. Nothing is left then, but for what else is in the folder."""
    dog = Watchdog(run, 0.3)
    training(training.Tiny(at={step: lambda _: time.sleep(0.06) for step in range(1, 7)}), [dog])
    dog.close()
    time.sleep(0.35)
    assert not (run.path / "debug").exists(), "nor later: it has stopped watching"
    again = Watchdog(run, 60)
    training(training.Tiny(at={2: lambda _: (run.path / "debug" / "step-2.pt").touch()}), [again])
    again.close()
    again.close()
    assert [path.name for path in (run.path / "debug").iterdir()] == ["step-2.pt"]


def test_one_that_never_began_to_watch_may_be_closed(run: Run) -> None:
    Watchdog(run, 60).close()
    assert not (run.path / "debug").exists()


def test_a_training_that_fails_leaves_no_file(training: Any, run: Run) -> None:
    def fail(_: Any) -> None:
        raise ValueError("oops")

    dog = Watchdog(run, 60)
    with pytest.raises(ValueError, match="oops"):
        training(training.Tiny(at={2: fail}), [dog])
    dog.close()
    assert not (run.path / "debug").exists()
