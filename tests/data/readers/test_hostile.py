"""Mutated files: a reader ends with scans or with a DataError, soon, without filling the memory, in no other way."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

READERS = ("png", "jpeg", "tiff", "dicom_native", "dicom_compressed", "nifti", "nifti_gz", "npy", "npz")
Attack = Callable[[str, int, int], dict[str, Any]]


@pytest.fixture(scope="module")
def attack() -> Iterator[Attack]:
    """Has one process read mutants, reader after reader: what one leaves behind, the next would suffer from."""
    command = [sys.executable, str(Path(__file__).with_name("mutants.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None

        def ask(reader: str, first: int, last: int) -> dict[str, Any]:
            print(reader, first, last, file=worker.stdin, flush=True)
            said = worker.stdout.readline()
            assert said, f"the worker died of {reader} with exit code {worker.wait()}"
            report: dict[str, Any] = json.loads(said)
            return report

        try:
            yield ask
        finally:
            worker.kill()


def check(report: dict[str, Any], files: int) -> None:
    assert report["wrong"] == []
    assert report["scans"] + report["refused"] == files
    assert report["refused"] > files / 10  # the mutations do harm
    assert report["slowest"] < 2
    assert report["grown"] < 300


@pytest.mark.parametrize("reader", READERS)
def test_mutated_files(attack: Attack, reader: str) -> None:
    check(attack(reader, 0, 300), 300)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("reader", READERS)
def test_more_mutated_files(attack: Attack, reader: str, record_property: Callable[[str, Any], None]) -> None:
    report = attack(reader, 300, 2300)
    record_property("report", report)
    print(reader, report)
    check(report, 2000)
