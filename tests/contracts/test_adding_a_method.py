"""docs/adding-a-method.md is true: its code, put into files of its own, passes what every method must pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "adding-a-method.md"
PLUGIN = """
import sys

sys.path[:0] = [{tests!r}, {parity!r}]
import ranks

ranks.PRELOAD.append("plugin")  # rank processes must know the method too
import torch
from cases import CASES, Case, random
from sslmed.methods import METHODS
from upside_down import UpsideDown

{line}
{case}
"""


def run(folder: Path, *arguments: str, method: str | None = None) -> subprocess.CompletedProcess[str]:
    """pytest over the contracts with the page's method registered from ``folder``."""
    code, line, case = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (folder / "upside_down.py").write_text(method or code)
    case = case.replace("sslmed.methods.upside_down", "upside_down")
    paths = {"tests": str(TESTS), "parity": str(TESTS / "parity")}
    (folder / "plugin.py").write_text(PLUGIN.format(line=line, case=case, **paths))
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-k", "upside_down"]
    return subprocess.run(
        [*command, *arguments],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@pytest.mark.ddp
def test_the_pages_method_passes_every_contract(tmp_path: Path) -> None:
    (marks,) = re.findall(r'-m "(.+?)" -k upside_down', PAGE.read_text(encoding="utf-8"))
    done = run(tmp_path, "-m", marks, "tests/contracts/test_methods.py", "tests/parity/test_parity.py", "-vv")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name in ("overfits_eight", "two_processes_equal_one", "parameter_gradients", "papers_formula", "bf16"):
        assert re.search(rf"{name}.*PASSED", done.stdout), name


def test_a_method_that_is_wrong_by_a_hundredth_does_not(tmp_path: Path) -> None:
    (code, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = code.replace("return F.cross_entropy(", "return 1.01 * F.cross_entropy(")
    assert wrong != code
    done = run(tmp_path, "tests/parity/test_parity.py", "-k", "papers_formula and upside_down", method=wrong)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
