"""Backbones come from a seed alone, say how wide and deep they are, give maps, freeze, and refuse what timm cannot."""

from typing import Any, Literal

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from torch import nn

from sslmed.config import MissingInputError, UsageError
from sslmed.image_size import ImageSize
from sslmed.models.backbones import Backbone, BackboneConfig, Level, build, published


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


PLAIN: dict[str, dict[str, Any]] = {
    "class token": {"name": "test_vit"},
    "small patches": {"name": "test_vit", "patch": 8},
    "mean": {"name": "test_vit", "pool": "avg"},
    "two class tokens": {"name": "deit_tiny_distilled_patch16_224"},
    "registers, rotary positions": {"name": "vit_tiny_patch16_dinov3_qkvb"},
}
STAGED = {
    "test_resnet": [2, 4, 8, 16, 32],
    "resnet18": [2, 4, 8, 16, 32],
    "tf_efficientnet_lite0": [2, 4, 8, 16, 32],
    "convnext_atto": [4, 8, 16, 32],
    "swin_tiny_patch4_window7_224": [4, 8, 16, 32],
}


@pytest.mark.parametrize("name", STAGED)
def test_maps_of_a_network_with_stages(name: str) -> None:
    backbone = build(BackboneConfig(name=name), (64, 96), 0)
    assert [level.stride for level in backbone.levels] == STAGED[name]
    images = torch.randn(2, 1, 64, 96)
    maps = backbone.maps(images)
    shapes = [(2, channels, 64 // stride, 96 // stride) for channels, stride in backbone.levels]  # type: ignore[operator]
    assert [tuple(each.shape) for each in maps] == shapes
    sum((each * torch.randn_like(each)).sum() for each in maps).backward()  # type: ignore[union-attr]
    without = {name for name, each in backbone.network.named_parameters() if each.grad is None}
    assert {each.split(".")[0] for each in without} <= {"norm", "head", "conv_head", "bn2"}, "what follows the stages"


def test_maps_are_those_before_pooling() -> None:
    backbone = build(BackboneConfig(name="test_resnet"), 64, 0).eval()
    images = torch.randn(2, 1, 64, 64)
    assert torch.allclose(backbone.maps(images)[-1].mean(dim=(2, 3)), backbone(images), atol=1e-6)


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_the_map_of_a_plain_transformer(settings: dict[str, Any]) -> None:
    """It is the patches as timm normalises them; of what averages them, the norm after the mean is taken before it."""
    backbone = build(BackboneConfig.model_validate(settings), (64, 96), 0).eval()
    network: Any = backbone.network
    with torch.no_grad():  # a norm that can be seen
        for each in (network.norm, network.fc_norm):
            for parameter in each.parameters():
                parameter.uniform_(0.5, 2)
    images = torch.randn(2, 1, 64, 96)
    ((channels, stride),) = backbone.levels
    (found,) = backbone.maps(images)
    assert found.shape == (2, channels, 64 // stride, 96 // stride)
    tokens = network.fc_norm(network.forward_features(images))[:, network.num_prefix_tokens :]
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-5)
    (found * torch.randn_like(found)).sum().backward()
    assert all(each.grad is not None for each in network.parameters())


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "convnext_atto"])
def test_early_maps_are_the_first_two_stages(name: str) -> None:
    backbone = build(BackboneConfig(name=name), 64, 0).eval()
    images = torch.randn(2, 1, 64, 64)
    first, second = backbone.early_maps(images)
    assert torch.equal(first, backbone.maps(images)[0])
    assert torch.equal(second, backbone.maps(images)[1])


