"""Checkpoints under kill -9 while they are written, and on a full disk: a whole one is always there."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks
import saving

from sslmed.data.store import Store
from sslmed.run import read
from sslmed.training.checkpoint_files import STATE, load, newest

SETTINGS = (
    *("backbone.name=test_resnet", "data.size=32", "data.workers=0", "train.max_steps=9", "train.batch_size=16"),
    *("train.save_every_steps=3", "method.hidden=64", "monitor.knn_every=0", "monitor.log_every=1"),
)


def process(target: Any, *args: Any) -> Any:
    started = ranks.context().Process(target=target, args=args)
    started.start()
    return started


def test_thirty_kills_while_saving_leave_a_whole_one_each(tmp_path: Path) -> None:
    path, moments, last, half = tmp_path / "last.ckpt", random.Random(0), 0, 0
    for _ in range(30):
        before = path.stat().st_mtime_ns if path.exists() else 0
        saver = process(saving.save_forever, str(path))
        deadline = time.monotonic() + 60
        while (not path.exists() or path.stat().st_mtime_ns == before) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        os.kill(saver.pid, signal.SIGKILL)
        saver.join(10)
        half += len(list(tmp_path.glob(".*")))
        found = newest(path, pytest.fail)
        assert found is not None
        assert found.path == path
        assert found.step >= last
        weights = load(path)["state_dict"]["weight"]
        assert float(weights.min()) == float(weights.max()) == found.step
        assert not list(tmp_path.glob(".*")), "what a killed writer left is swept"
        last = found.step
    assert last > 30
    assert half > 0, "at least one was killed in the middle of a write"


def check_that_the_first_is_whole_and_goes_on(store: Store, run: Path) -> None:
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert load(checkpoint)[STATE]["step"] == 3
    assert not list(checkpoint.parent.glob(".*"))
    again = process(saving.pretrain_on_a_full_disk, str(store.path), str(run), SETTINGS, None)
    again.join(60)
    assert again.exitcode == 0
    assert load(checkpoint)[STATE]["step"] == 9


@pytest.mark.parametrize("room", [1000, 100_000])
def test_a_disk_that_fills_up_ends_with_74_and_the_checkpoint_before(
    room: int, phantom_store: Store, tmp_path: Path
) -> None:
    """A limit on the size of files is what a full disk is: a write that comes to an end half-way."""
    run = tmp_path / "run"
    full = process(saving.pretrain_on_a_full_disk, str(phantom_store.path), str(run), SETTINGS, room)
    full.join(60)
    assert full.exitcode == 74
    if room > 1000:  # else there is no room for run.json either
        assert read(run)["exit_code"] == 74
    check_that_the_first_is_whole_and_goes_on(phantom_store, run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_small_disk(small_disk: Path, phantom_store: Store) -> None:
    run = small_disk / "run"
    filler = small_disk / "filler"
    full = process(saving.pretrain_until_the_disk_is_full, str(phantom_store.path), str(run), SETTINGS, str(filler))
    full.join(60)
    assert full.exitcode == 74
    filler.unlink()
    check_that_the_first_is_whole_and_goes_on(phantom_store, run)
