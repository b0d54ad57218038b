"""A fine-tuning that is killed and resumed ends with the model of one that was not, to the last bit."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ranks
import stores
import torch

from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.run import read, read_metrics
from sslmed.training.checkpoint_files import load

SETTINGS = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.max_steps=14",
    "train.batch_size=8",
    "train.save_every_steps=3",
    "train.precision=32",
    "stop.check_every=2",
    "stop.patience=0",
    "head.probe_steps=2",
    "head.layer_decay=0.8",
    "head.ema=0.9",
)
# everything that draws, counts or averages
LABELS = ("head.hidden=16", "head.dropout=0.2", "head.mixup=0.4", "head.balance=sampling", "train.accumulate=2")
BOXES = ("head.reducer=true", "head.width=16", "head.frozen=1")
MASKS = ("head.input=tiles", "head.balance=weights", "head.frozen=1")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.write_shapes(tmp_path_factory.mktemp("shapes") / "store")


def start(store: Store, out: Path, settings: tuple[str, ...], resume: bool, recipe: str) -> BaseProcess:
    process: BaseProcess = ranks.context().Process(
        target=ranks.finetune_in_process, args=(str(store.path), str(out), settings, resume, recipe)
    )
    process.start()
    return process


def kill_after_check(run: Path, step: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run)):
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(30)
            assert process.exitcode == -signal.SIGKILL
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended or hung before step {step}, exit code {process.exitcode}")


@pytest.mark.parametrize("task", ["classification", "segmentation", "localization"])
def test_two_kills_leave_no_trace(task: str, phantom_store: Store, shapes: Store, tmp_path: Path) -> None:
    more = {"classification": LABELS, "segmentation": MASKS, "localization": BOXES}[task]
    store = phantom_store if task == "classification" else shapes
    settings, recipe = (*SETTINGS, *more), f"xray/{task}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(store, whole, settings, False, recipe)
    process.join(240)
    assert process.exitcode == 0
    for number, step in enumerate((4, 8)):
        process = start(store, killed, settings, number > 0, recipe)
        kill_after_check(killed, step, process)
        assert read(killed)["status"] == "running"
    process = start(store, killed, settings, True, recipe)
    process.join(240)
    assert process.exitcode == 0
    states = [load(run / "checkpoints" / "last.ckpt") for run in (whole, killed)]
    assert all(
        torch.equal(states[0]["state_dict"][key], states[1]["state_dict"][key]) for key in states[0]["state_dict"]
    )
    for name in ("model", "head", "familiarity", "fingerprint", "selftest"):
        first, second = (run / "artifact" / f"{name}.safetensors" for run in (whole, killed))
        assert sha256(first) == sha256(second), name
    results = [read(run)["result"] for run in (whole, killed)]
    assert results[0]["test"] == results[1]["test"]
    checks = [
        [line for line in read_metrics(run) if "step" in line and set(line) & {"val_auroc", "val_dice"}]
        for run in (whole, killed)
    ]
    assert checks[0] == checks[1], "no check twice, none lost, each with the same score"
