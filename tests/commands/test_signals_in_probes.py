"""A signal during a probe or a check on val cuts it short; the run ends, and a resume makes up for it first."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sslmed.commands.finetune import finetune
from sslmed.commands.pretrain import pretrain
from sslmed.config import Interrupted
from sslmed.data.store import Store
from sslmed.evaluation import probes
from sslmed.run import read, read_metrics
from sslmed.supervised.scoring import LabelScorer
from sslmed.training.checkpoint_files import STATE, load

SMALL = ("backbone.name=test_resnet", "backbone.drop_path=0.1", "data.size=32", "data.workers=0", "train.precision=32")
PRETRAIN = (*SMALL, "train.max_steps=12", "train.batch_size=16", "monitor.knn_every=1", "method.hidden=32")
FINETUNE = (*SMALL, "train.max_steps=6", "train.batch_size=16", "stop.check_every=2", "labels.budget=100%")


def interrupting(work: Any, at: int) -> Any:
    """``work``, but its call number ``at``, from 1, is interrupted by a SIGTERM and never comes to its end."""
    calls = iter(range(1, 1000))

    def interrupted(*args: Any, **named: Any) -> Any:
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal did not cut the probe short")
        return work(*args, **named)

    return interrupted


def looks(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(run) if name in line]


@pytest.mark.parametrize("at", [1, 3], ids=["in the middle", "after the last step"])
def test_a_probe_is_cut_short_and_made_up_for(
    at: int, phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain("xray/simclr_resnet18", phantom_store.path, whole, overrides=PRETRAIN)
    probed = [step for step, _ in looks(whole, "knn_val_auroc")]
    assert len(probed) == 3
    with monkeypatch.context() as patch:
        patch.setattr(probes, "embed", interrupting(probes.embed, 2 * at - 1))  # of train, then of val
        with pytest.raises(Interrupted) as caught:
            pretrain("xray/simclr_resnet18", phantom_store.path, stopped, overrides=PRETRAIN)
    assert caught.value.exit_code == 143
    assert read(stopped)["status"] == "interrupted"
    assert load(stopped / "checkpoints" / "last.ckpt")[STATE]["step"] == probed[at - 1], "the step of the probe"
    pretrain("xray/simclr_resnet18", phantom_store.path, stopped, overrides=PRETRAIN, resume=True)
    assert looks(whole, "knn_val_auroc") == looks(stopped, "knn_val_auroc")
    first, second = (load(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_probe_leaves_no_trace(phantom_store: Store, tmp_path: Path) -> None:
    """Its loader must not draw from the state that stochastic depth uses."""
    weights = []
    for every in (0, 1):
        overrides = (*PRETRAIN, f"monitor.knn_every={every}")
        run = pretrain("xray/simclr_resnet18", phantom_store.path, tmp_path / f"{every}", overrides=overrides)
        weights.append((Path(run.artifact) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("at", [2, 3], ids=["in the middle", "after the last step"])
def test_a_check_on_val_is_cut_short_and_made_up_for(
    at: int, phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = finetune("xray/classification", phantom_store.path, whole, start="random", overrides=FINETUNE)
    with monkeypatch.context() as patch:
        patch.setattr(LabelScorer, "val", interrupting(LabelScorer.val, at))
        with pytest.raises(Interrupted) as caught:
            finetune("xray/classification", phantom_store.path, stopped, start="random", overrides=FINETUNE)
    assert caught.value.exit_code == 143
    assert load(stopped / "checkpoints" / "last.ckpt")[STATE]["step"] == 2 * at
    result = finetune(
        "xray/classification", phantom_store.path, stopped, start="random", overrides=FINETUNE, resume=True
    )
    assert result.test == expected.test
    assert result.best_step == expected.best_step
    assert looks(whole, "val_auroc") == looks(stopped, "val_auroc")
    first, second = ((run / "artifact" / "model.safetensors").read_bytes() for run in (whole, stopped))
    assert first == second
