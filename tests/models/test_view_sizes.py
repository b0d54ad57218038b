"""A network that also takes smaller views is the same network; one batch for each size."""

from typing import Any

import pytest
import timm
import torch

from sslmed.config import UsageError
from sslmed.image_size import ImageSize
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.token_encoder import TokenEncoder
from sslmed.models.view_sizes import accept_scale, of_each_view

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "fixed size": {"name": "vit_tiny_patch16_224", "patch": 8},
    "fixed size, mean": {"name": "vit_tiny_patch16_224", "patch": 8, "pool": "avg"},
    "dynamic size": {"name": "test_vit", "patch": 8},
    "register without class token": {"name": "test_vit4", "patch": 8},
    "two class tokens": {"name": "deit_tiny_distilled_patch16_224", "patch": 8},
    "rotary positions alone": {"name": "vit_tiny_patch16_dinov3_qkvb", "patch": 8},
    "rotary positions of each block": {"name": "vit_small_patch16_rope_mixed_ape_224", "patch": 8},
}
SIZE = (32, 48)


@pytest.mark.parametrize("settings", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_whole_images_names_and_weights_stay_to_the_bit(settings: dict[str, Any]) -> None:
    config = BackboneConfig.model_validate(settings)
    before, after = build(config, SIZE, 0).eval(), build(config, SIZE, 0).eval()
    accept_scale(after, 0.5)
    images, parts = torch.randn(2, 1, *SIZE), torch.randn(2, 1, 16, 24)
    with torch.no_grad():
        assert torch.equal(before(images), after(images))
        assert torch.equal(before.maps(images)[0], after.maps(images)[0])
        encoders = [TokenEncoder(each, "ibot") for each in (before, after)]
        tokens = [encoder.encode(encoder.embed(images)) for encoder in encoders]
        assert torch.equal(*tokens)
        assert after(parts).shape == (2, after.num_features)
        assert after.maps(parts)[0].shape[2:] == (2, 3)
    old, new = before.network.state_dict(), after.network.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_smaller_views_give_what_timms_dynamic_size_gives() -> None:
    backbone = build(BackboneConfig(name="vit_tiny_patch16_224", patch=8), 32, 0).eval()
    accept_scale(backbone, 0.5)
    options = {"in_chans": 1, "num_classes": 0, "patch_size": 8, "img_size": 32}
    reference = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    reference.load_state_dict(backbone.network.state_dict())
    images = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(backbone(images), reference(images))


@pytest.mark.parametrize(
    ("name", "size", "wanted", "found"),
    [
        ("vit_tiny_patch16_224", 96, 96 / 224, 5 / 12),
        ("vit_tiny_patch16_224", 32, 96 / 224, 2 / 4),
        ("vit_tiny_patch16_224", 32, 0.01, 1 / 4),
        ("vit_tiny_patch16_224", (32, 48), 0.4, 1 / 2),  # 4 x 6 patches
        ("vit_tiny_patch16_224", (32, 40), 0.4, 1.0),  # 4 x 5 patches: no smaller view of whole ones
        ("test_resnet", 96, 96 / 224, 96 / 224),
    ],
)
def test_a_transformers_views_are_whole_patches(name: str, size: ImageSize, wanted: float, found: float) -> None:
    patch = 8 if "vit" in name else None
    assert accept_scale(build(BackboneConfig(name=name, patch=patch), size, 0), wanted) == found


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_networks_of_one_size_are_refused_in_words(name: str) -> None:
    backbone = build(BackboneConfig(name=name), 224, 0)
    with pytest.raises(UsageError, match=f"{name} .* size of images.*method.local_views=0"):
        accept_scale(backbone, 0.5)


def test_views_of_a_size_go_through_together_and_come_out_in_order() -> None:
    seen: list[tuple[int, ...]] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))

    views = [torch.randn(3, 2, side, side) for side in (8, 8, 4, 4, 4)]
    found = of_each_view(network, views)
    assert seen == [(6, 2, 8, 8), (9, 2, 4, 4)]
    assert found.shape == (5, 3, 2)
    for view, each in zip(views, found, strict=True):
        torch.testing.assert_close(each, view.mean(dim=(2, 3)))
