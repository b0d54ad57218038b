"""The run folder, the same for every command.

recipe.yaml  run.json  metrics.jsonl  train.log  checkpoints/last.ckpt  artifact/
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from sslmed import __version__, console, distributed
from sslmed.config import (
    DataError,
    DiskError,
    Interrupted,
    MissingInputError,
    OutputExistsError,
    SslmedError,
    TemporaryError,
    UsageError,
)
from sslmed.durable import write_atomically, write_json

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "timm", "albumentations", "h5py", "numpy")


class Run:
    """One run folder, locked while this process works in it. As a context manager it records how the work ended.

    Of several processes the first makes it and writes in it; the others follow.
    """

    def __init__(self, path: Path, state: dict[str, Any], lock: int | None) -> None:
        """Without a ``lock`` this is one of the other processes of a training: it writes nothing but its own log."""
        self.path = path
        self._state = state
        self._lock = lock
        self._mirrors: list[Callable[[int, dict[str, Any]], None]] = []

    @classmethod
    def start(cls, path: Path | str, command: str, recipe: str, facts: dict[str, Any]) -> Self:
        """Make a new run.

        Args:
            command: the verb.
            recipe: the resolved recipe as YAML.
            facts: seed, data fingerprint and whatever else the command records.

        Raises:
            OutputExistsError: something is there already.
        """
        made: list[Self] = []

        def make() -> dict[str, Any]:
            made.append(cls._make(Path(path), command, recipe, facts))
            return made[0]._state

        state = distributed.first(make)
        return made[0] if made else cls(Path(path), state, None)

    @classmethod
    def _make(cls, path: Path, command: str, recipe: str, facts: dict[str, Any]) -> Self:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputExistsError(
                f"the output {path} exists already; go on with the same command and --resume, or give another --out"
            )
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        with write_atomically(path / "recipe.yaml") as partial:
            partial.write_text(recipe, encoding="utf-8")
        state = {
            "id": uuid.uuid4().hex[:12],
            "command": command,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
        }
        return cls(path, state, lock)._enter("created")

    @classmethod
    def resume(cls, path: Path | str, command: str) -> Self:
        """Go on with a run that was interrupted, or open one that has finished.

        Raises:
            MissingInputError: there is no run.
            DataError: it is a run of another command.
            TemporaryError: another process works in it.
        """
        made: list[Self] = []

        def make() -> dict[str, Any]:
            made.append(cls._open(Path(path), command))
            return made[0]._state

        state = distributed.first(make)
        return made[0] if made else cls(Path(path), state, None)

    @classmethod
    def _open(cls, path: Path, command: str) -> Self:
        state = read(path)
        if state["command"] != command:
            raise DataError(f"{path} is a run of `sslmed {state['command']}`, not of `sslmed {command}`")
        run = cls(path, state, _lock(path))
        if not run.done and state["threads"] != torch.get_num_threads():
            run.say(
                f"note: {state['threads']} threads before, {torch.get_num_threads()} now: "
                "the result will be as good, but not the same to the last bit"
            )
        return run

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint lies."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def artifact(self) -> Path:
        """Where the artifact lies once the run is done."""
        return self.path / "artifact"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return bool(self._state["status"] == "done")

    @property
    def result(self) -> dict[str, Any]:
        """What a finished run returned."""
        return dict(self._state["result"])

    def finish(self, result: dict[str, Any]) -> None:
        """Keep what the run returns, in JSON's types; a score that is not defined becomes null."""
        self._state["result"] = _without_nan(result)

    def fact(self, name: str) -> Any:
        """Something that was recorded at the start."""
        return self._state.get(name)

    def refuse_changes(self, changes: Sequence[str], facts: dict[str, Any]) -> None:
        """Refuse a resume that would not be the same run, and let go of it.

        Args:
            changes: how the recipe differs, a line a setting.
            facts: what was recorded at the start, as it would be now.

        Raises:
            UsageError: something differs.
        """
        others = [
            f"{name}: {self.fact(name)} -> {value}"
            for name, value in facts.items()
            if self.fact(name) not in (None, value)
        ]
        if changes or others:
            self.close()
            lines = [*changes, *others]
            more = [f"and {len(lines) - 3} more"] if len(lines) > 3 else []
            raise UsageError(
                "\n".join(
                    [
                        "--resume cannot change the run:",
                        *lines[:3],
                        *more,
                        "go on as it was, or start a new run with another --out",
                    ]
                )
            )

    def log(self, step: int, **values: float | int | str | None) -> None:
        """Append one line to metrics.jsonl."""
        if self._lock is None:
            return
        self._append("metrics.jsonl", json.dumps({"step": step, **values}) + "\n")
        for mirror in self._mirrors:
            mirror(step, values)

    def mirror(self, mirror: Callable[[int, dict[str, Any]], None]) -> None:
        """Have ``mirror`` called with step and values of all that is logged from now on."""
        self._mirrors.append(mirror)

    def rewind(self, step: int) -> None:
        """Forget metrics of later steps than ``step``: they will come again."""
        path = self.path / "metrics.jsonl"
        if self._lock is None or not path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        with write_atomically(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def say(self, line: str) -> None:
        """Print a line and keep it in train.log; the other processes have one of their own, and print nothing."""
        name = "train.log"
        if self._lock is None:
            name = f"train-rank-{distributed.rank()}.log"
        else:
            console.say(line)
        self._append(name, f"{time.strftime('%H:%M:%S')} {line}\n")

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DiskError(f"cannot write {self.path / name}: {error.strerror}. Go on with --resume.") from error

    def __enter__(self) -> Self:
        return self._enter("running")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state["exit_code"] = _exit_code(error)
        try:
            self._enter("done" if error is None else "interrupted" if _interrupted(error) else "failed")
        except DiskError:
            if error is None:
                raise
        finally:
            self.close()
        if isinstance(error, SslmedError) and error.agreed:  # a launcher stops those that are left when one has ended
            with contextlib.suppress(RuntimeError):
                distributed.exchange(None)

    def close(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            os.close(self._lock)

    def _enter(self, status: str) -> Self:
        self._state |= {
            "status": status,
            "pid": os.getpid(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        if self._lock is None:
            return self
        write_json(self.path / "run.json", self._state)
        return self


def read(path: Path) -> dict[str, Any]:
    """run.json of a run.

    Raises:
        MissingInputError: there is none.
        DataError: it is not readable.
    """
    try:
        state = json.loads((path / "run.json").read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "command" not in state:
            raise ValueError("it names no command")
    except FileNotFoundError as error:
        raise MissingInputError(f"there is no run at {path}; start it without --resume") from error
    except ValueError as error:
        raise DataError(f"{path / 'run.json'} is damaged: {error}") from error
    return state


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def versions() -> dict[str, str]:
    """Of Python, sslmed and the packages that decide the numbers."""
    found = {"python": platform.python_version(), "sslmed": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _lock(path: Path) -> int:
    """Held until the process ends, however it ends."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise TemporaryError(f"another process works in {path}; wait for it, or stop it and use --resume") from error
    return descriptor


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interrupted(error: BaseException | None) -> bool:
    return isinstance(error, Interrupted | TemporaryError | KeyboardInterrupt)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, SslmedError) else 1
