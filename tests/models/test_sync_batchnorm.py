"""BatchNorm over processes is BatchNorm of the whole batch, by value and gradient; alone it is what it was."""

import copy
from typing import Any

import pytest
import ranks
import torch
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.methods import METHODS
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.momentum import follow, follower
from sslmed.models.sync_batchnorm import CPUSyncBatchNorm, _Normalise, synchronise

ROWS = (5, 3)


def without_bias() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.register_parameter("bias", None)
    return layer


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "2d": (lambda: nn.BatchNorm2d(4), (8, 4, 3, 5)),
    "3d": (lambda: nn.BatchNorm3d(4, eps=0.1), (8, 4, 2, 3, 2)),
    "no bias": (without_bias, (8, 4)),
    "not affine": (lambda: nn.BatchNorm1d(4, affine=False), (8, 4)),
    "cumulative": (lambda: nn.BatchNorm2d(4, momentum=None), (8, 4, 3, 5)),
    "nothing tracked": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (8, 4, 3, 5)),
    "fused activation": (lambda: BatchNormAct2d(4, act_layer=nn.SiLU), (8, 4, 3, 5)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def drawn(make: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any, Any]:
    """A layer with random weights, and inputs whose rows differ much in level and spread, far from zero."""
    generator = torch.Generator().manual_seed(0)
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    level = torch.arange(8.0).view(-1, *[1] * (len(shape) - 1))
    inputs = 50 + 3 * level + (1 + level) * torch.randn(shape, generator=generator)
    return layer, inputs.to(dtype), torch.randn(shape, generator=generator, dtype=dtype)


def whole(layer: nn.Module, inputs: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one process computes of all rows."""
    layer, inputs = copy.deepcopy(layer), inputs.clone().requires_grad_()
    outputs = layer(inputs)
    (outputs.to(weights.dtype) * weights).sum().backward()
    assert inputs.grad is not None
    found = {"outputs": outputs.detach(), "by inputs": inputs.grad}
    found |= {f"by {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | dict(layer.named_buffers())


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of both ranks one after the other; what both must know alike, once."""
    first, second = parts
    rows = {"outputs", "by inputs"}
    for name in first.keys() - rows:
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
    return {name: torch.cat([first[name], second[name]]) if name in rows else first[name] for name in first}


@pytest.mark.ddp
@every_layer
def test_two_processes_normalise_as_one(make: Any, shape: tuple[int, ...]) -> None:
    layer, inputs, weights = drawn(make, shape)
    expected = whole(layer, inputs, weights)
    found = joined(ranks.on_two_ranks(ranks.batchnorm_on_ranks, layer, inputs, weights, ROWS, True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


@pytest.mark.ddp
def test_in_single_precision_it_loses_no_digits() -> None:
    layer, inputs, weights = drawn(*LAYERS["2d"], dtype=torch.float32)
    inputs = inputs + 5000  # squares of it have no digit left for a variance
    expected = whole(copy.deepcopy(layer).double(), inputs.double(), weights.double())
    found = joined(ranks.on_two_ranks(ranks.batchnorm_on_ranks, layer, inputs, weights, ROWS, True))
    torch.testing.assert_close(found["outputs"].double(), expected["outputs"], rtol=0, atol=2e-4)
    torch.testing.assert_close(found["running_var"].double(), expected["running_var"], rtol=1e-4, atol=0)


@pytest.mark.ddp
def test_half_precision_is_computed_in_single() -> None:
    layer, inputs, weights = drawn(*LAYERS["2d"], dtype=torch.float32)
    inputs = inputs.to(torch.bfloat16)
    expected = whole(layer, inputs, weights)
    found = joined(ranks.on_two_ranks(ranks.batchnorm_on_ranks, layer, inputs, weights, ROWS, True))
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
    torch.testing.assert_close(found["outputs"], expected["outputs"], rtol=2**-7, atol=2**-7)  # one unit of bf16
    torch.testing.assert_close(found["running_var"], expected["running_var"], rtol=1e-5, atol=0)


@pytest.mark.ddp
def test_without_it_two_processes_differ() -> None:
    layer, inputs, weights = drawn(*LAYERS["2d"])
    expected = whole(layer, inputs, weights)
    first, second = ranks.on_two_ranks(ranks.batchnorm_on_ranks, layer, inputs, weights, ROWS, False)
    for name in ("outputs", "by inputs"):
        difference = (torch.cat([first[name], second[name]]) - expected[name]).norm() / expected[name].norm()
        assert difference > 0.1, name
    assert not torch.allclose(first["running_mean"], second["running_mean"])


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.rand(8, 1, 32, 32, generator=generator, dtype=torch.float64) - 2
    views = [base + 0.2 * torch.randn(base.shape, generator=generator, dtype=base.dtype) for _ in range(2)]
    ids = torch.arange(8)
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def of_one_process(name: str) -> dict[str, torch.Tensor]:
    method = ranks.small_method(name).double()
    method.loss(batch())["loss"].backward()
    found = {key: parameter.grad for key, parameter in method.named_parameters() if parameter.grad is not None}
    return found | dict(method.named_buffers())


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    one, two = (torch.cat([each[key].double().flatten() for key in sorted(expected)]) for each in (expected, found))
    return float((one - two).norm() / one.norm())


@pytest.mark.ddp
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.sync_batchnorm])
def test_a_method_has_the_gradients_and_statistics_of_one_process(name: str, checkpointed: bool) -> None:
    both = ranks.on_two_ranks(ranks.batchnorm_gradient, name, batch(), True, checkpointed)
    assert [relative(found, of_one_process(name)) < 1e-9 for found in both] == [True, True]


@pytest.mark.ddp
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.sync_batchnorm])
def test_a_method_without_it_has_others(name: str) -> None:
    (found, _) = ranks.on_two_ranks(ranks.batchnorm_gradient, name, batch(), False)
    assert relative(found, of_one_process(name)) > 0.01


