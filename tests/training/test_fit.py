"""What every training shares, seen from the weights that it leaves."""

from pathlib import Path

import pytest
import torch

import sslmed
from sslmed.commands.finetune import finetune
from sslmed.commands.pretrain import pretrain
from sslmed.data.store import Store

SMALL = ("data.workers=0", "train.max_steps=3", "train.batch_size=8")


@pytest.mark.parametrize("train_backbone", [True, False])
def test_a_loaded_backbone_trains_in_training_mode_unless_frozen(
    train_backbone: bool, phantom_store: Store, tmp_path: Path
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    settings = (*SMALL, "backbone.name=test_resnet", "data.size=32")
    pretrain("xray/simclr_resnet18", phantom_store.path, start, overrides=settings)
    frozen = f"head.train_backbone={str(train_backbone).lower()}"
    finetune("xray/classification", phantom_store.path, out, start=start, overrides=(*SMALL, frozen))
    before, after = (sslmed.load_backbone(run).state_dict() for run in (start, out))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if train_backbone:
        assert moved == set(before), "weights, and BatchNorm's running statistics, which only move in training mode"
    else:
        assert not moved