def test_early_maps_of_a_plain_transformer_are_its_first_and_third_block() -> None:
    backbone = build(BackboneConfig(name="test_vit"), 64, 0).eval()
    network: Any = backbone.network
    images = torch.randn(2, 1, 64, 64)
    seen: list[torch.Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, tokens: seen.append(tokens))
    first, third = backbone.early_maps(images)
    assert len(seen) == 3, "nothing behind is computed"
    for found, tokens in ((first, seen[0]), (third, seen[2])):
        assert torch.equal(found.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_maps_of_another_size_than_the_network_was_made_for() -> None:
    network = timm.create_model(
        "test_vit", in_chans=1, num_classes=0, img_size=64, dynamic_img_size=True, dynamic_img_pad=True
    )
    (found,) = Backbone(network).maps(torch.randn(1, 1, 100, 76))
    assert found.shape == (1, 64, 7, 5)
    assert Backbone(network).levels == (Level(64, 16),)


class _Pooling(nn.Module):
    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_a_network_without_maps_or_order_is_refused() -> None:
    backbone = Backbone(_Pooling())
    with pytest.raises(UsageError, match=r"no maps of _Pooling.*forward_intermediates.*resnet18"):
        backbone.maps(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="no maps of _Pooling"):
        _ = backbone.levels
    with pytest.raises(UsageError, match="no maps of _Pooling"):
        backbone.early_maps(torch.zeros(1, 1, 8, 8))
    with pytest.raises(UsageError, match="order the layers of _Pooling"):
        backbone.freeze(1)
    backbone.freeze("all")  # needs no order
    assert not any(each.requires_grad for each in backbone.parameters())


ORDERED = [*STAGED, "test_vit", "vit_tiny_patch16_dinov3_qkvb", "densenet121", "regnetx_002", "mvitv2_tiny"]


@pytest.mark.parametrize("name", ORDERED)
def test_layers_are_timms_but_for_what_follows_the_last_block(name: str) -> None:
    network = timm.create_model(name, num_classes=0)
    numbers, depth = Backbone(network).layers()
    assert numbers.keys() == dict(network.named_parameters()).keys()
    expected = group_parameters(network, network.group_matcher(coarse=False), reverse=True)
    assert {key: value for key, value in numbers.items() if value < depth} == {
        key: expected[key] for key, value in numbers.items() if value < depth
    }
    assert set(range(depth)) <= set(numbers.values()), "no number is left out"
    after = {key for key, value in numbers.items() if value == depth}
    assert all(expected[key] >= depth - 1 for key in after)


def test_layers_of_a_transformer_are_those_of_its_papers() -> None:
    """As in BEiT's and MAE's code for fine-tuning: 0, one a block, and one more for the final norm."""
    numbers, depth = build(BackboneConfig(name="test_vit"), 64, 0).layers()
    assert depth == 7
    stem = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name, number in numbers.items() if number == 0} == stem
    assert {name for name, number in numbers.items() if number == 7} == {"norm.weight", "norm.bias"}
    blocks = {name: number for name, number in numbers.items() if 0 < number < 7}
    assert all(number == int(name.split(".")[1]) + 1 for name, number in blocks.items())


@pytest.mark.parametrize(("name", "count"), [("test_resnet", 2), ("resnet18", 3), ("test_vit", 3), ("resnet18", "all")])
def test_what_is_frozen_stays_as_it_is(name: str, count: int | Literal["all"]) -> None:
    backbone = build(BackboneConfig(name=name, drop_path=0.2), 64, 0)
    numbers, _ = backbone.layers()
    backbone.freeze(count)
    backbone.eval().train()
    frozen = {each for each, number in numbers.items() if count == "all" or number < count}
    before = {key: value.clone() for key, value in backbone.network.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in backbone.parameters() if each.requires_grad] or [torch.zeros(1)], 0.1)
    features = backbone(torch.randn(4, 1, 64, 64))
    if count != "all":
        features.square().mean().backward()
    optimizer.step()
    after = backbone.network.state_dict()
    kept = {key.rpartition(".")[0] for key in frozen}
    assert kept
    for key, value in before.items():
        if key in frozen or (key.rpartition(".")[0] in kept and "running" in key):
            assert torch.equal(value, after[key]), key
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert bool(moved) == (count != "all")
    for key, module in backbone.network.named_modules():
        own = [f"{key}.{each}".removeprefix(".") for each, _ in module.named_parameters()]
        if own:
            assert module.training == (not frozen.issuperset(own)), key


def test_dropout_of_a_frozen_block_is_off() -> None:
    backbone = build(BackboneConfig(name="test_vit", drop_path=0.9), 64, 0)
    backbone.freeze(backbone.layers()[1])
    images = torch.randn(4, 1, 64, 64)
    assert torch.equal(backbone.train()(images), backbone(images))


@pytest.mark.parametrize("count", [-1, 8])
def test_more_layers_than_there_are_cannot_be_frozen(count: int) -> None:
    with pytest.raises(UsageError, match=rf"{count} layers.*has 7; give 0 to 7, or all"):
        build(BackboneConfig(name="test_vit"), 64, 0).freeze(count)


@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto", "test_vit", "tf_efficientnet_lite0"])
def test_what_lies_behind_a_map(name: str) -> None:
    backbone = build(BackboneConfig(name=name), 64, 0)
    for level, found in enumerate(backbone.maps(torch.randn(2, 1, 64, 64))):
        named = dict(backbone.network.named_parameters())
        gradients = torch.autograd.grad(found.square().sum(), [*named.values()], allow_unused=True, retain_graph=True)
        without = {key for key, each in zip(named, gradients, strict=True) if each is None}
        if (name, level) == ("test_resnet", 0):  # it ends at an activation, which has no parameters
            assert backbone.behind(level) == named.keys()
        else:
            assert backbone.behind(level) == without
