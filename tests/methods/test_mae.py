"""MAE: what is hidden stays hidden, what is seen has no loss, first weights, foreground, pictures."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from courses import course
from scipy.stats import chi2

from sslmed.config import UsageError
from sslmed.data.geometry_view import GEOMETRY
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.image_size import ImageSize
from sslmed.methods.mae import MAE, MAEConfig, reconstruction_error
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.decoders import sine_cosine_positions
from sslmed.models.masking import patchify

SMALL = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}
VIT = BackboneConfig(name="test_vit", patch=8)


def mae(backbone: BackboneConfig = VIT, size: ImageSize = 32, pretrained: bool = False, **settings: Any) -> MAE:
    torch.manual_seed(0)
    network = build(backbone, size, 0)
    network.pretrained = pretrained
    return MAE(MAEConfig(**(SMALL | settings)), network)


def batch(images: torch.Tensor, epoch: int = 0) -> Batch:
    rows = torch.arange(len(images))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def predictions(method: MAE, data: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder predicted, and the loss's gradient by it."""
    seen: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = method.decoder.register_forward_hook(keep)
    method.loss(data)["loss"].backward()
    handle.remove()
    assert seen[0].grad is not None
    return seen[0].detach(), seen[0].grad


def hidden_of(method: MAE, data: Batch) -> torch.Tensor:
    return method._mask(patchify(data.views[0], method.encoder.patch), data)[1]


def by_hand(prediction: np.ndarray, images: np.ndarray, hidden: np.ndarray, patch: int) -> tuple[float, np.ndarray]:
    """Section 3 and 4.1 of arXiv 2111.06377 in float64 loops over images, patches and pixels, with the gradient."""
    count, channels, height, width = images.shape
    loss, gradient, total = 0.0, np.zeros_like(prediction), hidden.sum()
    for n in range(count):
        for number, (row, column) in enumerate(np.ndindex(height // patch, width // patch)):
            if not hidden[n, number]:
                continue
            values = [
                images[n, channel, row * patch + y, column * patch + x]
                for y in range(patch)
                for x in range(patch)
                for channel in range(channels)
            ]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
            for k, value in enumerate(values):
                error = prediction[n, number, k] - (value - mean) / math.sqrt(variance + 1e-6)
                loss += error**2 / len(values) / total
                gradient[n, number, k] = 2 * error / len(values) / total
    return loss, gradient


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize(("size", "patch"), [((32, 32), 8), ((48, 32), 16), ((16, 40), 8)])
def test_the_loss_of_images_equals_the_formula_by_value_and_gradient(
    channels: int, size: tuple[int, int], patch: int
) -> None:
    method = mae(BackboneConfig(name="test_vit", patch=patch, in_chans=channels), size, mask_ratio=0.6).double()
    data = batch(1.5 + 2 * noise(4, channels, *size).double())
    prediction, gradient = predictions(method, data)
    loss, expected = by_hand(prediction.numpy(), data.views[0].numpy(), hidden_of(method, data).numpy(), patch)
    assert method.loss(data)["loss"].item() == pytest.approx(loss, abs=1e-9)
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"norm_pix": False}, {"foreground": True}, {"mask_ratio": 0.9}])
def test_the_gradient_by_the_prediction_is_zero_on_visible_patches_alone(settings: dict[str, Any]) -> None:
    method, data = mae(**settings), batch(noise(6, 1, 32, 32))
    _, gradient = predictions(method, data)
    reached = gradient.abs().amax(dim=2) > 0
    assert torch.equal(reached, hidden_of(method, data))
    assert hidden_of(method, data).any(dim=1).all()


@pytest.mark.parametrize("name", ["test_vit", "test_vit4", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224"])
def test_hidden_pixels_of_the_encoders_input_change_nothing(name: str) -> None:
    method = mae(BackboneConfig(name=name, patch=8), (32, 48)).eval()
    data = batch(noise(3, 1, 32, 48))
    hidden = hidden_of(method, data).view(3, 1, 4, 6).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    other = replace(data, views=[torch.where(hidden, 1000.0, data.views[0])])
    with torch.no_grad():
        keep_ids = method._mask(patchify(data.views[0], (8, 8)), data)[0]
        first, second = (method._predict(each.views[0], keep_ids) for each in (data, other))
        embeddings = [method.loss(each)["embeddings"] for each in (data, other)]
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(*embeddings)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.9, 1), (0.6, 6), (0.5, 8), (0.1, 14)])
@pytest.mark.parametrize("foreground", [False, True])
def test_exactly_int_of_length_times_one_less_ratio_patches_stay(ratio: float, kept: int, foreground: bool) -> None:
    method = mae(mask_ratio=ratio, foreground=foreground)
    images = noise(20, 1, 32, 32)
    images[5:10, :, :16], images[10] = 1.0, 0.0  # half flat; flat
    keep_ids, hidden, _ = method._mask(patchify(images, (8, 8)), batch(images))
    assert keep_ids.shape == (20, kept)
    assert (hidden.sum(dim=1) == 16 - kept).all()


