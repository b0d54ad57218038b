"""Which cores processes may use, and what those that read images owe to the process that started them."""

import os
import signal
import threading
import time

CHECK_SECONDS = 2.0


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]


def follow(parent: int, *_: object) -> None:
    """Leave signals to ``parent`` and end with it; the first thing that a worker does.

    A Ctrl-C, or the SIGTERM of a job scheduler, reaches the whole group, and a worker that died of it would cost the
    parent the step that it wants to finish. A killed parent cannot end its workers: forkserver's would wait for it for
    ever (measured; torch's own watchdog looks at the forkserver).

    Args:
        parent: its process id.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: int) -> None:
    """End this process, at once, when ``parent`` is no more. For a thread of its own."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(CHECK_SECONDS)
