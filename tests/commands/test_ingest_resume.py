"""An ingest that is killed: no store, nothing that others may read and should not, and the same store in the end."""

import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sslmed.commands.ingest import ingest
from sslmed.config import DataError
from sslmed.data.store import Store
from sslmed.data.writers import write_image

SHARD_BYTES = 8_000  # four pictures of 2,000 bytes: a shard each four
SCRIPT = """
    import os, signal, sys
    from sslmed.commands import ingest as module
    from sslmed.data.shards import progress, writer as store_writer

    where, moment = sys.argv[3], int(sys.argv[4])
    calls = []

    def stopping(function):
        def call(*arguments, **named):
            calls.append(1)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return call

    if where == "add":
        store_writer.StoreWriter.add = stopping(store_writer.StoreWriter.add)
    elif where == "shard":
        store_writer.write_flushed = stopping(store_writer.write_flushed)
    elif where == "progress":
        progress.Progress.save = stopping(progress.Progress.save)
    elif where == "publish":
        store_writer.refuse_existing = stopping(store_writer.refuse_existing)
    if __name__ == "__main__":
        module.ingest(sys.argv[1], sys.argv[2], modality="xray", patient=r"p\\d+", shard_bytes=8000)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures of fifteen patients, two of them broken."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 255, (50, 40), np.uint8)
        write_image(folder / f"p{number // 2:02d}_{number % 2}.png", pixels)
    (folder / "p04_0.png").write_bytes(b"no picture")
    (folder / "p14_1.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, tuple[str, ...]]:
    """A folder with a site key; the uninterrupted store's fingerprint and what it skipped."""
    home = tmp_path_factory.mktemp("whole")
    result = ingest(source, home / "store", modality="xray", patient=r"p\d+", shard_bytes=SHARD_BYTES)
    assert len(Store(result.path).about["shards"]) == 7
    return home, Store(result.path).fingerprint, tuple(skipped.file for skipped in result.skipped)


MOMENTS = [
    ("add", 3),
    ("add", 7),
    ("add", 28),
    ("shard", 1),
    ("shard", 4),
    ("shard", 8),
    ("progress", 1),
    ("progress", 3),
    ("progress", 7),
    ("publish", 2),
]


@pytest.mark.parametrize(("where", "moment"), MOMENTS)
def test_killed_ten_times_the_store_is_the_uninterrupted_one(
    source: Path, whole: tuple[Path, str, tuple[str, ...]], tmp_path: Path, where: str, moment: int
) -> None:
    home, expected, skipped = whole
    (tmp_path / "site.key").write_bytes((home / "site.key").read_bytes())
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(source), str(tmp_path / "store"), where, str(moment)]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert not (tmp_path / "store").exists()
    closed = [tmp_path / "store.private"] + [tmp_path / ".store.partial"] * (where != "publish")  # then it is a store
    assert {stat.S_IMODE(path.stat().st_mode) for path in closed} == {0o700}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".store.partial").iterdir()}
    result = ingest(source, tmp_path / "store", modality="xray", patient=r"p\d+", shard_bytes=SHARD_BYTES)
    store = Store(result.path)
    assert store.fingerprint == expected
    assert store.verify() == []
    assert tuple(each.file for each in result.skipped) == skipped
    done = (moment - 1) // 4 if where == "add" else moment - 1 if where != "publish" else 7
    kept = [path for path, when in before.items() if (store.path / path.name).stat().st_mtime_ns == when]
    assert len([path for path in kept if path.name.startswith("shard")]) == done
    assert any("went on" in note for note in result.notes) == (done > 0)
    assert {path.name for path in tmp_path.iterdir()} == {"site.key", "run.py", "store", "store.private"}
    assert {path.name for path in result.private.iterdir()} == {"data_report.json", "key_table.csv"}


def test_labels_that_were_wrong_cost_no_second_reading(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in source.iterdir())
    labels = tmp_path / "labels.csv"
    rows = [f"{source / name},{name[:3]},{['train', 'test'][int(name[4])]}" for name in names]
    labels.write_text("\n".join(["file,patient,split", *rows]))
    with pytest.raises(DataError, match="on two sides"):
        ingest(source, tmp_path / "store", modality="xray", labels=labels)
    rows = [f"{source / name},{name[:3]},train" for name in names]
    labels.write_text("\n".join(["file,patient,split", *rows]))
    read: list[Path] = []
    from sslmed.data import readers

    scans = readers.scans
    monkeypatch.setattr(readers, "scans", lambda path: read.append(path) or scans(path))
    result = ingest(source, tmp_path / "store", modality="xray", labels=labels)
    assert result.images == 28
    assert len(read) <= 2  # the last unit, whose parts might not all have come, and what was skipped after it


def test_other_files_or_settings_start_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sslmed.data import splits

    monkeypatch.setattr(splits, "check", lambda *_: (_ for _ in ()).throw(DataError("stop")))
    with pytest.raises(DataError, match="stop"):
        ingest(source, tmp_path / "store", modality="xray", patient=r"p\d+")
    monkeypatch.undo()
    result = ingest(source, tmp_path / "store", modality="xray", patient=r"p\d+", size=20)
    assert not any("went on" in note for note in result.notes)
    assert Store(result.path).pixels(0).shape == (25, 20)
