"""I-JEPA: who sees what, who gets a gradient, when the target moves, first weights, exact resume. Its loss: parity."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from courses import course

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.methods.ijepa import IJEPA, IJEPAConfig
from sslmed.methods.method import Progress
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.decoders import sine_cosine_positions

SMALL = {"predictor_width": 32, "predictor_depth": 1, "predictor_heads": 4}
VIT = BackboneConfig(name="test_vit", patch=4)


def ijepa(backbone: BackboneConfig = VIT, size: int = 32, pretrained: bool = False, **settings: Any) -> IJEPA:
    torch.manual_seed(0)
    network = build(backbone, size, 0)
    network.pretrained = pretrained
    return IJEPA(IJEPAConfig(**SMALL | settings), network)


def batch(rows: int = 4, epoch: int = 0, size: int = 32) -> Batch:
    images = torch.randn(rows, 1, size, size, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(rows)
    return Batch(views=[images], target=ids, ids=ids, groups=ids, seed=3, epoch=epoch)


def train(method: IJEPA, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        method.loss(batch(epoch=step))["loss"].backward()
        optimizer.step()
        method.after_step(Progress(step + 1, 20, step + 1, 4))


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "eva02_tiny_patch14_224"])
def test_the_context_encoder_sees_no_pixel_outside_the_context_and_the_target_sees_all(name: str) -> None:
    method, data = ijepa(BackboneConfig(name=name, patch=4)).eval(), batch()
    context_ids, target_ids = method.rule.draw(method.encoder.grid, data.seed, data.epoch, data.ids)
    seen = torch.zeros(4, 64, dtype=torch.bool).scatter_(1, context_ids, True).view(4, 1, 8, 8)
    pixels = seen.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    changed = torch.where(pixels, data.views[0], data.views[0] + 5)
    made: list[list[torch.Tensor]] = [[], []]
    method.predictor.register_forward_hook(lambda _, __, output: made[0].append(output))
    with torch.no_grad():
        for images in (data.views[0], changed):
            made[1].append(method.loss(replace(data, views=[images]))["embeddings"])
    assert torch.equal(*made[0])
    assert not torch.equal(*made[1])
    assert made[0][0].shape == (*target_ids.shape, method.encoder.width)


def test_targets_are_the_tokens_of_the_whole_image_where_the_blocks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from sslmed.methods import ijepa as module

    method, data, given = ijepa().eval(), batch(), []
    with torch.no_grad():
        for parameter in method.target_backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # another network than the context's
    monkeypatch.setattr(module, "latent_error", lambda prediction, wanted: given.append(wanted) or prediction.sum())
    method.loss(data)
    _, target_ids = method.rule.draw(method.encoder.grid, data.seed, data.epoch, data.ids)
    with torch.no_grad():
        tokens = method.target_backbone.network.forward_features(data.views[0])[:, 1:]  # type: ignore[operator]
    for image in range(4):
        for block in range(4):
            torch.testing.assert_close(given[0][image, block], tokens[image, target_ids[image, block]])


def test_no_gradient_reaches_the_target() -> None:
    method = ijepa()
    method.loss(batch())["loss"].backward()
    online, average = method.averaged
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.grad is not None for parameter in online.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("rule", "base"), [("constant", 0.9), ("scaled", 0.9 ** (512 / 256))])
def test_the_target_follows_along_a_straight_line_to_one(rule: str, base: float) -> None:
    method = ijepa(momentum=0.9, momentum_rule=rule)
    for step in (1, 6, 20):
        with torch.no_grad():
            for parameter in method.backbone.parameters():
                parameter += 1
        online, average = (next(iter(each.parameters())) for each in method.averaged)
        before, momentum = average.clone(), base + (1 - base) * (step - 1) / 20
        method.after_step(Progress(step, 20, 0, 512))
        torch.testing.assert_close(average.data, momentum * before + (1 - momentum) * online.data)
    assert bool(method.notes(MODALITIES["xray"], course(512))) == (rule == "scaled")


def test_the_target_encoder_is_what_leaves() -> None:
    method = ijepa()
    assert method.exported is method.target_backbone.network
    assert method.exported is not method.backbone.network
    assert list(method.exported.state_dict()) == list(method.backbone.network.state_dict())


def test_saved_and_loaded_in_the_middle_it_goes_on_to_the_same_bit() -> None:
    whole = ijepa(momentum=0.9)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    train(whole, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    moments = copy.deepcopy(optimizer.state_dict())
    resumed = ijepa(momentum=0.9)
    for parameter in resumed.parameters():
        parameter.data += 1
    resumed.load_state_dict(saved)
    other = torch.optim.AdamW(resumed.parameters(), lr=1e-3)
    other.load_state_dict(moments)
    train(resumed, other, range(3, 6))
    train(whole, optimizer, range(3, 6))
    assert all(torch.equal(resumed.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())


def test_a_batch_in_parts_is_the_mean_of_the_parts() -> None:
    """Every image has as many targets and as large a context, so accumulated gradients are those of the whole."""
    method, data = ijepa().double(), batch(6)
    data.views = [data.views[0].double()]
    parts = [
        method.loss(replace(data, views=[data.views[0][rows]], ids=data.ids[rows]))["loss"]
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    torch.testing.assert_close(method.loss(data)["loss"], sum(parts) / 3, rtol=1e-12, atol=1e-12)


def test_first_weights_are_the_references() -> None:
    method = ijepa(BackboneConfig(name="vit_tiny_patch16_224", patch=14, in_chans=3), 112, predictor_depth=3)
    network: Any = method.backbone.network
    assert network.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    for blocks in (network.blocks, method.predictor.predictor_blocks):
        for number in (1, 3):
            for layer in (blocks[number - 1].attn.proj, blocks[number - 1].mlp.fc2):
                assert layer.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.04)
    assert torch.equal(network.pos_embed[0, 1:], sine_cosine_positions(192, (8, 8)).float())
    assert not network.pos_embed.requires_grad
    assert torch.equal(method.target_backbone.network.blocks[2].mlp.fc2.weight, network.blocks[2].mlp.fc2.weight)  # type: ignore[union-attr, index]


@pytest.mark.parametrize(("patch", "channels"), [(4, 1), (8, 1), (8, 3)])
def test_patches_of_any_size_do_not_drown_in_their_positions(patch: int, channels: int) -> None:
    """A token varies by 1, its position by 0.7; by the reference's 0.02 a patch of 16 values would vary by 0.08."""
    method = ijepa(BackboneConfig(name="test_vit", patch=patch, in_chans=channels))
    images = torch.randn(50, channels, 32, 32, generator=torch.Generator().manual_seed(0))
    assert method.encoder.embed(images).std().item() == pytest.approx(1, rel=0.1)
    assert sine_cosine_positions(64, (8, 8)).square().mean().sqrt().item() == pytest.approx(math.sqrt(0.5))


