import os
import signal
import threading
from collections.abc import Iterator

import pytest

from sslmed.config import Interrupted
from sslmed.training.signals import SignalWatch

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[object]]:
    before = [signal.getsignal(number) for number in BOTH]
    yield before
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def watch() -> SignalWatch:
    watch = SignalWatch()
    watch.install()
    return watch


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_remembered_and_cuts_nothing(number: signal.Signals, watch: SignalWatch) -> None:
    assert watch.received is None
    send(number)
    assert watch.received is number


@pytest.mark.parametrize("first", BOTH)
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
    assert [signal.getsignal(number) for number in BOTH] == handlers


def test_an_error_in_the_block_is_not_replaced_by_the_signal(handlers: list[object]) -> None:
    with pytest.raises(ValueError, match="oops"), SignalWatch():  # noqa: PT012
        send(signal.SIGINT)
        raise ValueError("oops")
    assert [signal.getsignal(number) for number in BOTH] == handlers


def test_a_signal_that_nobody_acted_on_comes_again_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), SignalWatch():
        send(signal.SIGINT)


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
    assert [signal.getsignal(number) for number in BOTH] == handlers
