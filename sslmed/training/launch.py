"""Several processes: which of them this is, how they meet, and how they are started and watched on one machine.

torchrun and srun launch as well; then nothing is started here. Under our own launch processes meet through a file, so
that no port can be taken.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import (  # type: ignore[attr-defined]
    ClusterEnvironment,
    SLURMEnvironment,
)

from sslmed import distributed
from sslmed.config import Interrupted, SslmedError, TemporaryError, UsageError
from sslmed.data.workers import end_with, usable_cores
from sslmed.training.watching import kill, watch

MEETING, PARENT = "SSLMED_MEETING", "SSLMED_PARENT"
LOST = ("connection", "gloo", "nccl", "timed out", "peer")  # what a broken collective's message has in it
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
ANSWER_SECONDS = 60.0  # of SLURM


@dataclass(frozen=True)
class Place:
    """Which of the processes this is. ``launched``: somebody has started them."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launched: bool = False

    @property
    def nodes(self) -> int:
        """The number of machines, which all have as many processes."""
        return self.world_size // self.local_world_size


def place() -> Place:
    """As the launcher has left it in the environment: torchrun's words, or those of a SLURM job step."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        local_world = int(env.get("LOCAL_WORLD_SIZE", world))
        launched = world > 1 or "LOCAL_RANK" in env  # some clusters tell a single process that it is the first of one
        return Place(int(env["RANK"]), int(env.get("LOCAL_RANK", env["RANK"])), world, local_world, launched)
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        world = int(env["SLURM_STEP_NUM_TASKS"])
        nodes = int(env.get("SLURM_STEP_NUM_NODES", "1"))
        if world % nodes:
            raise UsageError(f"{world} tasks on {nodes} machines; give each as many, by --ntasks-per-node")
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), world, world // nodes, True)
    return Place()


def goes_on(out: Path | str) -> bool:
    """Whether a launcher runs the same command again, and the run that is there already is to go on.

    All processes must ask: torchrun counts restarts on each machine by itself, and only those that its own have caused.
    """
    again = any(int(os.environ.get(name, "0")) > 0 for name in (ATTEMPT, "SLURM_RESTART_COUNT"))
    return any(distributed.exchange(again and (Path(out) / "run.json").exists()))


@contextmanager
def joined(gpu: bool, minutes: float) -> Iterator[None]:
    """Inside the block the processes of one training know each other; alone, nothing happens.

    Args:
        minutes: after which they give up on one that does not answer.
    """
    here = place()
    if here.world_size == 1 or dist.is_initialized():
        yield
        return
    if PARENT in os.environ:
        threading.Thread(target=end_with, args=(int(os.environ[PARENT]),), daemon=True).start()
    if gpu:
        if here.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {here.local_rank} of this machine has no GPU: it sees {torch.cuda.device_count()}. "
                "Start as many processes as GPUs; under SLURM give --gpus-per-node rather than --gpus-per-task"
            )
        torch.cuda.set_device(here.local_rank)
    meeting: dict[str, Any] = {"rank": here.rank, "world_size": here.world_size}
    if MEETING in os.environ:
        meeting["store"] = dist.FileStore(os.environ[MEETING], here.world_size)  # type: ignore[attr-defined]
    elif ATTEMPT in os.environ and here.nodes == 1:  # torchrun's store still has the last attempt's addresses
        store = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))[0]  # type: ignore[attr-defined]
        meeting["store"] = dist.PrefixStore(os.environ[ATTEMPT], store)  # type: ignore[attr-defined]
    elif "MASTER_ADDR" not in os.environ:
        os.environ |= _slurm_meeting()
    with losses_told(), distributed.group("cpu:gloo,cuda:nccl" if gpu else "gloo", 60 * minutes, **meeting):
        yield


def _slurm_meeting() -> dict[str, str]:
    """The first machine of this job step, and a port of its own: steps of one job may run side by side."""
    slurm = SLURMEnvironment()
    machines = os.environ.get("SLURM_STEP_NODELIST")
    address = slurm.resolve_root_node_address(machines) if machines else slurm.main_address
    port = 20_000 + (10 * slurm.main_port + int(os.environ.get("SLURM_STEP_ID", "0"))) % 40_000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


@contextmanager
def losses_told() -> Iterator[None]:
    """Inside the block a collective that breaks because another process is gone is no bug.

    Raises:
        TemporaryError: it broke.
    """
    try:
        yield
    except RuntimeError as error:
        if place().world_size == 1 == distributed.world_size() or not any(word in str(error).lower() for word in LOST):
            raise
        raise TemporaryError(
            f"lost another process of this training: {str(error).splitlines()[0][:200]}\n"
            "What that one said, or the log of its machine, has the reason. Go on with the same command and --resume."
        ) from error


class Environment(ClusterEnvironment):
    """Tells Lightning that the processes exist and know each other."""

    def __init__(self, here: Place) -> None:
        super().__init__()
        self.here = here

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "localhost")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return place().launched

    def world_size(self) -> int:
        return self.here.world_size

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return self.here.rank

    def set_global_rank(self, rank: int) -> None: ...

    def local_rank(self) -> int:
        return self.here.local_rank

    def node_rank(self) -> int:
        return self.here.rank // self.here.local_world_size


def launch(words: Sequence[str], count: int) -> None:
    """Run ``sslmed WORDS`` in ``count`` processes of this machine, until all have ended.

    Signals that this process gets go on to all of them.

    Raises:
        ElsewhereError: one of them failed, and has said why.
        TemporaryError: one of them was killed.
        Interrupted: a signal, while none of them heeded it: before training, or after it.
    """
    with tempfile.TemporaryDirectory(prefix="sslmed-") as folder:
        common = {MEETING: str(Path(folder) / "meeting"), PARENT: str(os.getpid())}
        common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        base = os.environ | common
        base.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all are here; a host name that does not resolve is no matter
        base.setdefault("OMP_NUM_THREADS", str(max(1, len(usable_cores()) // count)))
        ranks: list[subprocess.Popen[bytes]] = []
        with _passing_on(ranks) as passed:
            try:
                for rank in range(count):
                    ranks.append(  # noqa: PERF401 - one by one: a signal may come in between
                        subprocess.Popen(
                            [*_python(), "-m", "sslmed", *words],
                            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                            stdout=subprocess.DEVNULL,  # the result is told here
                            start_new_session=True,  # or a Ctrl-C would reach them twice
                        )
                    )
                if passed:  # those that were started after it, or just then, do not know of it
                    raise _stopped(passed[0])
                watch(ranks)
            except TemporaryError:
                cut = [number for number in passed if any(each.returncode == -number for each in ranks)]
                if not cut:
                    raise
                raise _stopped(cut[0]) from None
            finally:
                kill(ranks)


def _python() -> list[str]:
    """As the parent looks for modules: by itself ``-m`` would find those of the working folder first."""
    here = str(Path.cwd())
    return [sys.executable] if {"", here} & set(sys.path) else [sys.executable, "-P"]


def requeue(say: Callable[[str], None]) -> None:
    """Ask SLURM to run this job again, where there is one; rank 0 asks."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    if job is None or distributed.rank():
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = job if task is None else f"{job}_{task}"
    if shutil.which("scontrol") is None:
        say("warning: there is no scontrol here; ask SLURM yourself to run the job again")
        return
    try:
        answer = subprocess.run(
            ["scontrol", "requeue", name], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False
        )
        refusal = answer.stderr.strip()[:200] if answer.returncode else ""
    except subprocess.TimeoutExpired:
        refusal = f"no answer for {ANSWER_SECONDS:g} s"
    say(f"warning: SLURM did not requeue job {name}: {refusal}" if refusal else f"SLURM runs job {name} again")


def _stopped(number: int) -> SslmedError:
    message = (
        f"stopped by {signal.Signals(number).name}, at once: no training step was under way. "
        "Go on with the same command, and --resume if the run is there."
    )
    return TemporaryError(message) if number == signal.SIGUSR1 else Interrupted(message, number)


@contextmanager
def _passing_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Yields the signals that have come."""
    passed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        for each in ranks:
            each.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