def test_weights_that_mean_something_stay() -> None:
    before = build(VIT, 32, 0).network.state_dict()
    method = ijepa(pretrained=True)
    for network in (method.backbone.network, method.target_backbone.network):
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert method.backbone.network.pos_embed.requires_grad  # type: ignore[union-attr]


def test_the_view_has_no_flips_and_true_intensities() -> None:
    histology = MODALITIES["histology"]
    (view,) = ijepa().views(histology)
    assert (view.hflip, view.vflip, view.rot90, view.stain, view.blur) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert (view.crop, view.rotate) == (histology.view.crop, histology.view.rotate)
    (note,) = ijepa().notes(with_views(MODALITIES["xray"], {"hflip": 0.5, "rotate": 5}), course(64))
    assert "views.hflip has no effect" in note


@pytest.mark.parametrize(
    ("backbone", "settings", "said"),
    [
        ({"name": "test_resnet"}, {}, "ijepa needs a vision transformer"),
        (
            {"name": "test_vit", "patch": 16},
            {},
            "grid of at least 4 x 4, not 2 x 2; lower backbone.patch or raise data",
        ),
        ({"name": "test_vit", "patch": 4}, {"targets": 16, "target_scale": [0.4, 0.5]}, "16 targets of"),
    ],
)
def test_what_it_cannot_take_is_refused_in_words(backbone: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ijepa(BackboneConfig.model_validate(backbone), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_scale": [0.3, 0.2]}, r"target_scale is \[0.3, 0.2\]; allowed: the smaller number first"),
        ({"predictor_width": 100, "predictor_heads": 12}, "predictor_width is 100; allowed with predictor_heads"),
        ({"predictor_width": 30, "predictor_heads": 3}, "allowed with sine-cosine positions: multiples of 4"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IJEPAConfig(**settings)


def test_the_defaults_are_the_references() -> None:
    assert IJEPAConfig().model_dump() == {
        "name": "ijepa",
        "momentum": 0.996,
        "momentum_rule": "constant",
        "targets": 4,
        "target_scale": (0.15, 0.2),
        "target_aspect": (0.75, 1.5),
        "context_scale": (0.85, 1.0),
        "predictor_width": 384,
        "predictor_depth": 12,
        "predictor_heads": 12,
    }
