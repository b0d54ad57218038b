"""Which process this is, and what starting several of them does: with a stub in the place of ``python -m sslmed``."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

from sslmed import distributed
from sslmed.config import ElsewhereError, Interrupted, TemporaryError, UsageError
from sslmed.training import watching
from sslmed.training.launch import Environment, Place, goes_on, joined, launch, place, requeue
from sslmed.training.trainer import TrainConfig, processes

ELASTIC = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

Set = Callable[..., None]


@pytest.fixture(autouse=True)
def env(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Nobody has launched this process, until the test says so."""
    for name in [*ELASTIC, *RESTARTS, *(name for name in os.environ if name.startswith(("SLURM_", "SSLMED_")))]:
        monkeypatch.delenv(name, raising=False)

    def set_(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_


# Which process this is.

TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
SRUN = {
    **{"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_STEP_NUM_TASKS": 8, "SLURM_STEP_NUM_NODES": 2},
    **{"SLURM_PROCID": 5, "SLURM_LOCALID": 1},
}
BATCH_SCRIPT = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NNODES": 2}


@pytest.mark.parametrize(
    ("variables", "expected", "nodes"),
    [
        ({}, Place(), 1),
        (TORCHRUN, Place(5, 1, 8, 4, True), 2),
        ({"RANK": 1, "WORLD_SIZE": 2}, Place(1, 1, 2, 2, True), 1),
        ({"RANK": 0, "WORLD_SIZE": 1}, Place(), 1),  # a cluster's way to say that there is but one
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}, Place(0, 0, 1, 1, True), 1),
        ({"RANK": 3}, Place(), 1),  # somebody else's word
        (SRUN, Place(5, 1, 8, 4, True), 2),
        (BATCH_SCRIPT, Place(), 1),  # no step of srun: one process, whatever has been asked for
        (BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": 1}, Place(), 1),
        (SRUN | {"RANK": 1, "WORLD_SIZE": 2}, Place(1, 1, 2, 2, True), 1),  # torchrun within a job
    ],
)
def test_a_process_knows_its_place(variables: dict[str, object], expected: Place, nodes: int, env: Set) -> None:
    env(**variables)
    assert place() == expected
    assert place().nodes == nodes


def test_lightning_is_told_the_same(env: Set) -> None:
    env(**TORCHRUN, MASTER_ADDR="head", MASTER_PORT=1234)
    told = Environment(place())
    assert (told.global_rank(), told.local_rank(), told.node_rank(), told.world_size()) == (5, 1, 1, 8)
    assert (told.main_address, told.main_port) == ("head", 1234)
    assert told.creates_processes_externally
    told.set_global_rank(0)
    told.set_world_size(1)
    assert (told.global_rank(), told.world_size()) == (5, 8), "Lightning does not know better"


@pytest.mark.parametrize("name", RESTARTS)
def test_a_run_goes_on_by_itself_when_a_launcher_starts_it_again(name: str, env: Set, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    assert not goes_on(tmp_path / "run")
    env(**{name: 0})
    assert not goes_on(tmp_path / "run")
    env(**{name: 2})
    assert goes_on(tmp_path / "run")
    assert not goes_on(tmp_path / "absent"), "it was ended before it had begun"


@pytest.mark.ddp
def test_all_go_on_when_one_machine_has_counted_a_restart(tmp_path: Path) -> None:
    assert ranks.on_two_ranks(ranks.started_again, str(tmp_path)) == [False, False]
    (tmp_path / "run.json").touch()
    assert ranks.on_two_ranks(ranks.started_again, str(tmp_path)) == [True, True]


def test_alone_there_is_nothing_to_join(env: Set) -> None:
    for variables in ({}, {"RANK": 0, "WORLD_SIZE": 1}):
        env(**variables)
        with joined(gpu=False, minutes=1):
            assert not dist.is_initialized()
            assert (distributed.world_size(), distributed.rank()) == (1, 0)


def wait_for_the_other(meeting: str, parent: int) -> None:
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "SSLMED_MEETING": meeting, "SSLMED_PARENT": str(parent)}
    with joined(gpu=False, minutes=5):
        raise AssertionError("there is no other")


@pytest.mark.ddp
def test_a_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    """Though it waits for the others, and heeds nothing."""
    parent = subprocess.Popen(["sleep", "60"])
    process = ranks.context().Process(target=wait_for_the_other, args=(str(tmp_path / "meeting"), parent.pid))
    process.start()
    try:
        process.join(4)
        assert process.is_alive()
        parent.kill()
        parent.wait()
        process.join(20)
        assert process.exitcode == 1
    finally:
        parent.kill()
        process.kill()


# How many are to be started.


