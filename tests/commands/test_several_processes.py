"""A pretraining on two processes: how it is stopped, loses one of them, goes on, and ends to the last bit the same."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import h5py
import pytest
import ranks
import torch

from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.run import read, read_metrics
from sslmed.training.checkpoint_files import load

pytestmark = pytest.mark.ddp

RECIPE = "xray/simclr_resnet18"
SETTINGS = (
    "backbone.name=test_resnet",
    "backbone.drop_path=0.1",  # draws from the random state of each process
    "data.size=32",
    "data.workers=0",
    "train.max_steps=40",
    "train.batch_size=16",
    "train.accumulate=2",
    "train.save_every_steps=4",
    "train.precision=32",
    "monitor.log_every=1",
    "monitor.knn_every=0",
)
QUICK = ("train.max_steps=6", "train.accumulate=1", "train.save_every_steps=1", "train.keep_checkpoints=9")
WEIGHTS = Path("artifact") / "model.safetensors"
PATIENCE = 240.0


@dataclass
class Launched:
    """A command line at work, and the run that it makes."""

    process: subprocess.Popen[str]
    run: Path

    @property
    def ranks(self) -> list[int]:
        """Process ids, rank by rank: they are started in this order."""
        return children(self.process.pid)

    def wait_for(self, step: int) -> None:
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and any(line["step"] >= step for line in read_metrics(self.run)):
                return
            time.sleep(0.005)
        raise AssertionError(f"it ended or hung before step {step}: {self.process.poll()} {self.end()[1]}")

    def end(self, within: float = PATIENCE) -> tuple[int, str]:
        """Exit code and what was said, once all have ended; no process is left."""
        begin, pids = time.monotonic(), self.ranks
        try:
            said = self.process.communicate(timeout=within)[1]
            while any(map(alive, pids)) and time.monotonic() < begin + within:
                time.sleep(0.02)
            assert not any(map(alive, pids)), f"left after {within} s: {said}"
        finally:
            for pid in (self.process.pid, *pids):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)
        return self.process.returncode, said

    @property
    def saved(self) -> int:
        return int(load(self.run / "checkpoints" / "last.ckpt")["sslmed"]["step"])

    @property
    def logged(self) -> list[int]:
        return [line["step"] for line in read_metrics(self.run)]


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def launch(store: Path, run: Path, *words: str, by: tuple[str, ...] = ("-m", "sslmed")) -> Launched:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | one_thread | {"GLOO_SOCKET_IFNAME": "lo"}
    line = [sys.executable, *by, "pretrain", RECIPE, "--data", str(store), "--out", str(run), *SETTINGS, *words]
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    return Launched(process, run)


@pytest.fixture(scope="module")
def uninterrupted(phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    both = ranks.on_two_ranks(ranks.pretrain_on_ranks, str(phantom_store.path), str(out), SETTINGS)
    assert [ended for ended, _ in both] == [[], []]
    assert both[0][1].keys() == both[1][1].keys()
    weights = [name for name in both[0][1] if not name.rpartition(".")[2].startswith(("running", "num"))]
    assert all(torch.equal(both[0][1][name], both[1][1][name]) for name in weights)
    return out


@pytest.mark.timeout(900)
def test_stopped_lost_and_killed_it_ends_the_same(phantom_store: Store, uninterrupted: Path, tmp_path: Path) -> None:
    run, two = tmp_path / "run", "train.devices=2"

    first = launch(phantom_store.path, run, two)
    first.wait_for(5)
    assert len(first.ranks) == 2
    os.kill(first.ranks[1], signal.SIGTERM)  # what one has got, all act on
    code, said = first.end(within=30)
    assert code == 143, said
    assert (read(run)["status"], read(run)["exit_code"], read(run)["processes"]) == ("interrupted", 143, 2)
    assert first.saved == max(first.logged), "the step was finished, logged and saved"
    assert said.count("error: ") == 1
    assert f"error: stopped by SIGTERM after step {first.saved}; the checkpoint is saved" in said
    assert "Traceback" not in said

    second = launch(phantom_store.path, run, two, "--resume")
    second.wait_for(first.saved + 5)
    for pid in (second.process.pid, *second.ranks):
        os.kill(pid, signal.SIGKILL)
    assert second.end()[0] == -signal.SIGKILL
    assert read(run)["status"] == "running", "nobody could write down how it ended"

    third = launch(phantom_store.path, run, two, "--resume")
    third.wait_for(second.saved + 5)
    os.kill(third.ranks[1], signal.SIGKILL)
    code, said = third.end(within=30)
    assert code == 75, said
    assert "error: rank 1 was ended by SIGKILL (9), and the others with it." in said
    assert "lost another process of this training" in said, "as the other one saw it"
    assert "Traceback" not in said

    fourth = launch(phantom_store.path, run, two, "--resume")
    fourth.wait_for(third.saved + 5)
    fourth.process.send_signal(signal.SIGTERM)
    code, said = fourth.end(within=30)
    assert code == 143, said
    assert fourth.saved == max(fourth.logged)
    assert said.count("error: ") == 1

    code, said = launch(phantom_store.path, run, two, "--resume", "--json").end()
    assert code == 0, said
    assert read(run)["status"] == "done"
    assert sha256(run / WEIGHTS) == sha256(uninterrupted / WEIGHTS)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 41)), "no step logged twice, none lost"
    losses = [[line["loss"] for line in read_metrics(each)] for each in (run, uninterrupted)]
    assert losses[0] == losses[1]


def damage(store: Store, row: int) -> None:
    shard = store.path / store.about["shards"][int(store.index.shard[row])]["file"]
    with h5py.File(shard) as file:
        chunk = file[store.about["groups"][int(store.index.group[row])]].id.get_chunk_info(int(store.index.row[row]))
    content = bytearray(shard.read_bytes())
    content[chunk.byte_offset + chunk.size // 2] ^= 255
    shard.write_bytes(content)


def test_a_damaged_image_that_one_process_meets_ends_all_and_is_told_once(phantom_store: Store, tmp_path: Path) -> None:
    """Those of rank 1 come in the second half of a batch."""
    shutil.copytree(phantom_store.path, tmp_path / "store")
    store = Store(tmp_path / "store")
    stream = StreamSampler(store.rows("train", "unlabelled"), 16, 6, 0, rank=1, world_size=2)
    row = list(stream)[2][5][1]
    damage(store, row)
    run = tmp_path / "run"
    code, said = launch(store.path, run, "train.devices=2", *QUICK).end()
    assert code == 65, said
    assert [line["step"] for line in read_metrics(run)] == [1, 2]
    assert f"[rank 1] error: {store.path / 'shard-00000.h5'}: sample {row} " in said
    assert said.count("error: ") == 2, "the other one says that it has lost this one, and to look there"
    assert "Traceback" not in said


def test_numbers_of_one_process_that_are_not_finite_are_skipped_by_all(phantom_store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    both = ranks.on_two_ranks(ranks.pretrain_on_ranks, str(phantom_store.path), str(run), (*SETTINGS, *QUICK), 3)
    assert [ended for ended, _ in both] == [[], []]
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 4, 5, 6]
    weights = [name for name in both[0][1] if not name.rpartition(".")[2].startswith(("running", "num"))]
    assert all(torch.equal(both[0][1][name], both[1][1][name]) for name in weights)
    notes = [torch.load(run / "debug" / f"step-00000003-rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [bool(torch.isfinite(torch.tensor(note["loss"]))) for note in notes] == [True, False]
    assert notes[0]["gradients_not_finite"] == notes[1]["gradients_not_finite"] != []
    assert not set(notes[0]["ids"][0].tolist()) & set(notes[1]["ids"][0].tolist())
    for log in ("train.log", "train-rank-1.log"):
        assert "step 3 is not finite" in (run / log).read_text()


@pytest.mark.parametrize(
    ("settings", "words"),
    [(("train.batch_size=15",), "15; allowed for 2 processes"), (("train.batch_size=2",), "from 4")],
)
def test_a_batch_that_cannot_be_shared_is_refused_and_told_once(
    settings: tuple[str, ...], words: str, phantom_store: Store, tmp_path: Path
) -> None:
    overrides = (*SETTINGS, "train.accumulate=1", *settings)
    zero, one = ranks.on_two_ranks(ranks.pretrain_on_ranks, str(phantom_store.path), str(tmp_path / "run"), overrides)
    assert zero[0][:2] == ["UsageError", 2]
    assert words in zero[0][2]
    assert one[0][:2] == ["ElsewhereError", 2]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_a_lost_job_again(phantom_store: Store, uninterrupted: Path, tmp_path: Path) -> None:
    """Nobody gives --resume: the processes know that they are started for the second time."""
    run = tmp_path / "run"
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "sslmed")
    job = launch(phantom_store.path, run, by=by)
    job.wait_for(9)
    second = next(pid for pid in job.ranks if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    os.kill(second, signal.SIGKILL)
    code, said = job.end()
    assert code == 0, said
    assert sha256(run / WEIGHTS) == sha256(uninterrupted / WEIGHTS)
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 41))
