import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sslmed import distributed
from sslmed.config import Interrupted
from sslmed.training.signals import SignalWatch

BOTH = (signal.SIGINT, signal.SIGTERM)
ALL = (*BOTH, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    before = [signal.getsignal(number) for number in ALL]
    yield before
    for number, handler in zip(ALL, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def watch() -> SignalWatch:
    watch = SignalWatch()
    watch.install()
    return watch


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_remembered_and_cuts_nothing(number: signal.Signals, watch: SignalWatch) -> None:
    assert watch.received is None
    send(number)
    assert watch.received is number


@pytest.mark.parametrize("first", ALL)
def test_a_ctrl_c_after_it_stops_at_once(first: signal.Signals, watch: SignalWatch) -> None:
    send(first)
    with pytest.raises(Interrupted, match="--resume") as caught:
        send(signal.SIGINT)
    assert caught.value.exit_code == 130


def test_the_first_counts(watch: SignalWatch) -> None:
    send(signal.SIGINT)
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert watch.received is signal.SIGINT


def test_the_block_puts_back_what_was_there(handlers: list[object]) -> None:
    with SignalWatch() as watch:
        assert signal.getsignal(signal.SIGINT) == watch._remember
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as Lightning does
        watch.install()
        assert signal.getsignal(signal.SIGTERM) == watch._remember
    assert [signal.getsignal(number) for number in ALL] == handlers


def test_an_error_in_the_block_is_not_replaced_by_the_signal(handlers: list[object]) -> None:
    with pytest.raises(ValueError, match="oops"), SignalWatch():  # noqa: PT012
        send(signal.SIGINT)
        raise ValueError("oops")
    assert [signal.getsignal(number) for number in ALL] == handlers


def test_a_signal_that_nobody_acted_on_comes_again_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), SignalWatch():
        send(signal.SIGINT)


def test_the_end_of_a_slot_after_the_last_step_is_no_matter() -> None:
    with SignalWatch():
        send(signal.SIGUSR1)


def test_another_thread_may_train_but_gets_no_signals(handlers: list[object]) -> None:
    errors: list[BaseException] = []

    def train() -> None:
        try:
            with SignalWatch() as watch:
                watch.install()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join(10)
    assert errors == []
    assert [signal.getsignal(number) for number in ALL] == handlers


# What several processes make of it.


@pytest.mark.parametrize(("own", "greatest"), [(None, 0), (None, 15), (2, 15), (10, 15), (2, 2)])
def test_the_processes_agree_on_one(
    own: int | None, greatest: int, watch: SignalWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have got none, or another, act on it too."""
    asked: list[int] = []
    monkeypatch.setattr(distributed, "largest", lambda number: asked.append(number) or greatest)
    if own:
        send(own)
    assert watch.agreed() == (greatest or None)
    assert watch.received == (greatest or None)
    assert asked == [own or 0]


def test_a_signal_that_comes_while_they_agree_is_not_lost(watch: SignalWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process waits there for the slowest: most signals come then."""

    def late(number: int) -> int:
        send(signal.SIGTERM)
        return number

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "largest", late)
        assert watch.agreed() is None
    assert watch.agreed() is signal.SIGTERM


# What may be cut.


def test_what_is_not_cut_is_returned(watch: SignalWatch) -> None:
    assert watch.cut(lambda: 5) == 5
    with pytest.raises(ValueError, match="oops"):
        watch.cut(lambda: fail("oops"))
    send(signal.SIGTERM)  # its block is over
    assert watch.received is signal.SIGTERM


def fail(words: str) -> None:
    raise ValueError(words)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_cuts_what_takes_long(number: signal.Signals, watch: SignalWatch) -> None:
    came_to: list[str] = []

    def work() -> int:
        try:
            send(number)
        except Exception:  # such as Lightning's, or a library's
            came_to.append("taken for an error")
        came_to.append("end")
        return 5

    assert watch.cut(work) is None
    assert came_to == []
    assert watch.received is number
    assert watch.cut(lambda: came_to.append("again")) is None
    assert came_to == [], "what would be cut at once does not begin"


def test_what_may_be_cut_has_the_signals_though_another_took_them(handlers: list[object]) -> None:
    with pytest.raises(KeyboardInterrupt), SignalWatch() as watch:  # noqa: PT012
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert watch.cut(lambda: send(signal.SIGINT)) is None
    assert [signal.getsignal(number) for number in ALL] == handlers


def test_outside_of_its_block_it_takes_no_signals(handlers: list[object]) -> None:
    assert SignalWatch().cut(lambda: [signal.getsignal(number) for number in ALL]) == handlers
