"""Ctrl-C and SIGTERM ask for the end of the step; they never cut it."""

import signal
from types import FrameType


class SignalWatch:
    """Remembers the first SIGINT or SIGTERM; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take over both signals for this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
