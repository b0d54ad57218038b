"""A pretraining that is killed and resumed ends with the weights of one that was not, to the last bit."""

import json
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import ranks
import torch

from sslmed.commands.pretrain import pretrain
from sslmed.config import UsageError
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.methods import METHODS
from sslmed.run import read, read_metrics
from sslmed.training.checkpoint_files import load

SETTINGS = (
    "backbone.name=test_resnet",
    "backbone.drop_path=0.1",  # draws from torch's own random state, which a checkpoint must carry
    "data.size=32",
    "data.workers=0",
    "train.max_steps=40",
    "train.batch_size=16",
    "train.save_every_steps=3",
    "monitor.knn_every=0",
    "monitor.log_every=1",
)
ONE_TURN = {"rotation": {"all_four": False}}  # the variant that draws


def start(
    store: Path, out: Path, settings: tuple[str, ...], resume: bool, recipe: Path | str = "xray/simclr_resnet18"
) -> BaseProcess:
    process: BaseProcess = ranks.context().Process(
        target=ranks.pretrain_in_process, args=(str(store), str(out), settings, resume, str(recipe))
    )
    process.start()
    return process


def wait_for_step(run: Path, step: int, process: BaseProcess) -> None:
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run)):
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended or hung before step {step}, exit code {process.exitcode}")


@pytest.fixture(scope="module")
def uninterrupted(phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(phantom_store.path, out, SETTINGS, resume=False)
    process.join(240)
    assert process.exitcode == 0
    return out


def test_five_kills_in_one_run_leave_no_trace(phantom_store: Store, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = sorted(random.Random(0).sample(range(1, 39), 5))
    for number, step in enumerate(steps):
        process = start(phantom_store.path, out, SETTINGS, resume=number > 0)
        wait_for_step(out, step, process)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        assert read(out)["status"] == "running"
    process = start(phantom_store.path, out, SETTINGS, resume=True)
    process.join(240)
    assert process.exitcode == 0
    for name in ("model.safetensors", "selftest.safetensors", "fingerprint.safetensors"):
        assert sha256(out / "artifact" / name) == sha256(uninterrupted / "artifact" / name), f"{name} after {steps}"
    steps_logged = [line["step"] for line in read_metrics(out)]
    assert steps_logged == list(range(1, 41)), "no step logged twice, none lost"


def test_accumulated_batches_resume_too(phantom_store: Store, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.accumulate=2", "train.max_steps=12")
    digests = []
    for name, kills in (("whole", ()), ("killed", (4,))):
        out = tmp_path / name
        for step in kills:
            process = start(phantom_store.path, out, settings, resume=False)
            wait_for_step(out, step, process)
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(30)
        process = start(phantom_store.path, out, settings, resume=bool(kills))
        process.join(120)
        assert process.exitcode == 0
        digests.append(sha256(out / "artifact" / "model.safetensors"))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resumes_to_the_last_bit(name: str, phantom_store: Store, tmp_path: Path) -> None:
    """Its weights, and what leaves in no artifact: momentum networks, heads, decoders."""
    kind = METHODS[name]
    sections = {
        "backbone": kind.example.model_dump(mode="json"),
        "method": {"name": name, **kind.example_settings, **ONE_TURN.get(name, {})},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(sections))
    # fp32: where bf16 is multiplied on a CPU, torch 2.13 leaves numbers that nobody wrote in weight gradients of
    # convolutions over maps of one or two pixels a side, which smaller views and patches of 32 pixels lead to
    exact = ("train.precision=32", *SETTINGS[-3:])
    settings = ("data.size=32", "data.workers=0", "train.max_steps=9", "train.batch_size=16", *exact)
    for out, kill in ((tmp_path / "whole", False), (tmp_path / "killed", True)):
        process = start(phantom_store.path, out, settings, resume=False, recipe=recipe)
        if kill:
            wait_for_step(out, 4, process)
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join(30)
            process = start(phantom_store.path, out, settings, resume=True, recipe=recipe)
        process.join(120)
        assert process.exitcode == 0
    whole, killed = (load(tmp_path / each / "checkpoints" / "last.ckpt")["state_dict"] for each in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    first, second = (tmp_path / each / "artifact" / "model.safetensors" for each in ("whole", "killed"))
    assert sha256(first) == sha256(second)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_so(
    number: signal.Signals, code: int, phantom_store: Store, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(phantom_store.path, out, SETTINGS, resume=False)
    wait_for_step(out, 4, process)
    os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == code
    state = read(out)
    assert (state["status"], state["exit_code"]) == ("interrupted", code)
    saved = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["sslmed"]["step"]
    assert saved == max(line["step"] for line in read_metrics(out)), "the step was finished, logged and saved"
    process = start(phantom_store.path, out, SETTINGS, resume=True)
    process.join(120)
    assert process.exitcode == 0
    assert sha256(out / "artifact" / "model.safetensors") == sha256(uninterrupted / "artifact" / "model.safetensors")


def test_a_finished_run_may_be_resumed_and_stays_as_it_is(phantom_store: Store, uninterrupted: Path) -> None:
    before = sha256(uninterrupted / "artifact" / "model.safetensors")
    result = pretrain("xray/simclr_resnet18", phantom_store.path, uninterrupted, overrides=SETTINGS, resume=True)
    assert result.steps == 40
    assert sha256(uninterrupted / "artifact" / "model.safetensors") == before


def test_a_resume_that_changes_the_recipe_is_refused_with_a_diff(phantom_store: Store, uninterrupted: Path) -> None:
    with pytest.raises(UsageError, match=r"optim.lr: 0.001 -> 0.01") as caught:
        pretrain(
            "xray/simclr_resnet18",
            phantom_store.path,
            uninterrupted,
            overrides=(*SETTINGS, "optim.lr=0.01"),
            resume=True,
        )
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_twenty_kills_with_workers_leave_no_trace(phantom_store: Store, uninterrupted: Path, tmp_path: Path) -> None:
    settings = tuple(
        {"data.workers=0": "data.workers=2", "train.save_every_steps=3": "train.save_every_steps=1"}.get(each, each)
        for each in SETTINGS
    )
    out = tmp_path / "run"
    for number, step in enumerate(sorted(random.Random(1).sample(range(1, 39), 20))):
        process = start(phantom_store.path, out, settings, resume=number > 0)
        wait_for_step(out, step, process)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(30)
    process = start(phantom_store.path, out, settings, resume=True)
    process.join(240)
    assert process.exitcode == 0
    name = Path("artifact") / "model.safetensors"
    assert sha256(out / name) == sha256(uninterrupted / name)
    assert not list((out / "checkpoints").glob(".*")), "nothing half-written is left"
