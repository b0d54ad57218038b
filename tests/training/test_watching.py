"""Processes that belong together, seen with real ones: sleeps, and a Python that ends as it is told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from sslmed.config import ElsewhereError, SslmedError, TemporaryError
from sslmed.training import watching
from sslmed.training.watching import watch

Process = subprocess.Popen[bytes]
LIVES = ["sleep", "60"]


def ends(code: int, after: float = 0) -> list[str]:
    return ["sh", "-c", f"sleep {after}; exit {code}"]


def dies(number: int, after: float = 0) -> list[str]:
    return ["sh", "-c", f"sleep {after}; kill -{number} $$"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE", 0.3)
    monkeypatch.setattr(watching, "POLL", 0.01)


@pytest.fixture
def started() -> Iterator[Callable[..., list[Process]]]:
    processes: list[Process] = []

    def start(*commands: list[str]) -> list[Process]:
        processes.extend(subprocess.Popen(command) for command in commands)
        return processes

    yield start
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.kill()
        process.wait()
    assert left == [], "no process is left, however it ended"


def test_all_go_well(started: Callable[..., list[Process]]) -> None:
    ranks = started(ends(0, after=0.2), ends(0), ends(0))
    watch(ranks)
    assert [process.returncode for process in ranks] == [0, 0, 0]


def test_one_that_is_done_early_is_no_failure(started: Callable[..., list[Process]]) -> None:
    """Later than the others by more than the grace."""
    watch(started(ends(0), ends(0, after=0.6)))


def test_one_fails_and_the_others_hang(started: Callable[..., list[Process]]) -> None:
    ranks, begin = started(LIVES, ends(65), LIVES), time.monotonic()
    with pytest.raises(ElsewhereError, match="stands above") as caught:
        watch(ranks)
    assert caught.value.exit_code == 65
    assert 0.3 <= time.monotonic() - begin < 5
    assert [process.returncode for process in ranks] == [-signal.SIGKILL, 65, -signal.SIGKILL]


def test_the_others_have_time_to_say_what_they_have_noticed(started: Callable[..., list[Process]]) -> None:
    ranks = started(ends(75, after=0.15), ends(65))
    with pytest.raises(ElsewhereError):
        watch(ranks)
    assert [process.returncode for process in ranks] == [75, 65]


@pytest.mark.parametrize(
    ("commands", "code"),
    [
        ((ends(75), ends(65, after=0.1)), 65),  # it lost the other one, and noticed before that was gone
        ((ends(65), ends(75, after=0.1)), 65),
        ((ends(75), ends(75)), 75),
        ((ends(75), LIVES), 75),  # that the other one is ended here is no cause
        ((ends(143), ends(143)), 143),
        ((ends(3), ends(1, after=0.1)), 3),
        ((ends(0), ends(66)), 66),
    ],
)
def test_what_is_told_is_the_cause(
    commands: tuple[list[str], ...], code: int, started: Callable[..., list[Process]]
) -> None:
    with pytest.raises(ElsewhereError) as caught:
        watch(started(*commands))
    assert caught.value.exit_code == code


def test_one_is_killed(started: Callable[..., list[Process]]) -> None:
    with pytest.raises(
        TemporaryError, match=r"rank 1 was ended by SIGKILL \(9\).*memory.*batch_size.*\n.*--resume"
    ) as caught:
        watch(started(LIVES, dies(9)))
    assert caught.value.exit_code == 75
    assert len(str(caught.value).splitlines()) <= 2


def test_a_crash_is_no_want_of_memory(started: Callable[..., list[Process]]) -> None:
    with pytest.raises(TemporaryError, match=r"rank 0 was ended by SIGSEGV \(11\)") as caught:
        watch(started(dies(11), LIVES))
    assert "memory" not in str(caught.value)


@pytest.mark.parametrize("first", [75, 1])
def test_a_killed_one_is_the_cause_whatever_the_others_make_of_it(
    first: int, started: Callable[..., list[Process]]
) -> None:
    killed, noticed = dies(9), ends(first, after=0.15)
    with pytest.raises(TemporaryError, match="rank 1 was ended by SIGKILL"):
        watch(started(noticed, killed))


def test_one_that_noticed_before_the_system_had_ended_the_killed_one(started: Callable[..., list[Process]]) -> None:
    with pytest.raises(TemporaryError, match="rank 1 was ended by SIGABRT"):
        watch(started(ends(75), dies(6, after=0.15)))


def test_one_that_aborts_because_it_lost_another_is_not_the_cause(started: Callable[..., list[Process]]) -> None:
    """As NCCL's own watchdog does."""
    with pytest.raises(ElsewhereError) as caught:
        watch(started(dies(6, after=0.15), ends(65)))
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SslmedError("why not")], ids=repr)
def test_none_is_left_when_the_wait_itself_is_broken_off(
    error: BaseException, started: Callable[..., list[Process]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = started(LIVES, LIVES)

    def broken(_: float) -> None:
        raise error

    monkeypatch.setattr(watching.time, "sleep", broken)
    with pytest.raises(type(error)):
        watch(ranks)
    assert [process.returncode for process in ranks] == [-signal.SIGKILL, -signal.SIGKILL]


def test_one_that_heeds_no_signal_is_ended_too(started: Callable[..., list[Process]]) -> None:
    stubborn = [
        sys.executable,
        "-c",
        "import signal, time\nfor n in (2, 10, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(60)",
    ]
    ranks = started(stubborn, ends(2))
    with pytest.raises(ElsewhereError):
        watch(ranks)
    with pytest.raises(ProcessLookupError):
        os.kill(ranks[0].pid, 0)
