"""Many files to scans: what belongs together is read together, in order, in this process or in several.

Nothing here knows what becomes of a scan: the caller says what to make of it, where it was read.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, TypeVar

from sslmed.config import DataError, TemporaryError
from sslmed.data import readers
from sslmed.data.acceptance import accept_scan
from sslmed.data.modality import Modality, named
from sslmed.data.scan import Scan
from sslmed.data.sources.facing import facing
from sslmed.data.views import Pixels
from sslmed.data.workers import follow

BATCH_FILES, BATCH_BYTES = 8, 2**24  # of a worker's task, unless one unit has more
HEADERS = 64  # files a task when only headers are read
SCANS = 16  # of one file that a worker hands over: the others, of thousands perhaps, are read here one by one

T = TypeVar("T")
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Unit:
    """Files that are read together: one file, or the slices of one series; ``bytes`` is what they have."""

    paths: tuple[Path, ...]
    bytes: int = 0


@dataclass(frozen=True)
class Refused:
    """Why a unit, or the rest of it, cannot be used; without its path.

    ``by_modality``: it was read, but the modality, or what should have been made of it, has no use for such a scan.
    ``at``: which of the unit's files it is about.
    """

    reason: str
    by_modality: bool = False
    at: int = 0


@dataclass(frozen=True)
class Read(Generic[T]):
    """Reads a unit scan by scan and makes something of each; picklable when ``make`` is.

    Attributes:
        modality: name of the modality that accepts the scans.
        make: (scan, pixels as accepted) -> what is wanted.
        resample_tilt: see `readers.read_series`.
    """

    modality: str
    make: Callable[[Scan, Pixels], T]
    resample_tilt: bool = False

    def __call__(self, unit: Unit) -> Iterator[T | Refused]:
        """What was made of each scan; a `Refused` in the place of one that cannot be used, or of all that is left."""
        policy = named(self.modality)
        scans = self._scans(unit)
        while True:
            try:
                scan = facing(next(scans))
            except StopIteration:
                return
            except DataError as error:
                yield _refused(error, unit)
                return
            try:
                made: T | Refused = self.make(scan, accept_scan(policy, scan))
            except DataError as error:
                made = replace(_refused(error, unit), by_modality=True)
            yield made

    def all(self, units: Sequence[Unit]) -> list[list[T | Refused]]:
        """What `__call__` gives for the first scans of each unit."""
        return [list(islice(self(unit), SCANS)) for unit in units]

    def _scans(self, unit: Unit) -> Iterator[Scan]:
        if len(unit.paths) > 1:
            yield readers.read_series(unit.paths, self.resample_tilt)
        else:
            yield from readers.scans(unit.paths[0])


def _refused(error: DataError, unit: Unit) -> Refused:
    text = str(error)
    for number, path in enumerate(unit.paths):
        if text.startswith(f"{path}: "):
            return Refused(text.removeprefix(f"{path}: "), at=number)
    return Refused(text)


class Pool:
    """Worker processes, or none: then everything is done here."""

    def __init__(self, executor: ProcessPoolExecutor | None, workers: int) -> None:
        self._executor, self._workers = executor, workers

    @property
    def alone(self) -> bool:
        """Whether there is no process but this one."""
        return self._executor is None

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """``function`` of each item, in order; a few items ahead of who asks, and no more."""
        if self._executor is None:
            yield from map(function, items)
            return
        pool = self._executor
        tasks = (pool.submit(function, item) for item in items)
        waiting = deque(islice(tasks, 2 * self._workers))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(islice(tasks, 1))
        except BrokenProcessPool as error:
            raise TemporaryError(
                "a reading process died: for want of memory, or of `if __name__ == '__main__':` in your script. "
                "Try again with fewer --workers, or with 0."
            ) from error


@contextmanager
def pool(workers: int) -> Iterator[Pool]:
    """``workers`` processes that read beside this one; with 0, none."""
    if workers == 0:
        yield Pool(None, 0)
        return
    # Not fork: the parent has threads (BLAS, progress bar) whose locks a forked child would inherit held.
    with ProcessPoolExecutor(
        workers, get_context("forkserver"), initializer=follow, initargs=(os.getpid(),)
    ) as executor:
        try:
            yield Pool(executor, workers)
        finally:
            executor.shutdown(cancel_futures=True)


def units(paths: Sequence[Path], policy: Modality, processes: Pool) -> tuple[list[Unit], list[tuple[Path, str]]]:
    """The units that files make up, in the order of their first files, and files whose header is bad, with the reason.

    DICOM files of one series are one unit where the modality reads volumes; every other file is a unit.
    """
    series: dict[str, list[Path]] = {}
    found: list[list[Path]] = []
    bad: list[tuple[Path, str]] = []
    names: dict[Path, str | Refused | None] = {}
    if "volume" in policy.kinds:
        slices = [path for path in paths if readers.is_dicom_file(path)]
        batches = [slices[start : start + HEADERS] for start in range(0, len(slices), HEADERS)]
        for batch, told in zip(batches, processes.map(_series, batches), strict=True):
            names.update(zip(batch, told, strict=True))
    for path in paths:
        name = names.get(path)
        if isinstance(name, Refused):
            bad.append((path, name.reason))
        elif name is None:
            found.append([path])
        elif name in series:
            series[name].append(path)
        else:
            series[name] = [path]
            found.append(series[name])
    return [Unit(tuple(files), sum(_size(path) for path in files)) for files in found], bad


def read_all(
    read: Read[T], wanted: Sequence[Unit], processes: Pool, start: int = 0
) -> Iterator[tuple[int, Iterable[T | Refused]]]:
    """Each unit's number and what `Read` gives for it, from unit ``start`` on, in order; to be taken at once."""
    if processes.alone:
        yield from ((number, read(wanted[number])) for number in range(start, len(wanted)))
        return
    number = start
    for results in processes.map(read.all, _batches(wanted[start:])):
        for first in results:
            yield number, _whole(first, wanted[number], read)
            number += 1


def _whole(first: Sequence[Made], unit: Unit, read: Callable[[Unit], Iterator[Made]]) -> Iterator[Made]:
    """What a worker made of the first scans of a unit, then what is made of the others here, one by one."""
    yield from first
    if len(first) == SCANS:
        yield from islice(read(unit), SCANS, None)


def _batches(wanted: Sequence[Unit]) -> Iterator[list[Unit]]:
    batch: list[Unit] = []
    for unit in wanted:
        files, size = sum(len(each.paths) for each in batch), sum(each.bytes for each in batch)
        if batch and (files >= BATCH_FILES or size >= BATCH_BYTES):
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


def _series(paths: Sequence[Path]) -> list[str | Refused | None]:
    found: list[str | Refused | None] = []
    for path in paths:
        try:
            found.append(readers.series_of(path))
        except DataError as error:
            found.append(Refused(str(error).removeprefix(f"{path}: ")))
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # the reader will say what is wrong