def test_every_patch_is_hidden_alike_over_epochs_and_images() -> None:
    method, images = mae(), torch.zeros(200, 1, 32, 32)
    patches = patchify(images, (8, 8))
    masks = torch.cat([method._mask(patches, batch(images, epoch))[1] for epoch in range(20)]).double()
    counts = masks.sum(dim=0)
    deviation = float(((counts - 3000) ** 2).sum() / (4000 * 0.75 * 0.25)) * 15 / 16
    assert deviation < chi2.ppf(0.999, 15)
    assert not torch.equal(masks[:200], masks[200:400]), "another epoch, another mask"


def test_an_images_mask_does_not_depend_on_its_batch() -> None:
    method, data = mae(), batch(noise(6, 1, 32, 32))
    half = replace(data, views=[data.views[0][3:]], ids=data.ids[3:])
    assert torch.equal(hidden_of(method, data)[3:], hidden_of(method, half))


def test_the_embedding_is_the_mean_of_the_visible_tokens() -> None:
    method, data = mae(BackboneConfig(name="test_vit4", patch=8)), batch(noise(3, 1, 32, 32))
    keep_ids = method._mask(patchify(data.views[0], (8, 8)), data)[0]
    tokens, _ = method._predict(data.views[0], keep_ids)
    assert tokens.shape == (3, 1 + 4, 96), "a register, then the visible patches"
    torch.testing.assert_close(method.loss(data)["embeddings"], tokens[:, 1:].mean(dim=1))


@pytest.mark.parametrize("settings", [{}, {"norm_pix": False}, {"foreground": True}])
@pytest.mark.parametrize("level", [-2.0, 0.0, 0.1, 1e4])
def test_flat_images_are_finite(settings: dict[str, Any], level: float) -> None:
    method = mae(**settings)
    loss = method.loss(batch(torch.full((4, 1, 32, 32), level)))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("settings", [{}, {"norm_pix": False}, {"foreground": True}])
def test_bf16_stays_within_a_hundredth(settings: dict[str, Any]) -> None:
    method, data = mae(**settings), batch(noise(8, 1, 32, 32))
    exact = method.loss(data)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method.loss(data)["loss"]
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact, rel=1e-2)


def test_targets_of_half_precision_are_normalised_in_fp32() -> None:
    patches = (100 + 1e-3 * noise(1, 4, 64)).double()  # the floor of the variance counts; half precision has none of it
    prediction, counted = torch.zeros(1, 4, 64), torch.ones(1, 4, dtype=torch.bool)
    exact = reconstruction_error(prediction.double(), patches, counted, True)
    assert 0.3 < exact < 0.7
    half = reconstruction_error(prediction.half(), patches.float(), counted, True)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=1e-2)


# First weights and their decay.


def test_first_weights_are_the_references() -> None:
    method = mae(BackboneConfig(name="vit_tiny_patch16_224", patch=8), 32)
    network: Any = method.backbone.network
    linear = {
        "patch_embed": network.patch_embed.proj.weight.flatten(1),
        "qkv": network.blocks[3].attn.qkv.weight,
        "fc2": network.blocks[11].mlp.fc2.weight,
    }
    for name, weight in linear.items():
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.97 * bound < weight.abs().max().item() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert not network.patch_embed.proj.bias.any()
    assert not network.blocks[0].attn.qkv.bias.any()
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(network.pos_embed[0, 1:], sine_cosine_positions(192, (4, 4)).float())
    assert not network.pos_embed[0, 0].any()
    assert not network.pos_embed.requires_grad
    assert torch.equal(method.decoder.decoder_pos_embed[0, 1:], sine_cosine_positions(32, (4, 4)).float())


def test_the_exported_network_carries_its_positions() -> None:
    method = mae()
    assert torch.equal(method.exported.state_dict()["pos_embed"][0, 1:], sine_cosine_positions(64, (4, 4)).float())


def test_weights_that_mean_something_stay() -> None:
    before = build(VIT, 32, 0).network.state_dict()
    method = mae(pretrained=True)
    after = method.backbone.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert method.backbone.network.pos_embed.requires_grad
    fresh = mae().backbone.network.state_dict()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], fresh["blocks.0.attn.qkv.weight"])


def test_class_and_mask_tokens_decay_and_biases_norms_and_positions_do_not() -> None:
    method = mae()
    decayed, free = method.parameter_groups(0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0)
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decays = {names[id(parameter)] for parameter in decayed["params"]}
    stays = {names[id(parameter)] for parameter in free["params"]}
    assert {"backbone.network.cls_token", "decoder.mask_token", "decoder.decoder_pred.weight"} <= decays
    assert all(name.endswith("bias") or "norm" in name for name in stays)
    assert not any(name.endswith("bias") or "norm" in name for name in decays)
    assert set(names.values()) - decays - stays == {"backbone.network.pos_embed"}


# Foreground.


def half_flat(count: int = 6) -> torch.Tensor:
    images = noise(count, 1, 32, 32)
    images[:, :, :, :16] = -2.0  # the left half, patches of columns 0 and 1
    return images


