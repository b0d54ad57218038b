"""What every entry of HEADS must do."""

import pytest
import torch

from sslmed.evaluation.metrics import METRICS
from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig

every_head = pytest.mark.parametrize("name", HEADS)


def small(name: str, classes: int = 3, **settings: object) -> Head:
    torch.manual_seed(0)
    kind = HEADS[name]
    return kind(kind.Config(name=name, **settings), build(BackboneConfig(name="test_resnet"), 32, 0), classes)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(9, 1, 32, 32, generator=torch.Generator().manual_seed(0))


TARGET = torch.arange(9) % 3


@every_head
def test_predictions_are_probabilities(name: str, images: torch.Tensor) -> None:
    scores = small(name).eval()(images)
    assert scores.shape == (9, 3)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(9))
    assert (scores >= 0).all()


@every_head
def test_it_overfits_nine_images(name: str, images: torch.Tensor) -> None:
    head = small(name)
    optimizer = torch.optim.AdamW(head.parameter_groups(0.0), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = head.loss(head.backbone(images), TARGET)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(value.grad is not None and value.grad.any() for value in head.parameters())


@every_head
def test_a_frozen_backbone_does_not_move(name: str, images: torch.Tensor) -> None:
    head = small(name, train_backbone=False).train()
    before = {key: value.clone() for key, value in head.backbone.state_dict().items()}
    head.prepare(OptimConfig(lr=0.1, warmup=0), 9, 10, 1)
    optimizer = head.configure_optimizers()["optimizer"]
    head.loss(head._features(images), TARGET).backward()
    optimizer.step()
    after = head.backbone.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "weights and BatchNorm statistics"
    assert any(value.grad is not None and value.grad.any() for value in head.head.parameters())


@every_head
def test_half_precision_loss_is_fp32(name: str, images: torch.Tensor) -> None:
    head = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.loss(head.backbone(images), TARGET).dtype == torch.float32
        assert head(images).dtype == torch.float32


@every_head
def test_its_metrics_exist(name: str) -> None:
    assert set(small(name).metrics()) <= set(METRICS)
