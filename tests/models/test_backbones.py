"""Backbones come from a seed alone, say how wide they are, and refuse what timm cannot make."""

from typing import Any

import pytest
import timm
import torch

from sslmed.config import MissingInputError, UsageError
from sslmed.image_size import ImageSize
from sslmed.models.backbones import BackboneConfig, build, published


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


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"name": "test_resnet"}, 32), ({"name": "test_vit"}, 64), ({"name": "test_vit", "patch": 8}, (32, 48))],
)
def test_timms_own_weights_are_fitted_to_the_input_and_whole(
    settings: dict[str, Any], size: ImageSize, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What timm would fetch is put before it; everything behind that is timm's."""
    original = timm.create_model(settings["name"]).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(original))
    state = torch.get_rng_state()
    source, found = published(BackboneConfig(in_chans=1, **settings), size)
    assert torch.equal(torch.get_rng_state(), state), "the global stream stays where it was"
    assert source == "timm's " + settings["name"] + ".r160_in1k"
    wanted = build(BackboneConfig(in_chans=3, **settings), size, 0).network.state_dict()
    assert {name: tensor.shape for name, tensor in wanted.items()}.items() <= {
        name: tensor.shape for name, tensor in found.items()
    }.items()
    same = [name for name in wanted if name not in ("pos_embed", "patch_embed.proj.weight")]
    assert all(torch.equal(found[name], original[name]) for name in same)


def test_weights_of_timm_that_lack_a_tensor_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = timm.create_model("test_resnet").state_dict()
    del original["layer1.0.conv1.weight"]
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: original)
    with pytest.raises(MissingInputError, match="cannot be had"):
        published(BackboneConfig(name="test_resnet"), 32)


@pytest.mark.parametrize("name", ["test_resnet", "resnet18.a1_in1k", "darknet17"])
def test_weights_that_cannot_be_had(name: str) -> None:
    """Tests have no network; and timm has no weights for darknet17."""
    with pytest.raises(MissingInputError, match=r"cannot be had.*\n.*backbone\.init=FILE") as caught:
        published(BackboneConfig(name=name), 64)
    assert caught.value.exit_code == 66
    assert len(str(caught.value).splitlines()) <= 6
