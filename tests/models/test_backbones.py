"""Backbones come from a seed alone, say how wide they are, and refuse what timm cannot make."""

import pytest
import torch

from sslmed.config import UsageError
from sslmed.models.backbones import BackboneConfig, build


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_as_wide_as_it_says(name: str, channels: int) -> None:
    backbone = build(BackboneConfig(name=name, in_chans=channels), 64, seed=0).eval()
    features = backbone(torch.zeros(2, channels, 64, 64))
    assert features.shape == (2, backbone.num_features)


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    config = BackboneConfig(name="test_resnet")
    torch.manual_seed(1)
    first = build(config, 32, seed=5).network.state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build(config, 32, seed=5).network.state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global stream stays where it was"
    other = build(config, 32, seed=6).network.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_new_backbone_is_ready_to_train() -> None:
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0)
    assert all(module.training for module in backbone.modules())
    statistics = [
        value for name, value in backbone.network.state_dict().items() if name.endswith("num_batches_tracked")
    ]
    assert statistics
    assert not any(int(value) for value in statistics), "the trial pass leaves no trace"


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ({"name": "resnet19"}, 32, "did you mean resnet18"),
        ({"name": "resnet18.nope"}, 32, "nope"),
        ({"name": "test_vit"}, 50, "50 pixels"),
        ({"name": "densenet121", "drop_path": 0.1}, 32, "drop_path"),
    ],
)
def test_what_timm_cannot_make_is_refused_in_words(settings: dict[str, object], size: int, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        build(BackboneConfig.model_validate(settings), size, 0)
    assert len(str(caught.value).splitlines()) <= 6


def test_drop_path_drops_only_in_training() -> None:
    backbone = build(BackboneConfig(name="test_vit", drop_path=0.5), 64, 0)
    images = torch.randn(4, 1, 64, 64)
    assert not torch.equal(backbone(images), backbone(images))
    backbone.eval()
    assert torch.equal(backbone(images), backbone(images))