@pytest.mark.parametrize(
    ("devices", "variables", "gpus", "count"),
    [
        ("auto", {}, 4, 1),
        ("cpu", {}, 4, 1),
        (1, {}, 0, 1),
        (3, {}, 0, 3),
        (3, {}, 3, 3),
        ("auto", TORCHRUN, 4, 1),
        (4, TORCHRUN, 4, 1),  # as many as it has started here
        (8, TORCHRUN, 8, 1),  # or in all
        (2, {"RANK": 1, "WORLD_SIZE": 2}, 0, 1),  # one that we have started
    ],
)
def test_how_many_are_started(
    devices: Any, variables: dict[str, object], gpus: int, count: int, env: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    env(**variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert processes(TrainConfig(devices=devices)) == count


def test_numbers_that_cannot_be(env: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="devices is 3, but there are 2 GPUs; allowed: auto, cpu, or 1 to 2"):
        processes(TrainConfig(devices=3))
    env(**TORCHRUN)
    with pytest.raises(
        UsageError, match="devices is 2, but the launcher has started 4 processes here, 8 in all; remove"
    ):
        processes(TrainConfig(devices=2))


# Asking for the job again.


@pytest.fixture
def scontrol(tmp_path: Path, env: Set) -> Callable[[str], Callable[[], list[str]]]:
    """A SLURM that notes what it is asked."""

    def make(answer: str) -> Callable[[], list[str]]:
        program, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n{answer}\n')
        program.chmod(0o755)
        env(PATH=f"{program.parent}:{os.environ['PATH']}")
        return lambda: asked.read_text().splitlines() if asked.exists() else []

    return make


def test_slurm_is_asked_for_the_job_again(scontrol: Any, env: Set) -> None:
    asked, said = scontrol("exit 0"), []
    requeue(said.append)
    assert (asked(), said) == ([], []), "this is no job"
    env(SLURM_JOB_ID=123)
    requeue(said.append)
    assert (asked(), said) == (["requeue 123"], ["SLURM runs job 123 again"])


def test_of_an_array_only_the_own_task(scontrol: Any, env: Set) -> None:
    asked, said = scontrol("exit 0"), []
    env(SLURM_JOB_ID=131, SLURM_ARRAY_JOB_ID=123, SLURM_ARRAY_TASK_ID=7)
    requeue(said.append)
    assert (asked(), said) == (["requeue 123_7"], ["SLURM runs job 123_7 again"])


def test_slurm_refuses(scontrol: Any, env: Set) -> None:
    scontrol("echo 'Invalid job id specified' >&2; exit 1")
    env(SLURM_JOB_ID=123)
    said: list[str] = []
    requeue(said.append)
    assert said == ["warning: SLURM did not requeue job 123: Invalid job id specified"]


def test_slurm_does_not_answer(scontrol: Any, env: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is saved; how it ends must not change."""
    scontrol("exec sleep 30")
    env(SLURM_JOB_ID=123)
    monkeypatch.setattr("sslmed.training.launch.ANSWER_SECONDS", 0.2)
    said: list[str] = []
    requeue(said.append)
    assert said == ["warning: SLURM did not requeue job 123: no answer for 0.2 s"]


def test_there_is_no_slurm_to_ask(env: Set, tmp_path: Path) -> None:
    env(SLURM_JOB_ID=123, PATH=tmp_path)
    said: list[str] = []
    requeue(said.append)
    assert len(said) == 1
    assert "there is no scontrol here" in said[0]


def test_one_process_asks(scontrol: Any, env: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = scontrol("exit 0"), []
    env(SLURM_JOB_ID=123)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    requeue(said.append)
    assert (asked(), said) == ([], [])


# Starting them.

STUB = """#!{python}
import json, os, signal, sys, time
rank = os.environ["RANK"]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "SSLMED_MEETING", "SSLMED_PARENT")
facts = {{name: os.environ.get(name) for name in names}}
facts |= {{"words": sys.argv[1:], "pid": os.getpid(), "group": os.getpgid(0)}}
got = []
if {heeds}:
    for number in (2, 10, 15):
        signal.signal(number, lambda number, _: got.append(number))
print("a result")
with open("{folder}/" + rank + ".partial", "w") as file:
    json.dump(facts, file)
os.rename("{folder}/" + rank + ".partial", "{folder}/" + rank)
{then}
"""
WAITS = """
deadline = time.monotonic() + 20
while len(got) < {count} and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.1)
open("{folder}/got-" + rank, "w").write(json.dumps(got))
sys.exit(128 + got[0])
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """What runs in the place of each process; it writes down what it has been given. The folder where it does."""

    def make(then: str = "", heeds: bool = True, count: int = 1) -> Path:
        folder, program = tmp_path / "ranks", tmp_path / "stub"
        folder.mkdir()
        then = then.format(folder=folder, count=count)
        program.write_text(STUB.format(python=sys.executable, folder=folder, heeds=heeds, then=then))
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(watching, "GRACE", 1.0)
        return folder

    return make


def facts(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / str(rank)).read_text())
    return found


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_is_told_its_place_and_the_command(
    stub: Callable[..., Path], env: Set, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = stub()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    launch(["pretrain", "a b", "--out", "c"], 2)
    both = [facts(folder, rank) for rank in range(2)]
    for rank, each in enumerate(both):
        assert each["words"] == ["-m", "sslmed", "pretrain", "a b", "--out", "c"]
        assert (each["RANK"], each["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (each["WORLD_SIZE"], each["LOCAL_WORLD_SIZE"], each["SSLMED_PARENT"]) == ("2", "2", str(os.getpid()))
        assert int(each["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert each["group"] == each["pid"], "a Ctrl-C at the terminal does not reach it twice"
    assert both[0]["SSLMED_MEETING"] == both[1]["SSLMED_MEETING"]
    assert not Path(both[0]["SSLMED_MEETING"]).parent.exists(), "swept"
    assert capfd.readouterr().out == "", "the result is told by the launcher alone"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert "RANK" not in os.environ


def test_one_that_fails_ends_the_others(stub: Callable[..., Path]) -> None:
    folder = stub("time.sleep(0.3)\nsys.exit(65) if rank == '1' else time.sleep(30)")
    with pytest.raises(ElsewhereError) as caught:
        launch([], 2)
    assert caught.value.exit_code == 65
    assert not any(alive(facts(folder, rank)["pid"]) for rank in range(2))


def send_when_ready(folder: Path, numbers: list[int], count: int = 2, apart: float = 0.3) -> threading.Thread:
    """To this process, from a thread of its own: the main one waits."""

    def send() -> None:
        deadline = time.monotonic() + 20
        while not all((folder / str(rank)).exists() for rank in range(count)) and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(apart)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_goes_on_to_all_of_them_once(number: signal.Signals, stub: Callable[..., Path]) -> None:
    folder = stub(WAITS)
    sender = send_when_ready(folder, [number])
    with pytest.raises(ElsewhereError) as caught:
        launch([], 2)
    sender.join()
    assert caught.value.exit_code == 128 + number
    assert [json.loads((folder / f"got-{rank}").read_text()) for rank in range(2)] == [[number], [number]]


def test_a_second_ctrl_c_goes_on_too(stub: Callable[..., Path]) -> None:
    folder = stub(WAITS, count=2)
    sender = send_when_ready(folder, [signal.SIGINT, signal.SIGINT])
    with pytest.raises(ElsewhereError):
        launch([], 2)
    sender.join()
    assert [json.loads((folder / f"got-{rank}").read_text()) for rank in range(2)] == [[2, 2], [2, 2]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_while_they_are_still_starting(number: signal.Signals, code: int, stub: Callable[..., Path]) -> None:
    """None heeds signals yet, or any more: all end of it, as one process alone would."""
    folder = stub("time.sleep(30)", heeds=False)
    sender = send_when_ready(folder, [number])
    with pytest.raises((Interrupted, TemporaryError), match=f"stopped by {number.name}, at once") as caught:
        launch([], 2)
    sender.join()
    assert caught.value.exit_code == code


def test_a_signal_while_the_first_is_being_started_reaches_all(
    stub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, started, begin = stub(WAITS), [], subprocess.Popen

    def popen(*arguments: Any, **named: Any) -> Any:
        started.append(begin(*arguments, **named))
        if len(started) == 1:  # it lives, but nobody knows it yet
            os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(Interrupted, match="SIGTERM, at once") as caught:
        launch([], 2)
    assert caught.value.exit_code == 143
    assert all(process.poll() is not None for process in started)
    assert not list(folder.glob("got-*"))


def test_one_that_cannot_be_started_leaves_none_behind(
    stub: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, begin = [], subprocess.Popen

    def popen(*arguments: Any, **named: Any) -> Any:
        if started:
            raise BlockingIOError("no more processes")
        started.append(begin(*arguments, **named))
        return started[-1]

    stub("time.sleep(30)")
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(BlockingIOError):
        launch([], 2)
    assert started[0].poll() is not None


def test_from_another_thread_they_are_started_too(stub: Callable[..., Path]) -> None:
    folder = stub()
    thread = threading.Thread(target=launch, args=(["x"], 2))
    thread.start()
    thread.join(20)
    assert [facts(folder, rank)["words"] for rank in range(2)] == [["-m", "sslmed", "x"]] * 2
