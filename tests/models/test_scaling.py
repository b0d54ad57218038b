"""Checkpointed gradients hold less and change no bit; compiled parts give the same losses under the same names."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.methods import METHODS
from sslmed.methods.method import Method
from sslmed.models import compilation
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.models.compilation import compile_parts

NETWORKS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"name": "test_resnet"},
    "BatchNorm and dropped paths": {"name": "resnet18", "drop_path": 0.2},
    "fused activations": {"name": "test_efficientnet"},
    "ViT and dropped paths": {"name": "test_vit", "patch": 8, "drop_path": 0.2},
    "rotary positions": {"name": "eva02_tiny_patch14_224", "patch": 8, "drop_path": 0.2},
    "hierarchical": {"name": "test_convnext", "drop_path": 0.2},
}
every_network = pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
every_method = pytest.mark.parametrize("name", METHODS)


def pooled(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return backbone(images).square().mean()


def mapped(backbone: Backbone, images: torch.Tensor) -> torch.Tensor:
    return torch.stack([each.square().mean() for each in backbone.maps(images)]).sum()


def batch(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.rand(rows, 1, 32, 32, generator=generator) - 2
    views = [base + 0.2 * torch.randn(base.shape, generator=generator) for _ in range(2)]
    ids = torch.arange(rows)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def trained(module: torch.nn.Module, loss: Callable[[], torch.Tensor], steps: int = 3) -> dict[str, torch.Tensor]:
    """Weights, buffers and last gradients after a few steps of SGD with momentum."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    torch.manual_seed(0)  # of dropped paths
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    gradients = {f"by {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return module.state_dict() | gradients


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def held(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters too."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss().backward()
    return sum(storage.nbytes() for storage in kept.values())


@every_network
@pytest.mark.parametrize("loss", [pooled, mapped])
def test_checkpointed_training_is_the_same_to_the_bit(settings: dict[str, Any], loss: Any) -> None:
    plain = build(BackboneConfig.model_validate(settings), 32, 0)
    other = copy.deepcopy(plain)
    other.checkpoint_gradients()
    images = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    assert_same(trained(other, lambda: loss(other, images)), trained(plain, lambda: loss(plain, images)))


def test_the_networks_own_switch_alone_counts_a_batch_twice() -> None:
    """Why BatchNorm is looked after: if timm or torch should do so one day, our hooks can go."""
    plain = build(BackboneConfig(name="test_resnet"), 32, 0)
    other = copy.deepcopy(plain)
    other.network.set_grad_checkpointing(True)  # type: ignore[operator]
    for backbone in (plain, other):
        pooled(backbone, torch.ones(2, 1, 32, 32)).backward()
    counts = [int(each.network.layer1[0].bn1.num_batches_tracked) for each in (plain, other)]  # type: ignore[index, union-attr]
    assert counts == [1, 2]


def test_frozen_layers_stay_as_they_are() -> None:
    backbone = build(BackboneConfig(name="resnet18"), 32, 0)
    backbone.freeze(4)
    backbone.checkpoint_gradients()
    before = copy.deepcopy(backbone.state_dict())
    trained(backbone, lambda: pooled(backbone, torch.randn(2, 1, 32, 32)))
    same = {name for name, value in backbone.state_dict().items() if torch.equal(value, before[name])}
    assert {"network.bn1.running_mean", "network.layer1.0.bn1.running_mean", "network.conv1.weight"} <= same
    assert not any(name.startswith("network.layer4") for name in same)


@every_method
def test_a_method_trains_the_same_to_the_bit(name: str) -> None:
    plain, other = ranks.small_method(name), ranks.small_method(name)
    other.backbone.checkpoint_gradients()
    other.backbone.checkpoint_gradients()  # a second time changes nothing
    assert_same(*(trained(each, lambda each=each: each.loss(batch())["loss"]) for each in (other, plain)))


@pytest.mark.parametrize("name", ["test_vit", "eva02_tiny_patch14_224"])
def test_an_opened_transformer_drops_the_same_paths(name: str) -> None:
    kind = METHODS["mae"]
    config = BackboneConfig(name=name, patch=8, drop_path=0.3)
    plain, other = (kind(kind.Config(**kind.example_settings), build(config, 32, 0)) for _ in range(2))
    other.load_state_dict(plain.state_dict())
    other.backbone.checkpoint_gradients()
    assert_same(*(trained(each, lambda each=each: each.loss(batch())["loss"]) for each in (other, plain)))


@pytest.mark.parametrize("loss", [pooled, mapped])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_less_is_held(name: str, loss: Any) -> None:
    backbone = build(BackboneConfig(name=name), 64, 0)
    images = torch.randn(4, 1, 64, 64)
    plain = held(lambda: loss(backbone, images))
    backbone.checkpoint_gradients()
    assert held(lambda: loss(backbone, images)) < 0.2 * plain


def test_mae_holds_less_in_encoder_and_decoder() -> None:
    kind = METHODS["mae"]
    config = BackboneConfig(name="vit_tiny_patch16_224", patch=8)
    method = kind(kind.Config(decoder_width=128, decoder_depth=2, decoder_heads=4), build(config, 32, 0))  # type: ignore[call-arg]
    plain = held(lambda: method.loss(batch())["loss"])
    method.backbone.checkpoint_gradients()
    both = held(lambda: method.loss(batch())["loss"])
    method.decoder.forward = lambda *args: type(method.decoder).forward(method.decoder, *args[:2])  # type: ignore
    encoder_alone = held(lambda: method.loss(batch())["loss"])
    assert both < 0.7 * encoder_alone
    assert encoder_alone < 0.7 * plain


class Bare(torch.nn.Linear):
    """What a network is that has no such switch at all."""

    num_features = 3


@pytest.mark.parametrize(
    "make",
    [lambda: build(BackboneConfig(name="hrnet_w18_small"), 32, 0), lambda: Backbone(Bare(3, 3))],
    ids=["timm asserts", "no switch"],
)
def test_a_network_that_cannot_is_refused_in_words(make: Callable[[], Backbone]) -> None:
    backbone = make()
    with pytest.raises(UsageError, match=r"gradients of (hrnet_w18_small|Bare); take another backbone.name"):
        backbone.checkpoint_gradients()


@pytest.fixture
def compiler() -> Iterator[Any]:
    """torch's counters, with nothing compiled before and after."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def losses(method: Method, steps: int = 3) -> list[float]:
    """Of a few small steps; what is compiled rounds otherwise, and large steps make much of it."""
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.001)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = method.loss(batch())["loss"]
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
@every_method
def test_traced_parts_train_the_same_and_once(name: str, compiler: Any) -> None:
    """Tracing without code generation: quick, and exact."""
    plain, other = ranks.small_method(name), ranks.small_method(name)
    keys = list(other.state_dict())
    compile_parts(other, "cpu", backend="aot_eager")
    assert list(other.state_dict()) == keys
    first = losses(other, 1)
    graphs = compiler["unique_graphs"]
    assert compiler["calls_captured"] > 20, "the backbone is in it"
    assert first + losses(other, 2) == losses(plain)
    assert compiler["unique_graphs"] == graphs, "nothing is compiled twice"
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in other.state_dict().items())


@pytest.mark.slow
def test_blocks_with_their_own_stochastic_depth_are_all_compiled(compiler: Any) -> None:
    """torch gives up after eight variants of one function, with a warning."""
    kind = METHODS["mae"]
    config = BackboneConfig(name="vit_tiny_patch16_224", patch=8, drop_path=0.1)
    method = kind(kind.Config(**kind.example_settings), build(config, 32, 0))
    compile_parts(method, "cpu", backend="eager")
    losses(method, 1)
    assert compiler["unique_graphs"] == 1 + 12 + 1, "the trial, the blocks, the decoder"


def test_a_machine_that_cannot_compile_is_told(monkeypatch: pytest.MonkeyPatch, compiler: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(compilation.torch, "compile", fail)
    with pytest.raises(UsageError, match=r"for cpu: RuntimeError: no compiler\nIt needs .* train.compile=false"):
        compile_parts(torch.nn.Linear(1, 1), "cpu")


@pytest.mark.slow
@every_method
def test_compiled_losses_agree(name: str, compiler: Any) -> None:
    other = ranks.small_method(name)
    compile_parts(other, "cpu")
    assert losses(other) == pytest.approx(losses(ranks.small_method(name)), rel=1e-5)
