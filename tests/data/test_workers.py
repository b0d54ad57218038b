import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

WORKER = """
import os, sys, time
from sslmed.data import workers
workers.CHECK_SECONDS = 0.02
workers.follow(int(sys.argv[1]), 0)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def worker(parent: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", WORKER, str(parent.pid)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_a_worker_ends_with_the_process_that_started_it(
    parent: subprocess.Popen[bytes], worker: subprocess.Popen[bytes]
) -> None:
    parent.kill()
    parent.wait(10)
    assert worker.wait(20) == 1


def test_a_worker_leaves_signals_to_the_process_that_started_it(worker: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.wait(0.3)
