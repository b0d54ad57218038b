"""Foreign weights: read as data, matched by name or by order, fitted to the input, refused where they do not fit."""

import argparse
import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from sslmed.config import DataError, MissingInputError
from sslmed.image_size import sides
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.weights import State, channels, digest, fill, read

SIZE = 64
PREFIX = 1  # class tokens of test_vit


def network(name: str = "test_resnet", in_chans: int = 3, seed: int = 1, size: Any = SIZE, **knobs: Any) -> nn.Module:
    """A network whose BatchNorm has seen something."""
    module = build(BackboneConfig(name=name, in_chans=in_chans, **knobs), size, seed).network
    with torch.no_grad():
        module.train()(noise(size, in_chans))
    return module.eval()


def noise(size: Any = SIZE, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(4, in_chans, *sides(size), generator=torch.Generator().manual_seed(0))


def features(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = module.eval()(images)
    return result


def equal(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def foreign(state: State) -> State:
    """Names as another library might give them, in the same order, with a classifier at the end."""
    renamed = OrderedDict(
        (f"_part{n}.{name.rpartition('.')[2]}", value) for n, (name, value) in enumerate(state.items())
    )
    return renamed | {"_fc.weight": torch.zeros(10, 64), "_fc.bias": torch.zeros(10)}


# Reading.


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".pth.tar", ".ckpt"])
def test_every_kind_of_file_gives_its_tensors(suffix: str, tmp_path: Path) -> None:
    state, path = network().state_dict(), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert equal(read(path), state)


@pytest.mark.parametrize(
    "keys",
    [("state_dict",), ("model",), ("state_dict_ema",), ("state_dict", "model"), ("teacher",), ("target_encoder",)],
)
def test_a_state_dict_inside_a_checkpoint_is_taken_out(keys: tuple[str, ...], tmp_path: Path) -> None:
    content: dict[str, Any] = {"a.weight": torch.ones(2)}
    for key in reversed(keys):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    assert equal(read(tmp_path / "a.pth"), {"a.weight": torch.ones(2)})


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth")["a"] == 1


class Harmful:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"a": Harmful(tmp_path / "made")}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="what needs code to be read is refused"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


class Told(argparse.Namespace):
    """Not the class that is let through."""


def test_settings_beside_the_weights_are_read_and_not_looked_at(tmp_path: Path) -> None:
    told = argparse.Namespace(lr=0.1, model="vit", betas=(0.9, 0.95), nested=argparse.Namespace(a=[1]))
    torch.save({"model": {"a": torch.ones(2)}, "args": told}, tmp_path / "a.pth")
    assert equal(read(tmp_path / "a.pth"), {"a": torch.ones(2)})
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "let through for one file alone"


@pytest.mark.parametrize("inside", ["namespace", "subclass", "class"])
def test_settings_let_nothing_else_through(inside: str, tmp_path: Path) -> None:
    told: Any = {
        "namespace": argparse.Namespace(lr=Harmful(tmp_path / "made")),
        "subclass": Told(lr=1),
        "class": argparse.ArgumentParser,
    }[inside]
    torch.save({"model": {"a": torch.ones(2)}, "args": told}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="what needs code to be read is refused"):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "no tensors by name, but a list"),
        ({}, "no tensors by name"),
        ({"state_dict": {}}, "no tensors by name"),
        ({"a": torch.ones(2), "epoch": 3}, "other things than plain tensors: epoch"),
        ({"a": torch.eye(2).to_sparse()}, "other things than plain tensors: a"),
        (torch.ones(2), "but a Tensor"),
    ],
)
def test_anything_else_is_refused_in_words(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path / "a.pt")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.bin"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\x80\x02N.", b"PK\x03\x04"])
def test_a_file_of_something_else(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError):
        read(tmp_path / name)


