"""docs/adding-a-head.md is true: its code, put into a file of its own, passes what every head must pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "adding-a-head.md"
PLUGIN = """
import sys

sys.path[:0] = [{tests!r}]
import torch
from sslmed.heads import HEADS
from cosine import Cosine

{line}
"""


def run(folder: Path, code: str, line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest over the contracts with the page's head registered from ``folder``."""
    (folder / "cosine.py").write_text(code)
    (folder / "plugin.py").write_text(PLUGIN.format(tests=str(TESTS), line=line))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "tests/contracts/test_heads.py",
    ]
    return subprocess.run(
        [*command, "-vv", *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_pages_head_passes_every_contract(tmp_path: Path) -> None:
    code, line = blocks()
    done = run(tmp_path, code, line, "-k", "cosine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(re.findall(r"cosine.*PASSED", done.stdout)) >= 8


def test_a_head_whose_loss_forgets_its_weights_does_not(tmp_path: Path) -> None:
    code, line = blocks()
    wrong = code.replace("F.normalize(self.directions, dim=1)", "F.normalize(self.directions.detach(), dim=1)")
    assert wrong != code
    done = run(tmp_path, wrong, line, "-k", "cosine and overfits")
    assert done.returncode == 1, done.stdout[-1500:]
