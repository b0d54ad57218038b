"""One artifact for all tests, and a copy of it to spoil."""

import shutil
from pathlib import Path

import pytest
from artifacts import written


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    return written(tmp_path_factory.mktemp("artifact") / "artifact")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "artifact"))
