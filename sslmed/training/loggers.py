"""Metrics in other places than metrics.jsonl: TensorBoard, a CSV file, Weights & Biases, MLflow.

They are copies: a library that is not installed is refused at the start, and after that nothing that goes wrong with
one of them stops a training, or holds up a step. Numbers, the recipe without its paths and the run's id are all they
get.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sslmed.config import MissingDependencyError
from sslmed.training.sinks import CLOSE_SECONDS, SINKS, LoggerName, Origin, Sink

__all__ = ["LoggerName", "Mirrors"]

REMOTE: tuple[LoggerName, ...] = ("wandb", "mlflow")
QUEUE = 1000  # log calls that wait for a slow network


class Mirrors:
    """The places that a run's metrics are copied to; for the process of rank 0.

    Args:
        names: of places, each of `LoggerName`.
        recipe: the resolved recipe, nested.
        say: takes a warning for the user.
        start: optimizer steps that a run which is resumed goes on from. What was logged of later ones comes again:
            TensorBoard and the CSV file then forget the first time; W&B and MLflow have both, of the same numbers.

    Raises:
        MissingDependencyError: a library is not installed.
    """

    def __init__(
        self,
        names: Sequence[LoggerName],
        run_path: Path,
        run_id: str,
        recipe: Mapping[str, Any],
        say: Callable[[str], None],
        start: int = 0,
    ) -> None:
        for name in names:
            refuse_missing(name)
        self._say = say
        self._sinks: dict[str, Sink] = {}
        origin = Origin(run_path, run_id, dict(_flat(recipe)), start, say)
        for name in dict.fromkeys(names):
            try:
                self._sinks[name] = Background(name, SINKS[name], origin) if name in REMOTE else SINKS[name](origin)
            except Exception as error:
                self._switch_off(name, error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Copy one line of metrics.jsonl; what is no number is left out."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        if numbers:
            self._each(lambda sink: sink.log(step, numbers))

    def flush(self) -> None:
        """Have what was logged on the disk; call it when a checkpoint is saved, so that a kill leaves no gap."""
        self._each(lambda sink: sink.flush())

    def close(self, ok: bool = True) -> None:
        """End, within a few seconds each; ``ok`` says whether training came to its end."""
        self._each(lambda sink: sink.close(ok))
        self._sinks.clear()

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in [*self._sinks.items()]:
            try:
                act(sink)
            except Exception as error:  # whatever a library raises, training goes on
                self._switch_off(name, error)

    def _switch_off(self, name: str, error: Exception) -> None:
        self._sinks.pop(name, None)
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        self._say(
            f"warning: {name} gets no more metrics ({type(error).__name__}: {reason}). "
            "Training goes on, and metrics.jsonl has all of them."
        )


class Background:
    """A sink that a thread of its own feeds, so that a step never waits for a network.

    The thread is a daemon: one that hangs does not keep the process. What it has to say or fails of is told by the
    next call.
    """

    def __init__(self, name: str, make: Callable[[Origin], Sink], origin: Origin) -> None:
        self._name, self._say = name, origin.say
        self._todo: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(QUEUE)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._dropped = False
        heard = Origin(origin.path, origin.run_id, origin.recipe, origin.start, self._lines.put)
        self._thread = threading.Thread(target=self._work, args=(make, heard), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._report()
        try:
            self._todo.put_nowait(lambda sink: sink.log(step, values))
        except queue.Full:
            if not self._dropped:
                self._dropped = True
                self._say(f"warning: {self._name} is slower than training; some of its metrics are left out.")

    def flush(self) -> None:
        self._report()

    def close(self, ok: bool) -> None:
        """Wait for the rest to be sent.

        Raises:
            TimeoutError: it was not, in ``CLOSE_SECONDS``.
        """
        try:
            self._todo.put(lambda sink: sink.close(ok), timeout=CLOSE_SECONDS)
            self._todo.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            pass
        self._thread.join(CLOSE_SECONDS)
        self._report()
        if self._thread.is_alive():
            raise TimeoutError(f"what was left was not sent within {CLOSE_SECONDS:.0f} s")

    def _report(self) -> None:
        while not self._lines.empty():
            self._say(self._lines.get())
        if self._error is not None:
            raise self._error

    def _work(self, make: Callable[[Origin], Sink], origin: Origin) -> None:
        try:
            sink = make(origin)
            while (act := self._todo.get()) is not None:
                act(sink)
        except BaseException as error:  # a library that wants to end the process ends its own thread
            self._error = error if isinstance(error, Exception) else RuntimeError(repr(error))


def refuse_missing(name: LoggerName) -> None:
    """Refuse a logger whose library is not installed.

    Raises:
        MissingDependencyError: with the pip line.
    """
    found = name == "csv" or find_spec(name)
    # a folder that happens to be called wandb or mlflow is a spec without an origin
    if not found or (found is not True and found.origin is None):
        raise MissingDependencyError(
            f"train.loggers has {name}, which is not installed: python -m pip install 'sslmed[loggers]'"
        )


def _flat(recipe: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value; a text with a slash in it is taken for a path, and is not told."""
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", _without_paths(value)


def _without_paths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _without_paths(each) for name, each in value.items()}
    if isinstance(value, os.PathLike) or (isinstance(value, str) and ("/" in value or value.startswith("~"))):
        return "(a path)"
    return value
