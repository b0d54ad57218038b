"""Ctrl-C, SIGTERM and SIGUSR1 ask for the end of the step; they never cut it. What changes nothing may be cut."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from sslmed import distributed
from sslmed.config import Interrupted

T = TypeVar("T")
HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalWatch:
    """Inside its block, remembers the first signal of those it heeds; a Ctrl-C after it stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._cutting = False

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in HEEDED}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not _in_main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        asked_to_end = self.received in (signal.SIGINT, signal.SIGTERM)
        if self.received and asked_to_end and error is None:  # it came after the last step: nobody has acted on it
            signal.raise_signal(self.received)

    def install(self) -> None:
        """Take over the signals, also from whoever took them since the block began."""
        if _in_main_thread():  # Python allows it in no other, where signals never arrive
            for number in HEEDED:
                signal.signal(number, self._remember)

    def agreed(self) -> signal.Signals | None:
        """The signal that any of the processes has received. All must ask at the same point."""
        number = distributed.largest(self.received or 0)
        if not number:  # one that has come while we asked is kept for the next time
            return None
        self.received = signal.Signals(number)
        return self.received

    def cut(self, work: Callable[[], T]) -> T | None:
        """What ``work`` returns, or None when a signal came before its end: then it must be done again.

        For what takes long and changes nothing: probes and checks on val patients.
        """
        if self._before:  # outside the block nobody would put them back
            self.install()
        if self.received:
            return None
        try:
            try:
                self._cutting = True
                found = work()
            finally:
                self._cutting = False
        except _CutShort:
            return None
        return found

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:  # not KeyboardInterrupt: Lightning would end the process with 1
            raise Interrupted("stopped at once by a second Ctrl-C; --resume goes on from the last checkpoint", number)
        self.received = self.received or signal.Signals(number)
        if self._cutting:
            raise _CutShort


class _CutShort(BaseException):
    """Not an Exception: nobody on the way may take it for an error of his own."""


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
