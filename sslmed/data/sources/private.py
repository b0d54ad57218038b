"""What must not be inside a store lies beside it, for its owner alone: the report and who is who."""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.data.shards.writer import disk_errors
from sslmed.data.sources.catalogue import Row
from sslmed.durable import write_atomically

REPORT, KEY_TABLE, PROGRESS = "data_report.json", "key_table.csv", "progress"
KEY_COLUMNS = ("file", "patient", "sample", "patient_key", "part", "slice")


def folder_of(store: Path) -> Path:
    """Where the private part of a store lies."""
    return store.with_name(f"{store.name}.private")


def make(folder: Path) -> None:
    """Make the folder, closed to everyone else."""
    with disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write what became of every file."""
    with write_atomically(folder / REPORT) as partial, _private(partial) as file:
        json.dump(report, file, indent=2)


def write_key_table(
    folder: Path, rows: Sequence[Row], patients: npt.NDArray[np.bytes_], slices: npt.NDArray[np.uint32]
) -> None:
    """Write which file and patient each row of the store is, a line a row."""
    with write_atomically(folder / KEY_TABLE) as partial, _private(partial) as file:
        table = csv.writer(file)
        table.writerow(KEY_COLUMNS)
        for number, (row, key, slice_) in enumerate(zip(rows, patients.tolist(), slices.tolist(), strict=True)):
            table.writerow([row.name, row.patient, number, key.decode(), row.part, slice_])


def _private(path: Path) -> Any:
    return os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
        "w",
        encoding="utf-8",
        errors="surrogateescape",
        newline="",
    )
