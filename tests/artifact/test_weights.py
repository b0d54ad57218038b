"""The weights come back, in plain timm too, and no others do."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from artifacts import FILES, IMAGES, NAME, SEEN, SIZE, card, network, sign, written
from safetensors.torch import load_file, save_file
from torch import nn

import sslmed
from sslmed import artifact
from sslmed.commands.verify import verify
from sslmed.config import DataError
from sslmed.image_size import ImageSize, sides
from sslmed.models.backbones import BackboneConfig, build


def test_plain_timm_loads_every_tensor(good: Path) -> None:
    """As the README of the artifact says; strict, because timm by itself passes over what does not match."""
    module = timm.create_model(NAME, in_chans=1, num_classes=0, checkpoint_path=str(good / "model.safetensors"))
    stored = load_file(good / "model.safetensors")
    assert set(stored) == set(module.state_dict())
    assert all(torch.equal(stored[name], tensor) for name, tensor in module.state_dict().items())
    ours = sslmed.load_backbone(good)
    with torch.inference_mode():
        torch.testing.assert_close(module.eval()(IMAGES), ours(IMAGES), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (BackboneConfig(name=NAME), SIZE),
        (BackboneConfig(name="test_vit", patch=8), (32, 48)),
        (BackboneConfig(name="test_vit", patch=8, pool="avg", drop_path=0.1, in_chans=3), (32, 48)),
    ],
)
def test_the_line_in_the_readme_loads_the_same_weights(
    config: BackboneConfig, size: ImageSize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(config, size, 1).network
    artifact.write(tmp_path / "artifact", module, card(backbone=config, size=size), SEEN)
    monkeypatch.chdir(tmp_path)
    lines = (tmp_path / "artifact" / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("backbone = timm.create_model("))
    (statement,) = ast.parse(line).body
    assert isinstance(statement, ast.Assign)
    assert isinstance(statement.value, ast.Call)
    given = {str(each.arg): ast.literal_eval(each.value) for each in statement.value.keywords}
    loaded = timm.create_model(*(ast.literal_eval(each) for each in statement.value.args), **given)
    state = module.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    images = torch.randn(2, config.in_chans, *sides(size))
    with torch.inference_mode():
        assert torch.equal(loaded.eval()(images), sslmed.load_backbone(tmp_path / "artifact")(images))


def test_load_backbone_gives_the_network_that_was_written(good: Path) -> None:
    module = sslmed.load_backbone(str(good))
    original = network().eval()
    assert not module.training
    assert module.state_dict().keys() == original.state_dict().keys()
    with torch.inference_mode():
        features = module(IMAGES)
        assert torch.equal(features, original(IMAGES))
    assert features.shape == (3, module.num_features)


def resnet_of_another_depth(folder: Path) -> None:
    other = timm.create_model("test_resnet", in_chans=1, num_classes=0, layers=(2, 1, 1, 1))
    save_file(other.state_dict(), folder / "model.safetensors")


def three_channels(folder: Path) -> None:
    save_file(timm.create_model(NAME, in_chans=3, num_classes=0).state_dict(), folder / "model.safetensors")


def one_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("conv1.0.weight" if "conv1.0.weight" in tensors else next(iter(tensors)))
    save_file(tensors, folder / "model.safetensors")


def no_tensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")


@pytest.mark.parametrize("swap", [resnet_of_another_depth, three_channels, one_tensor_less, no_tensors])
def test_swapped_weights_are_refused_even_when_signed(swap: Callable[[Path], None], copy: Path) -> None:
    swap(copy)
    sign(copy)
    with pytest.raises(DataError, match="does not hold this network's tensors"):
        artifact.load_backbone(copy)
    with pytest.raises(DataError):
        verify(copy)


def test_the_self_test_knows_other_weights_of_the_same_architecture(good: Path, copy: Path) -> None:
    outcome = artifact.self_test(good)
    assert outcome.passed
    assert outcome.difference <= artifact.SELF_TEST_TOLERANCE
    tensors = {name: tensor.contiguous() for name, tensor in network(seed=2).state_dict().items()}
    save_file(tensors, copy / "model.safetensors")
    sign(copy)
    outcome = artifact.self_test(copy)
    assert not outcome.passed
    assert outcome.difference > 0.01
    with pytest.raises(DataError, match="the self-test differs by"):
        verify(copy)


def test_the_self_test_fails_on_weights_that_are_not_numbers(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, copy / "model.safetensors")
    sign(copy)
    assert not artifact.self_test(copy).passed


def test_a_head_travels_with_its_backbone(tmp_path: Path) -> None:
    head = nn.Linear(64, 2)
    folder = written(tmp_path / "artifact", head)
    assert {path.name for path in folder.iterdir()} == FILES | {"head.safetensors"}
    assert artifact.read_card(folder).kind == "classification"
    assert "`classification` of `finding`: clear, nodule" in (folder / "README.md").read_text()
    empty = nn.Linear(64, 2)
    artifact.load_head(folder, empty)
    assert torch.equal(empty.weight, head.weight)
    with pytest.raises(DataError, match=r"head\.safetensors does not hold"):
        artifact.load_head(folder, nn.Linear(64, 3))
    (folder / "head.safetensors").unlink()
    sign(folder)
    with pytest.raises(DataError, match=r"head\.safetensors"):
        artifact.load_head(folder, empty)