def test_a_file_by_another_name_and_no_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w"):
        pass
    with pytest.raises(DataError, match=r"allowed: \.safetensors, \.pth, \.pt, \.bin, \.pth\.tar, \.ckpt"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.tar").touch()
    with pytest.raises(DataError, match="no weight file by its name"):
        read(tmp_path / "a.tar")
    with pytest.raises(MissingInputError):
        read(tmp_path / "absent.pth")


def test_the_digest_knows_names_shapes_kinds_and_values() -> None:
    state = {"a": torch.arange(4.0), "b": torch.tensor(3)}
    assert digest(state) == digest(dict(reversed(state.items())))
    others: list[State] = [
        {"a": torch.arange(4.0), "c": torch.tensor(3)},
        {"a": torch.arange(4.0).reshape(2, 2), "b": torch.tensor(3)},
        {"a": torch.arange(4.0), "b": torch.tensor(3, dtype=torch.int32)},
        {"a": torch.arange(4.0) + 1e-7, "b": torch.tensor(3)},
    ]
    assert len({digest(state), *(digest(other) for other in others)}) == 5
    assert digest({"a": torch.ones(2, dtype=torch.bfloat16)}) != digest({"a": torch.ones(2, dtype=torch.float16)})


# By name.


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.network.", "module.encoder_q."])
def test_names_may_have_a_prefix_and_others_may_stand_beside(prefix: str) -> None:
    source, target = network(), network(seed=2)
    state = {prefix + name: value for name, value in source.state_dict().items()}
    report = fill(target, state | {"projector.weight": torch.ones(2), f"{prefix}fc.bias": torch.ones(9)}, "FILE")
    assert equal(target.state_dict(), source.state_dict())
    families = {"backbone.network.": ", as sslmed names them", "module.encoder_q.": ", as moco names them"}
    assert report.lines() == [
        f"weights from FILE{families.get(prefix, '')}: {len(state)} tensors matched, "
        f"2 dropped by design (projector.weight, {prefix}fc.bias)"
    ]
    assert not report.by_order


def test_two_networks_in_one_file_are_ambiguous() -> None:
    state = network().state_dict()
    both = {f"{prefix}.{name}": value for prefix in ("student", "teacher") for name, value in state.items()}
    with pytest.raises(DataError, match=r"several such networks, under student\., teacher\."):
        fill(network(seed=2), both, "FILE")
    target = network(seed=2)
    fill(target, both | state, "FILE")
    assert equal(target.state_dict(), state)


def test_a_classifier_inside_the_head_is_dropped_and_the_heads_own_norm_kept() -> None:
    source = timm.create_model("test_convnext", in_chans=3)  # with head.norm, head.fc
    target = network("test_convnext", seed=2)
    report = fill(target, source.state_dict(), "FILE")
    assert set(report.dropped) == {"head.fc.weight", "head.fc.bias"}
    assert torch.equal(target.state_dict()["head.norm.weight"], source.state_dict()["head.norm.weight"])


def test_counters_of_batches_may_be_absent() -> None:
    source, target = network(), network(seed=2)
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    report = fill(target, state, "FILE")
    assert report.matched == len(state)
    assert report.missing
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    images = noise()
    assert torch.equal(features(target, images), features(source, images))


def test_half_precision_is_taken() -> None:
    source, target = network(in_chans=3), network(in_chans=1, seed=2)
    half = {name: value.half() if value.is_floating_point() else value for name, value in source.state_dict().items()}
    fill(target, half, "FILE")
    for name, value in target.state_dict().items():
        expected = half[name].float().sum(1, keepdim=True) if name == "conv1.0.weight" else half[name]
        torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=1e-6)