def test_those_whose_references_synchronise_declare_it() -> None:
    declared = {name for name, method in METHODS.items() if method.sync_batchnorm}
    assert declared == {"simclr", "moco_v3", "simsiam", "byol", "barlow_twins", "vicreg", "swav", "dino"}


@every_layer
def test_alone_it_is_batchnorm_to_the_bit(make: Any, shape: tuple[int, ...]) -> None:
    layer, inputs, weights = drawn(make, shape)
    expected = whole(layer, inputs, weights)
    twin = synchronise(copy.deepcopy(layer), "cpu")
    assert isinstance(twin, CPUSyncBatchNorm)
    found = whole(twin, inputs, weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(twin.eval()(inputs), layer.eval()(inputs))


@every_layer
def test_its_own_formula_is_batchnorm_too(make: Any, shape: tuple[int, ...]) -> None:
    """What two processes use, in one: value, statistics, and the gradient against finite differences."""
    layer, inputs, _ = drawn(make, shape)
    expected = whole(layer, inputs, torch.ones_like(inputs))["outputs"]
    reference = synchronise(copy.deepcopy(layer), "cpu")
    found = reference._with_all_processes(inputs)  # type: ignore[operator]
    if "act" in dict(layer.named_children()):
        found = nn.functional.silu(found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    arguments = [
        each if each is None else each.detach().clone().requires_grad_() for each in (layer.weight, layer.bias)
    ]
    inputs = inputs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: _Normalise.apply(*x, 1e-5)[0], (inputs, *arguments))


def test_names_parameters_and_modes_stay() -> None:
    backbone = build(BackboneConfig(name="resnet18"), 32, 0)
    backbone.freeze(2)
    before = backbone.state_dict(keep_vars=True)
    modes = {name: part.training for name, part in backbone.named_modules()}
    average = follower(backbone)
    synchronise(backbone, "cpu")
    synchronise(backbone, "cpu")  # a second time changes nothing
    after = backbone.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert {name: part.training for name, part in backbone.named_modules()} == modes
    assert not all(modes.values())
    follow(average, backbone, 0.5)
    own = [type(part) for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert set(own) == {CPUSyncBatchNorm}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_timms_fused_layers_keep_activation_and_dropout(device_type: str) -> None:
    fused = BatchNormAct2d(4, drop_layer=nn.Dropout)
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Sequential(fused))
    inputs = torch.randn(6, 1, 4, 4)
    torch.manual_seed(0)
    expected = copy.deepcopy(network)(inputs)
    assert 0.6 < (expected == 0).float().mean() < 0.9, "half is dropped, half of the rest rectified"
    converted = synchronise(copy.deepcopy(network), device_type)
    torch.manual_seed(0)
    found = converted(inputs)
    assert torch.equal(found, expected)
    if device_type == "cuda":
        assert [type(converted[1]), type(converted[2][0])] == [nn.SyncBatchNorm, SyncBatchNormAct]


def test_shared_layers_stay_shared() -> None:
    layer = nn.BatchNorm1d(3)
    pair = synchronise(nn.ModuleList([layer, layer]), "cpu")
    assert pair[0] is pair[1] is layer


def test_another_kind_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match=r"1 is a SplitBatchNorm2d; allowed: "):
        synchronise(nn.Sequential(nn.ReLU(), SplitBatchNorm2d(3)), "cpu")


def test_inputs_without_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, C, \.\.\.\)"):
        synchronise(nn.BatchNorm1d(3), "cpu")(torch.zeros(3))
