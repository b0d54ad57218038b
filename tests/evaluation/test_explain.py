"""Grad-CAM against its closed form, and in the place where it must look; overlays by value."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslmed.config import UsageError
from sslmed.evaluation.explain import LABEL_COLOURS, heat_maps, overlay_boxes, overlay_heat, overlay_labels
from sslmed.models.backbones import Backbone, BackboneConfig, build

SIDE, BLOB, STEPS = 128, 24, 50
NAMES = ["test_resnet", "tf_efficientnet_lite0", "convnext_atto", "swin_tiny_patch4_window7_224"]
TOKENS: dict[str, dict[str, Any]] = {
    "class token": {"name": "test_vit", "patch": 8},
    "mean": {"name": "test_vit", "patch": 8, "pool": "avg"},
    "registers, rotary positions": {"name": "vit_tiny_patch16_dinov3_qkvb", "patch": 8},
}


def mixed(features: torch.Tensor) -> torch.Tensor:
    return features @ torch.linspace(1, -0.5, features.shape[1])


@pytest.mark.parametrize("name", ["test_resnet", "swin_tiny_patch4_window7_224", "test_vit"])
def test_closed_form_of_pooling_and_a_linear_layer(name: str) -> None:
    """Y = w . mean(A): dY/dA = w / (h w) everywhere, and L = ReLU(sum_k w_k A_k) / (h w)."""
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name=name, pool="avg" if name == "test_vit" else None), 64, 0).eval()
    network: Any = backbone.network
    images, weights = torch.randn(3, 1, 64, 64), torch.rand(backbone.num_features) - 0.3
    with torch.no_grad():
        found = network.forward_features(images)
        if name.startswith("swin"):
            found = found.permute(0, 3, 1, 2)
        if name == "test_vit":
            network.fc_norm = nn.Identity()
            found = found[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        expected = F.relu(torch.einsum("k,nkhw->nhw", weights, found)) / found[0, 0].numel()
        expected = F.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0]
        assert expected.any()
        expected = expected / expected.amax(dim=(1, 2), keepdim=True)
    assert torch.allclose(heat_maps(backbone, lambda features: features @ weights, images), expected, atol=1e-4)


@pytest.mark.parametrize("settings", [*({"name": name} for name in NAMES), *TOKENS.values()], ids=[*NAMES, *TOKENS])
def test_values_and_what_stays_as_it_was(settings: dict[str, Any]) -> None:
    backbone = build(BackboneConfig.model_validate(settings), (64, 96), 0)
    backbone.freeze(2)
    backbone.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    flags = [module.training for module in backbone.modules()]
    images = torch.randn(2, 1, 64, 96)
    heat = heat_maps(backbone, mixed, images)
    assert heat.shape == (2, 64, 96)
    assert heat.dtype == torch.float32
    assert not heat.requires_grad
    assert torch.equal(heat.amax(dim=(1, 2)), torch.ones(2)), "a class token too has a gradient there"
    assert heat.min() >= 0
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert [module.training for module in backbone.modules()] == flags
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    each = torch.cat([heat_maps(backbone, mixed, image[None]) for image in images])
    assert torch.allclose(each, heat, atol=1e-4), "an image's map does not depend on the others"
    with torch.inference_mode():
        assert torch.allclose(heat_maps(backbone, mixed, images + 0), heat, atol=1e-5)
        assert not torch.is_grad_enabled()


def test_closed_form_of_a_class_token() -> None:
    """The last block's attention as its formula has it, its norms and its perceptron left out.

    The class token then leaves as x_0 + sum_j a_j V x_j, a = softmax_j(q . k_j), and Y = w . that. With q = 0 all
    attend alike, to each of the L tokens: dY/dx_j = V^T w / L.
    """
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name="test_vit"), 64, 0).eval()
    network: Any = backbone.network
    block, width = network.blocks[-1], network.embed_dim
    with torch.no_grad():
        block.attn.qkv.weight[: 2 * width] = 0
        block.attn.qkv.bias.zero_()
        block.attn.proj.weight.copy_(torch.eye(width))
        block.attn.proj.bias.zero_()
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
    network.norm = nn.Identity()
    weights, images = torch.randn(width), torch.randn(2, 1, 64, 64)
    entering: list[torch.Tensor] = []
    block.norm1.register_forward_hook(lambda _, __, tokens: entering.append(tokens))
    heat = heat_maps(backbone, lambda features: features @ weights, images)
    slope = block.attn.qkv.weight[2 * width :].T @ weights / 17
    expected = F.relu(entering[0][:, 1:] @ slope).reshape(2, 1, 4, 4).detach()
    expected = F.interpolate(expected, (64, 64), mode="bilinear")[:, 0]
    assert torch.allclose(heat, expected / expected.amax(dim=(1, 2), keepdim=True), atol=1e-4)


def test_gradients_of_weights_are_left_alone() -> None:
    backbone = build(BackboneConfig(name="test_resnet"), 64, 0)
    heat_maps(backbone, mixed, torch.randn(1, 1, 64, 64))
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_map_that_is_zero_everywhere_stays_zero() -> None:
    backbone = build(BackboneConfig(name="test_resnet"), 64, 0)
    assert not heat_maps(backbone, lambda features: -features.sum(dim=1), torch.randn(2, 1, 64, 64)).any()


class _Pooling(nn.Module):
    num_features = 4


def test_a_network_without_places_is_refused() -> None:
    with pytest.raises(UsageError, match="no heat maps of _Pooling"):
        heat_maps(Backbone(_Pooling()), mixed, torch.randn(1, 1, 64, 64))
    with pytest.raises(UsageError, match="no heat maps of MultiScaleVit"):
        heat_maps(build(BackboneConfig(name="mvitv2_tiny"), 64, 0), mixed, torch.randn(1, 1, 64, 64))


class _Blobs(nn.Module):
    """Tells images with a bright blob somewhere from images without."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone: Backbone = build(BackboneConfig.model_validate(settings), SIDE, 0)
        self.head = nn.Linear(self.backbone.num_features, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.backbone(images))
        return answer[:, 0]


