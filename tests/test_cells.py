"""The benchmarks' cell runner: a finished cell is not computed again, other settings are."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "cells.py"


@pytest.fixture
def cells(tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("cells", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cells"] = module
    spec.loader.exec_module(module)
    return module.Cells(tmp_path / "results", "python benchmarks/x.py")


def test_a_finished_cell_is_kept_and_says_how_it_was_made(cells: Any) -> None:
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"auroc": 0.5}

    for _ in range(2):
        assert cells.run("linear/1%", compute, seeds=(0, 1)) == {"auroc": 0.5}
    assert len(calls) == 1
    made = json.loads(next(cells.folder.glob("*.json")).read_text())["made"]
    assert {"commit", "command", "device", "threads", "versions", "cpu_seconds", "wall_seconds"} <= made.keys()


def test_other_settings_make_another_result(cells: Any) -> None:
    assert cells.run("a", lambda: {"x": 1}, epochs=1) == {"x": 1}
    assert cells.finished("a", epochs=2) is None
    assert cells.run("a", lambda: {"x": 2}, epochs=2) == {"x": 2}


def test_a_cell_that_fails_leaves_nothing(cells: Any) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cells.run("a", broken)
    assert cells.finished("a") is None
