"""A benchmark as a table of cells, each finished cell kept as JSON, so that a long table fills over several sittings.

    cells = Cells(Path("benchmarks/results/label_efficiency"), command="python benchmarks/label_efficiency.py")
    score = cells.run("linear-random-10%", lambda: {"auroc": 0.77}, seed=0)

A cell is computed again only when its file is missing or was made with other settings. Each says the commit, command,
device, threads and time that made it.
"""

import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslmed.durable import write_json
from sslmed.run import versions


class Cells:
    """The finished cells of one benchmark in a folder.

    Args:
        folder: where the JSON files lie; made when absent.
        command: how to make the whole table again.
        of: the commit, where the code lies without its history; by default git is asked.
    """

    def __init__(self, folder: Path, command: str, of: str | None = None) -> None:
        self.folder = folder
        self.command = command
        self.commit = of or commit()  # of the code that this process has loaded, whatever happens to the files
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, compute: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        """The result of a cell: from its file, or computed now and kept.

        Args:
            name: unique in this benchmark.
            compute: returns what JSON can hold.
            settings: whatever decides the result; other settings make another result.
        """
        if (known := self.finished(name, **settings)) is not None:
            return known
        wall, cpu = time.monotonic(), time.process_time()
        result = compute()
        about = {"wall_seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
        made = {**about, **self._circumstances()}
        write_json(self.path(name), {"name": name, "settings": settings, "result": result, "made": made})
        return result

    def finished(self, name: str, **settings: Any) -> dict[str, Any] | None:
        """The result of a cell that was made with these settings, or None."""
        path = self.path(name)
        if not path.exists():
            return None
        cell = json.loads(path.read_text(encoding="utf-8"))
        same = cell["settings"] == json.loads(json.dumps(settings))
        result: dict[str, Any] = cell["result"]
        return result if same else None

    def result(self, name: str) -> dict[str, Any]:
        """The result of a finished cell, by whatever settings: another benchmark's."""
        if not self.path(name).exists():
            raise SystemExit(f"{self.path(name)} is missing; make it first")
        result: dict[str, Any] = json.loads(self.path(name).read_text(encoding="utf-8"))["result"]
        return result

    def path(self, name: str) -> Path:
        """The file of a cell."""
        return self.folder / (re.sub(r"[^\w.%=-]+", "_", name) + ".json")

    def made(self, name: str) -> dict[str, Any]:
        """Under which circumstances a finished cell was made."""
        made: dict[str, Any] = json.loads(self.path(name).read_text(encoding="utf-8"))["made"]
        return made

    def _circumstances(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "command": self.command,
            "device": device(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }


def device() -> str:
    """What computes here, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{platform.machine()} CPU, {capability}, {torch.cpu.get_capabilities().get('cpu_name', platform.processor())}"
    )


def commit() -> str:
    """The commit of the working tree, with ``+changes`` where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../sslmed", "*.py"], capture_output=True, text=True, check=False
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