def test_flat_patches_have_no_loss_and_the_ratio_holds_for_the_others() -> None:
    method, data = mae(foreground=True), batch(half_flat())
    _, gradient = predictions(method, data)
    reached = (gradient.abs().amax(dim=2) > 0).view(6, 4, 4)
    assert not reached[:, :, :2].any()
    assert (reached[:, :, 2:].sum(dim=(1, 2)) == 6).all(), "6 of 8"
    outputs = method.loss(data)
    assert outputs["foreground"].item() == pytest.approx(0.5), "6 of the 12 hidden patches"


def test_each_image_counts_alike_however_much_it_shows() -> None:
    images = noise(2, 1, 32, 32)
    images[1, :, :, :24] = 0.0
    method, data = mae(foreground=True), batch(images)
    alone = [method.loss(replace(data, views=[images[[row]]], ids=data.ids[[row]]))["loss"].item() for row in range(2)]
    assert method.loss(data)["loss"].item() == pytest.approx(sum(alone) / 2)


def test_an_image_that_shows_nothing_has_no_loss_and_no_gradient() -> None:
    method = mae(foreground=True)
    loss = method.loss(batch(torch.full((3, 1, 32, 32), 0.7)))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


def test_without_flat_patches_the_knob_changes_nothing() -> None:
    data = batch(noise(4, 1, 32, 32))
    assert torch.equal(mae(foreground=True).loss(data)["loss"], mae().loss(data)["loss"])


# Pictures.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures_show_original_masked_and_restored(
    channels: int, norm_pix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = mae(BackboneConfig(name="test_vit", patch=8, in_chans=channels), (32, 48), norm_pix=norm_pix)
    data = batch(3 + 0.5 * noise(10, channels, 32, 48))
    hidden = hidden_of(method, data)[:8].view(8, 1, 4, 6).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    patches = patchify(data.views[0][:8], (8, 8))
    perfect = (patches - patches.mean(2, True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt() if norm_pix else patches
    monkeypatch.setattr(method, "_predict", lambda *_: (None, perfect))
    pictures = method.pictures(data)
    originals = data.views[0][:8]
    assert pictures.shape == (8, 3, channels, 32, 48)
    assert torch.equal(pictures[:, 0], originals)
    middle = (originals.amin((1, 2, 3), True) + originals.amax((1, 2, 3), True)) / 2
    assert torch.equal(pictures[:, 1], torch.where(hidden, middle, originals))
    torch.testing.assert_close(pictures[:, 2], originals)
    monkeypatch.setattr(method, "_predict", lambda *_: (None, 0 * perfect))
    restored = method.pictures(data)[:, 2]
    assert torch.equal(torch.where(hidden, 0, restored), torch.where(hidden, 0, originals)), (
        "the visible is shown as is"
    )
    means = patchify(restored, (8, 8)).mean(dim=2)[hidden_of(method, data)[:8]]
    expected = patches.mean(dim=2)[hidden_of(method, data)[:8]] if norm_pix else torch.zeros_like(means)
    torch.testing.assert_close(means, expected)


# Settings, views, refusals.


def test_the_view_keeps_the_modalitys_geometry_and_the_true_intensities() -> None:
    for modality in MODALITIES.values():
        (view,) = mae().views(modality)
        for knob, field in type(view).model_fields.items():
            assert getattr(view, knob) == (getattr(modality.view, knob) if knob in GEOMETRY else field.default)


def test_settings_of_views_that_do_nothing_are_named() -> None:
    method, xray = mae(), MODALITIES["xray"]
    assert method.notes(xray, course(64)) == []
    assert method.notes(with_views(xray, {"crop": [0.2, 1.0], "rotate": 0}), course(64)) == []
    (note,) = method.notes(with_views(xray, {"blur": 0.5, "noise": 0.1}), course(64))
    assert "views.blur, views.noise" in note


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        (
            {"decoder_width": 100, "decoder_heads": 16},
            "decoder_width is 100; allowed with decoder_heads: multiples of 16",
        ),
        ({"decoder_width": 30, "decoder_heads": 3}, "decoder_width is 30; allowed with sine-cosine .*: multiples of 4"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MAEConfig(**settings)


@pytest.mark.parametrize(
    ("backbone", "settings", "said"),
    [
        ({"name": "test_resnet"}, {}, "mae needs a vision transformer.*test_resnet is none"),
        ({"name": "test_vit", "patch": 8}, {"mask_ratio": 0.95}, "leaves none of 4 x 4 patches"),
    ],
)
def test_what_mae_cannot_take_is_refused_in_words(
    backbone: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        mae(BackboneConfig.model_validate(backbone), 32, **settings)
    assert len(str(caught.value).splitlines()) <= 6


def test_the_defaults_are_the_papers() -> None:
    assert MAEConfig().model_dump() == {
        "name": "mae",
        "mask_ratio": 0.75,
        "norm_pix": True,
        "decoder_width": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
        "foreground": False,
    }