def blobs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, whether there is a blob, and its corner."""
    present, corner = torch.rand(count) < 0.5, torch.randint(0, SIDE - BLOB, (count, 2))
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE)
    for image, there, (row, column) in zip(images, present, corner.tolist(), strict=True):
        image[0, row : row + BLOB, column : column + BLOB] += 2.0 * there
    return images, present, corner


BLOB_FINDERS: dict[str, dict[str, Any]] = {"CNN": {"name": "test_resnet"}, "ViT": {"name": "test_vit", "pool": "avg"}}


@pytest.mark.parametrize("settings", BLOB_FINDERS.values(), ids=BLOB_FINDERS)
def test_it_shows_the_blob_that_decides(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = _Blobs(settings).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / STEPS)
        images, present, _ = blobs(16)
        loss = F.binary_cross_entropy_with_logits(model(images), present.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, present, corner = blobs(64)
    assert ((model.eval()(images) > 0) == present).float().mean() > 0.95, "it has learnt"
    heat = heat_maps(model.backbone, lambda features: model.head(features)[:, 0], images[present])
    hottest = heat.flatten(1).argmax(dim=1)
    places = torch.stack([hottest // SIDE, hottest % SIDE], dim=1)
    reach = BLOB // 2 + 16  # half the blob and half a cell of the coarsest map
    near = ((places - (corner[present] + BLOB // 2)).abs() <= reach).all(dim=1)
    assert near.float().mean() > 0.85


def test_overlay_of_heat() -> None:
    pixels = np.array([[0.0, 0.5], [1.0, 0.2]])
    picture = overlay_heat(pixels, np.array([[0.0, 0.0], [0.0, 1.0]]))
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 2, 3)
    assert picture[0, 0].tolist() == [0, 0, 0]
    assert picture[0, 1].tolist() == [128, 128, 128]
    assert picture[1, 0].tolist() == [255, 255, 255]
    assert picture[1, 1].tolist() == [round(0.4 * 51 + 0.6 * each) for each in (255, 255, 160)]
    colour = np.random.default_rng(0).random((4, 5, 3))
    assert np.array_equal(overlay_heat(colour, np.zeros((4, 5))), np.rint(colour * 255).astype(np.uint8))


def test_overlay_of_labels() -> None:
    labels = np.zeros((9, 9), np.uint8)
    labels[2:7, 2:7] = 1
    labels[0, 0], labels[8, 8], labels[0, 8] = 255, 8, 2
    picture = overlay_labels(np.full((9, 9), 0.4), labels)
    assert picture[2, 2].tolist() == list(LABEL_COLOURS[0]), "an outline in full colour"
    assert picture[4, 4].tolist() == [round(0.75 * 102 + 0.25 * each) for each in LABEL_COLOURS[0]], "a light fill"
    assert picture[1, 4].tolist() == [102, 102, 102], "the outline lies inside"
    assert picture[0, 0].tolist() == [102, 102, 102], "255 is no class"
    assert picture[8, 8].tolist() == list(LABEL_COLOURS[0]), "colours repeat"
    assert picture[0, 8].tolist() == list(LABEL_COLOURS[1])


@pytest.mark.parametrize("shape", [(4, 5), (5, 4, 3), (4, 4, 4), (4, 4, 1), (4,)])
def test_pixels_that_do_not_fit_what_lies_over_them(shape: tuple[int, ...]) -> None:
    for overlay in (overlay_heat, overlay_labels):
        with pytest.raises(ValueError, match=r"pixels \(H, W\)"):
            overlay(np.zeros(shape), np.zeros((4, 4), np.uint8))


def test_overlay_of_boxes() -> None:
    boxes, classes = np.array([[2.4, 3.4, 7.6, 9.0], [4, 5, 9, 10]]), np.array([1, 7])
    picture = overlay_boxes(np.full((12, 11), 0.4), boxes, classes)
    first, second, grey = list(LABEL_COLOURS[1]), list(LABEL_COLOURS[0]), [102, 102, 102]
    expected = np.full((12, 11, 3), 102)
    expected[5:10, 4:9] = second  # colours repeat
    expected[6:9, 5:8] = grey
    inside = expected[4:8, 3:7].copy()
    expected[3:9, 2:8] = first  # the first on top
    expected[4:8, 3:7] = inside
    np.testing.assert_array_equal(picture, expected)
    none = overlay_boxes(np.full((12, 11, 3), 0.4), np.empty((0, 4)), np.empty(0, np.int16))
    assert (none == 102).all(), "the image as it is"


def test_outlines_grow_with_the_image_and_stay_inside_it() -> None:
    picture = overlay_boxes(np.zeros((300, 900)), np.array([[-5, 100, 400, 290], [10, 10, 10.2, 11]]), np.zeros(2))
    coloured = picture.any(axis=2)
    assert coloured[100:103, :400].all()
    assert coloured[287:290, :400].all()
    assert coloured[100:290, :3].all()
    assert not coloured[103:287, 3:397].any()
    assert coloured[10, 10], "a box under a pixel is a dot"
    assert coloured.sum() == 190 * 400 - 184 * 394 + 1


def test_words_stand_above_their_box() -> None:
    picture = overlay_boxes(np.full((60, 80), 0.4), np.array([[10, 20, 30, 40]]), np.zeros(1), ["I1"])
    strip = picture[13:20, 10:19]
    letters = ["000000000", "011100100", "001001100", "001000100", "001000100", "011101110", "000000000"]
    lit = np.array([[dot == "1" for dot in row] for row in letters])
    np.testing.assert_array_equal(strip, lit[..., None] * np.array(LABEL_COLOURS[0]))
    assert (picture[:13] == 102).all()
    assert (picture[13:20, 19:] == 102).all()
    lower = overlay_boxes(np.full((60, 80), 0.4), np.array([[10, 20, 30, 40]]), np.zeros(1), ["i1"])
    np.testing.assert_array_equal(lower, picture)


def test_words_without_room_above_or_beside() -> None:
    words = ["é", "ß" * 40]
    picture = overlay_boxes(np.full((60, 80), 0.4), np.array([[70, 2, 79, 40], [78, 40, 80, 59]]), np.zeros(2), words)
    assert picture.shape == (60, 80, 3)
    question = np.array([[dot == "1" for dot in row] for row in ("00000", "01100", "00010", "00100", "00000", "00100")])
    np.testing.assert_array_equal(picture[40:46, 70:75].any(axis=2), question)  # below
    assert not picture[33, :70].any(), "the strip of a long word begins at the left edge"
    tall = overlay_boxes(np.full((60, 80), 0.4), np.array([[10, 2, 40, 58]]), np.zeros(1), ["E"])
    assert tall[3:8, 11].all(axis=0).tolist() == [True, True, False], "in the upper edge"


def test_every_letter_is_another() -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,-_+/:()%? "
    seen = {}
    for letter in letters:
        picture = overlay_boxes(np.zeros((40, 40)), np.array([[10, 20, 30, 30]]), np.zeros(1), [letter])
        seen[letter] = picture[13:20, 10:15].tobytes()
    assert len(set(seen.values())) == len(letters) - 1, "O and 0 alone are alike"