def refused(target: nn.Module, state: State, words: str, **options: Any) -> None:
    """Refused in words, and the network is as it was."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(DataError, match=words) as caught:
        fill(target, state, "FILE", **options)
    assert len(str(caught.value).splitlines()) <= 6
    assert equal(target.state_dict(), before)


def test_a_missing_tensor_is_named() -> None:
    state = network().state_dict()
    for name in ("layer1.0.conv1.weight", "layer2.0.bn1.bias"):
        state.pop(name)
    refused(network(seed=2), state, r"2 are missing: layer1\.0\.conv1\.weight, layer2\.0\.bn1\.bias\.")


def test_another_shape_is_named() -> None:
    state = network().state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"][:, :, :1, :1]
    refused(network(seed=2), state, r"layer1\.0\.conv1\.weight is 32 x 32 x 1 x 1, the network's 32 x 32 x 3 x 3")


@pytest.mark.parametrize("shape", [(64, 768), (64, 0, 16, 16), (64, 3, 0, 0), (64, 3, 16), ()])
def test_a_patch_embedding_of_an_impossible_shape(shape: tuple[int, ...]) -> None:
    state = network("test_vit").state_dict() | {"patch_embed.proj.weight": torch.zeros(shape)}
    refused(network("test_vit", seed=2), state, r"patch_embed\.proj\.weight is ", size=SIZE)


@pytest.mark.parametrize("shape", [(1, 0, 64), (1, 1, 64), (1, 17, 32), (17, 64), (1, 12, 64)])
def test_positions_of_an_impossible_shape(shape: tuple[int, ...]) -> None:
    state = network("test_vit").state_dict() | {"pos_embed": torch.zeros(shape)}
    refused(network("test_vit", seed=2), state, r"pos_embed is ", size=SIZE)


def test_whole_numbers_are_no_weights() -> None:
    state = network().state_dict()
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].to(torch.int8)
    refused(network(seed=2), state, r"layer1\.0\.conv1\.weight")


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "conv1.0.weight", "conv1.1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    state = {key: tensor.clone() for key, tensor in network().state_dict().items()}
    state[name].view(-1)[0] = value
    refused(network(seed=2, in_chans=1), state, rf"{name} has values that are not finite")


def test_a_network_with_more_blocks_is_not_cut_down() -> None:
    deeper = timm.create_model("test_vit", img_size=SIZE, num_classes=0, depth=8)
    refused(network("test_vit"), deeper.state_dict(), r"a larger network: the network asked for has no blocks\.")


def test_another_pooling_is_named() -> None:
    refused(network("test_vit", pool="avg"), network("test_vit", pool="token").state_dict(), "fc_norm.weight")


# By order.


def test_foreign_names_in_the_networks_order() -> None:
    source, target = network(), network(seed=2)
    report = fill(target, foreign(source.state_dict()), "FILE")
    assert equal(target.state_dict(), source.state_dict())
    assert report.by_order
    assert report.dropped == ("_fc.weight", "_fc.bias")
    assert "order" in report.lines()[1]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_order_is_adapted_too(prefix: str) -> None:
    source, target = network("test_vit"), network("test_vit", in_chans=1, seed=2, size=96, patch=8)
    # cls_token and pos_embed have no module: their names are their kinds
    state = {prefix + name: value for name, value in foreign(source.state_dict()).items()}
    report = fill(target, state, "FILE")
    assert report.by_order
    assert [change[1:] for change in report.adapted] == [
        ("4 x 4", "12 x 12 patches"),
        ("3", "1 channels"),
        ("16 x 16", "8 x 8 pixels"),
    ]


def test_foreign_names_without_counters() -> None:
    source, target = network(), network(seed=2)
    state = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    fill(target, foreign(state), "FILE")
    images = noise()
    assert torch.equal(features(target, images), features(source, images))


@pytest.mark.parametrize("change", ["kind", "shape", "fewer", "more"])
def test_another_order_is_refused(change: str) -> None:
    state = foreign(network().state_dict())
    names = list(state)
    if change == "kind":  # running_mean and running_var have one shape
        swapped = {names[3]: names[4], names[4]: names[3]}
        state = OrderedDict((swapped.get(name, name), value) for name, value in state.items())
    elif change == "shape":
        state[names[0]] = torch.zeros(16, 3, 5, 5)
    elif change == "fewer":
        state.pop(names[-3])
    else:
        state["_more.weight"] = torch.ones(2)
    refused(network(seed=2), state, "nor does the order agree")


def test_a_file_without_order_is_not_taken_by_order() -> None:
    refused(network(seed=2), foreign(network().state_dict()), "keeps no order", ordered=False)


def test_a_file_of_mostly_the_same_names_is_not_taken_by_order() -> None:
    state = network().state_dict()
    renamed = OrderedDict((name.replace("conv1.0.weight", "stem.weight"), value) for name, value in state.items())
    refused(network(seed=2), renamed, r"1 are missing: conv1\.0\.weight\.")


# Channels.


@pytest.mark.parametrize("old", [1, 2, 3, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 6, 7])
def test_a_grey_image_over_other_channels_acts_as_before(old: int, new: int) -> None:
    weight = torch.randn(5, old, 3, 3, dtype=torch.float64)
    grey = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    expected = F.conv2d(grey.expand(-1, old, -1, -1), weight)
    adapted = channels(weight, new)
    assert adapted.shape == (5, new, 3, 3)
    torch.testing.assert_close(F.conv2d(grey.expand(-1, new, -1, -1), adapted), expected, rtol=0, atol=1e-13)


def test_one_channel_gets_the_sum_and_multiples_are_tiles() -> None:
    weight = torch.randn(5, 3, 3, 3)
    torch.testing.assert_close(channels(weight, 1), weight.sum(1, keepdim=True))
    torch.testing.assert_close(channels(weight, 6), weight.repeat(1, 2, 1, 1) * 3 / 6)
    torch.testing.assert_close(channels(weight, 3), weight)
    torch.testing.assert_close(channels(weight[:, :1], 3), weight[:, :1].repeat(1, 3, 1, 1) / 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3)])
def test_a_whole_network_of_other_channels(name: str, old: int, new: int) -> None:
    source, target = network(name, old), network(name, new, seed=2)
    report = fill(target, source.state_dict(), "FILE")
    assert [change[1:] for change in report.adapted] == [(str(old), f"{new} channels")]
    assert report.matched == len(source.state_dict()) - 1
    grey = torch.randn(2, 1, SIZE, SIZE)
    torch.testing.assert_close(
        features(target, grey.expand(-1, new, -1, -1)),
        features(source, grey.expand(-1, old, -1, -1)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_report_says_what_was_adapted() -> None:
    report = fill(network(in_chans=1), network(in_chans=3).state_dict(), "FILE")
    assert report.lines() == [
        f"weights from FILE: {report.matched} tensors matched, 1 adapted (conv1.0.weight 3 -> 1 channels)"
    ]


def test_pixels_that_are_moved_into_channels_are_not_adapted() -> None:
    refused(
        network("tresnet_m", in_chans=1), network("tresnet_m", in_chans=3).state_dict(), r"body\.conv1\.conv\.weight"
    )


# Positions and patches.


@pytest.mark.parametrize("size", [96, (32, 96), (48, 64)])
def test_positions_go_to_another_grid_as_timm_does_it(size: Any) -> None:
    from timm.layers import resample_abs_pos_embed

    source, target = network("test_vit"), network("test_vit", seed=2, size=size)
    report = fill(target, source.state_dict(), "FILE", SIZE)
    old, new = source.state_dict()["pos_embed"], target.state_dict()["pos_embed"]
    grid = list(target.patch_embed.grid_size)  # type: ignore[union-attr]
    assert torch.equal(new, resample_abs_pos_embed(old, grid, [4, 4], num_prefix_tokens=PREFIX))
    assert torch.equal(new[:, :PREFIX], old[:, :PREFIX])
    spread = old[:, PREFIX:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(spread, size=grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(new[:, PREFIX:], expected)
    assert report.adapted == (("pos_embed", "4 x 4", f"{grid[0]} x {grid[1]} patches"),)


def test_the_size_tells_the_grid_that_a_square_would_hide() -> None:
    """32 x 128 with patches of 16 has as many positions as 64 x 64."""
    source = network("test_vit", size=(32, 128))
    same, other, guessed = (network("test_vit", seed=2, size=size) for size in ((32, 128), 64, 64))
    assert fill(same, source.state_dict(), "FILE", (32, 128)).adapted == ()
    assert torch.equal(same.state_dict()["pos_embed"], source.state_dict()["pos_embed"])
    assert fill(other, source.state_dict(), "FILE", (32, 128)).adapted == (("pos_embed", "2 x 8", "4 x 4 patches"),)
    assert fill(guessed, source.state_dict(), "FILE").adapted == ()  # a file says nothing of its grid


def test_a_grid_that_is_neither_known_nor_square() -> None:
    source, same = network("test_vit", size=(32, 96)), network("test_vit", seed=2, size=(32, 96))
    assert fill(same, source.state_dict(), "FILE").adapted == ()
    refused(network("test_vit", seed=2), source.state_dict(), r"pos_embed is 1 x 13 x 64, the network's 1 x 17 x 64")


def test_patches_of_another_size_as_timm_does_it() -> None:
    from timm.layers import resample_patch_embed

    source, target = network("test_vit"), network("test_vit", seed=2, patch=8)
    report = fill(target, source.state_dict(), "FILE", SIZE)
    name = "patch_embed.proj.weight"
    assert torch.equal(target.state_dict()[name], resample_patch_embed(source.state_dict()[name], [8, 8]))
    assert {change[0] for change in report.adapted} == {"pos_embed", name}
    assert report.matched == len(source.state_dict()) - 2


def test_a_convolution_is_no_patch_embedding() -> None:
    state = network("test_convnext").state_dict()
    state["stem.0.weight"] = F.interpolate(state["stem.0.weight"], size=(2, 2))
    refused(network("test_convnext", seed=2), state, r"stem\.0\.weight is 24 x 3 x 2 x 2")
