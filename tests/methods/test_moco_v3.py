"""MoCo v3's details: heads of both kinds of networks, frozen patches, temperature, momentum. Its loss: tests/parity."""

import math
from typing import Any

import pytest
import torch
from courses import course
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.methods.method import Progress
from sslmed.methods.moco_v3 import MoCoV3, MoCoV3Config, contrastive_loss
from sslmed.models.backbones import BackboneConfig, build

SMALL = {"hidden": 32, "out": 16}
NETWORKS = {"resnet": BackboneConfig(name="test_resnet"), "vit": BackboneConfig(name="test_vit", patch=8)}


def small(network: str = "resnet", **settings: Any) -> MoCoV3:
    torch.manual_seed(0)
    return MoCoV3(MoCoV3Config(**SMALL | settings), build(NETWORKS[network], 32, 0)).train()


def batch(rows: int = 8, seed: int = 0) -> Batch:
    base = torch.randn(rows, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(2, rows, 1, 32, 32, generator=torch.Generator().manual_seed(seed + 1000))
    ids = torch.arange(rows)
    return Batch(views=list(base + 0.2 * noise), target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def layers(head: nn.Sequential) -> list[str]:
    kinds = {nn.Linear: "linear", nn.BatchNorm1d: "norm", nn.ReLU: "relu"}
    return [kinds[type(part)] for part in head]


HIDDEN = ["linear", "norm", "relu"]


@pytest.mark.parametrize(
    ("network", "projector", "predictor"),
    [
        ("resnet", [*HIDDEN, "linear", "norm"], [*HIDDEN, "linear"]),
        ("vit", [*HIDDEN, *HIDDEN, "linear", "norm"], [*HIDDEN, "linear", "norm"]),
    ],
)
def test_the_heads_are_the_references(network: str, projector: list[str], predictor: list[str]) -> None:
    method = small(network)
    assert layers(method.projector) == projector
    assert layers(method.predictor) == predictor
    for part in [*method.projector, *method.predictor]:
        if isinstance(part, nn.Linear):
            assert part.bias is None
    assert not method.projector[-1].affine, "BatchNorm at the end has neither scale nor shift"
    assert (MoCoV3Config().hidden, MoCoV3Config().out, MoCoV3Config().momentum) == (4096, 256, 0.99)


def test_the_temperature_is_the_references_for_the_network() -> None:
    assert small().temperature == 1.0
    assert small("vit").temperature == 0.2
    assert small("vit", temperature=0.5).temperature == 0.5


def test_patches_stay_as_they_are_drawn() -> None:
    method = small("vit")
    patches, followed = (network.network.patch_embed.proj for network in (method.backbone, method.momentum_backbone))
    bound = math.sqrt(6 / (8 * 8 + patches.weight.shape[0]))
    assert patches.weight.abs().max() <= bound
    assert patches.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not patches.bias.any()
    before = patches.weight.clone()
    optimizer = torch.optim.AdamW(method.parameter_groups(0.1), lr=1e-2)
    for _ in range(2):
        method.loss(batch())["loss"].backward()
        optimizer.step()
        method.after_step(Progress(1, 10, 0, 256))
    assert torch.equal(patches.weight, before)
    assert torch.equal(followed.weight, before)
    frozen = {name for name, each in method.backbone.named_parameters() if not each.requires_grad}
    assert frozen == {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}


def test_given_patches_are_kept_and_may_train() -> None:
    backbone = build(NETWORKS["vit"], 32, 0)
    given = backbone.network.patch_embed.proj.weight.clone()
    backbone.pretrained = True
    method = MoCoV3(MoCoV3Config(**SMALL), backbone)
    assert torch.equal(method.backbone.network.patch_embed.proj.weight, given)
    assert not method.backbone.network.patch_embed.proj.weight.requires_grad
    assert small("vit", freeze_patches=False).backbone.network.patch_embed.proj.weight.requires_grad
    assert all(parameter.requires_grad for parameter in small().backbone.parameters())


def test_a_transformer_learns_eight_images_as_a_resnet_does_in_the_contract() -> None:
    method, data = small("vit"), batch()
    optimizer = torch.optim.AdamW(method.parameter_groups(1e-4), lr=1e-3)
    for number in range(20):
        outputs = method.loss(data)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        method.after_step(Progress(number + 1, 20, 0, 256))
    assert outputs["twin_accuracy"] == 1
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, parameter in method.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_equal_embeddings_give_twice_the_temperature_times_guessing(temperature: float) -> None:
    rows = torch.ones(8, 4, dtype=torch.float64)
    assert contrastive_loss(rows, rows, temperature).item() == pytest.approx(2 * temperature * math.log(8))


def test_no_gradient_reaches_keys_and_their_batch_statistics_are_their_own() -> None:
    method = small()
    method.loss(batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in method.averaged[1].parameters())
    assert method.momentum_projector[1].running_mean.abs().sum() > 0
    keys = torch.randn(4, 3, requires_grad=True)
    contrastive_loss(torch.randn(4, 3, requires_grad=True), keys, 1.0).backward()
    assert keys.grad is None


def test_moving_after_the_step_is_moving_before_the_keys() -> None:
    """The reference's order, from the same start: follow with the momentum of step t, keys, step."""
    ours, theirs = (small(momentum=0.7, momentum_rule="constant").double() for _ in range(2))
    optimizers = [torch.optim.SGD(method.parameters(), lr=0.1) for method in (ours, theirs)]
    found: list[list[float]] = [[], []]
    for number in range(4):
        data = batch(seed=number)
        data.views = [view.double() for view in data.views]
        momentum = 1 - 0.3 * (1 + math.cos(math.pi * number / 4)) / 2
        for average, online in zip(theirs.averaged[1].parameters(), theirs.averaged[0].parameters(), strict=True):
            average.data = momentum * average.data + (1 - momentum) * online.data
        for losses, method, optimizer in zip(found, (ours, theirs), optimizers, strict=True):
            loss = method.loss(data)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ours.after_step(Progress(number + 1, 4, 0, 256))
    assert found[0] == pytest.approx(found[1], abs=1e-9)
    assert found[0][0] != pytest.approx(found[0][1], abs=1e-3)


def test_views_are_byols_where_solarisation_is_legal() -> None:
    first, second = small().views(MODALITIES["photo"])
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    xray, photo = MODALITIES["xray"], MODALITIES["photo"]
    assert small().views(xray) == (xray.view, xray.view)
    assert small(asymmetric=False).views(photo) == (photo.view, photo.view)
    blurred = with_views(photo, {"blur": 0.0})
    assert "replace views.blur" in small().notes(blurred, course(256))[0]
    assert not small(asymmetric=False).notes(blurred, course(256))
    assert "at batch 64 it is 0.99749" in small().notes(xray, course(64))[0]
