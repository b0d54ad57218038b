"""What a person sees while a command works: always on standard error, so that standard output stays the result."""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def command(*words: object) -> str:
    """A command line that can be pasted into a shell."""
    return shlex.join(str(word) for word in words)


def say(line: str) -> None:
    """Print one line, with the process that says it where that is not the first of several."""
    print(tag() + line, file=sys.stderr, flush=True)


def process_rank() -> int:
    """This process's number among those that a launcher has started, from 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def tag() -> str:
    """What stands before the lines of all processes but the first."""
    return f"[rank {process_rank()}] " if process_rank() else ""


def progress(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield ``items``; draw a bar on a terminal, else print a plain line about every five seconds and at the end."""
    if sys.stderr.isatty() and not process_rank():
        yield from _bar(items, total, label)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if done == total or now - last >= 5:
            last = now
            say(f"{label} {done}/{total}, {done / max(now - started, 1e-6):.0f}/s")


def _bar(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    yield from track(items, description=label, total=total, console=Console(stderr=True))
