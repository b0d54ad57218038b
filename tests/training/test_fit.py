"""What every training shares, seen from the weights that it leaves."""

from pathlib import Path

import pytest
import torch

import sslmed
from sslmed.commands.finetune import finetune
from sslmed.commands.pretrain import pretrain
from sslmed.data.store import Store
from sslmed.methods.simclr import SimCLR

SMALL = ("data.workers=0", "train.max_steps=3", "train.batch_size=8")


@pytest.mark.parametrize("frozen", ["0", "all"])
def test_a_loaded_backbone_trains_in_training_mode_unless_frozen(
    frozen: str, phantom_store: Store, tmp_path: Path
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    settings = (*SMALL, "backbone.name=test_resnet", "data.size=32")
    pretrain("xray/simclr_resnet18", phantom_store.path, start, overrides=settings)
    overrides = (*SMALL, f"head.frozen={frozen}")
    finetune("xray/classification", phantom_store.path, out, start=start, overrides=overrides)
    before, after = (sslmed.load_backbone(run).state_dict() for run in (start, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if frozen == "0":
        assert moved == set(before), "weights, and BatchNorm's running statistics, which only move in training mode"
    else:
        assert not moved


def test_after_step_comes_once_a_performed_step_and_counts_from_one(
    phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(
        SimCLR, "after_step", lambda _, progress: told.append((progress.step, progress.total, progress.epoch))
    )
    batch = len(phantom_store.rows("train", "unlabelled")) // 2  # two steps an epoch
    settings = ("backbone.name=test_resnet", "data.size=32", "data.workers=0", "train.max_steps=4")
    overrides = (*settings, f"train.batch_size={batch - batch % 2}", "train.accumulate=2")
    pretrain("xray/simclr_resnet18", phantom_store.path, tmp_path / "run", overrides=overrides)
    assert told == [(1, 4, 0), (2, 4, 1), (3, 4, 1), (4, 4, 2)]
