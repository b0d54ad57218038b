"""Ctrl-C and SIGTERM ask for the end of the step; they never cut it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from sslmed.config import Interrupted


class SignalWatch:
    """Inside its block, remembers the first SIGINT or SIGTERM; a Ctrl-C after it stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not _in_main_thread():
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and error is None:  # it came after the last step: nobody has acted on it
            signal.raise_signal(self.received)

    def install(self) -> None:
        """Take over both signals, also from whoever took them since the block began."""
        if _in_main_thread():  # Python allows it in no other, where signals never arrive
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:  # not KeyboardInterrupt: Lightning would end the process with 1
            raise Interrupted("stopped at once by a second Ctrl-C; --resume goes on from the last checkpoint", number)
        self.received = self.received or signal.Signals(number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
