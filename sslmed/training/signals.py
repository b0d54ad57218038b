"""Ctrl-C and SIGTERM ask for the end of the step; they never cut it."""

import signal
from types import FrameType

from sslmed.config import Interrupted


class SignalWatch:
    """Remembers the first SIGINT or SIGTERM; a Ctrl-C after it stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take over both signals for this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:  # not KeyboardInterrupt: Lightning would end the process with 1
            raise Interrupted("stopped at once by a second Ctrl-C; --resume goes on from the last checkpoint", number)
        self.received = self.received or signal.Signals(number)
