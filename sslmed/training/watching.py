"""Processes that belong together: when one fails, the others are stopped, and one sentence says what happened."""

import signal
import subprocess
import time
from collections.abc import Sequence

from sslmed.config import ElsewhereError, TemporaryError

GRACE = 10.0  # seconds in which the others may notice by themselves, and say so
LOST = TemporaryError.exit_code  # what a process ends with that has lost another one
POLL = 0.05


def watch(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended; end those that live on ``GRACE`` seconds after one has failed.

    Raises:
        ElsewhereError: one has failed, and has said why.
        TemporaryError: one was killed.
    """
    ended: dict[int, int] = {}  # rank -> exit code, in the order in which they ended
    deadline: float | None = None
    stopped_here: set[int] = set()
    try:
        while len(ended) < len(ranks):
            for rank, process in enumerate(ranks):
                code = process.poll()
                if code is not None and rank not in ended:
                    ended[rank] = code
                    if code and deadline is None:
                        deadline = time.monotonic() + GRACE
            if deadline is not None and time.monotonic() > deadline:
                stopped_here |= {rank for rank in range(len(ranks)) if rank not in ended}
                kill(ranks)
            time.sleep(POLL)
    finally:
        kill(ranks)
    _tell({rank: code for rank, code in ended.items() if code and rank not in stopped_here})


def kill(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End those that still live, at once."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()


def _tell(failed: dict[int, int]) -> None:
    """The first that failed is the cause, but for those that have lost another: they may notice before it has ended."""
    causes = {rank: code for rank, code in failed.items() if code != LOST} or failed
    if not causes:
        return
    rank, code = next(iter(causes.items()))
    if code > 0:
        raise ElsewhereError("a process of this training failed; what it said stands above", code)
    memory = " So a system takes back memory: lower train.batch_size or data.workers." if code == -9 else ""
    raise TemporaryError(
        f"rank {rank} was ended by {signal.Signals(-code).name} ({-code}), and the others with it.{memory}\n"
        "The same command with --resume goes on from the last checkpoint."
    )
