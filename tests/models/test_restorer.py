"""From maps back to an image: shape, features, what stays untrained, errors and gains by value."""

import math

import pytest
import torch
from torch import nn

from sslmed.config import UsageError
from sslmed.models.backbones import Backbone, BackboneConfig, build
from sslmed.models.restorer import (
    channels_of,
    gain_db,
    restoration_error,
    restored,
    unreached,
    untrained,
)
from sslmed.models.segmenters import PixelDecoder


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(name: str, channels: int = 1, size: int | tuple[int, int] = 32) -> tuple[Backbone, PixelDecoder]:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name=name, in_chans=channels), size, 0)
    return backbone, PixelDecoder(backbone.levels, channels_of(backbone))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_an_image_comes_back_in_its_size(name: str, channels: int) -> None:
    backbone, restorer = small(name, channels, (32, 48))
    images = noise(2, channels, 32, 48)
    image, features = restored(backbone, restorer, images)
    assert image.shape == images.shape
    assert features.shape == (2, backbone.levels[-1].channels)


def test_features_of_a_resnet_are_its_own_pooled_ones() -> None:
    backbone, restorer = small("test_resnet")
    backbone.eval()
    images = noise(3, 1, 32, 32)
    torch.testing.assert_close(restored(backbone, restorer, images)[1], backbone(images))


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "vit_base_patch16_siglip_224"]
)
def test_unreached_are_the_parameters_without_gradient(name: str) -> None:
    backbone, _ = small(name)
    sum(each.square().sum() for each in backbone.maps(noise(2, 1, 32, 32))).backward()  # type: ignore[union-attr]
    without = {f"backbone.network.{key}" for key, value in backbone.network.named_parameters() if value.grad is None}
    assert unreached(backbone) == without
    said = untrained(backbone, "denoising")
    assert bool(said) == bool(without)
    assert not said or f"{len(without)} tensors behind them stay as they are" in said[0]


def test_a_network_whose_first_layer_does_not_tell_is_refused() -> None:
    with pytest.raises(UsageError, match="moves pixels into channels"):
        channels_of(build(BackboneConfig(name="tresnet_m"), 64, 0))


def test_the_last_layer_is_not_reusable() -> None:
    _, restorer = small("test_resnet")
    assert restorer.state_dict().keys() - restorer.reusable.keys() == {
        "decoder.classifier.weight",
        "decoder.classifier.bias",
    }


def test_the_error_is_taken_in_fp32() -> None:
    images = noise(2, 1, 8, 8)
    found = restoration_error((images + 0.01).half(), images)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1e-4, rel=0.1)
    assert restoration_error(images.double() + 1, images.double()).dtype == torch.float64


def test_the_gain_is_the_gain_in_psnr() -> None:
    images = noise(4, 2, 8, 8)
    corrupted, image = images + noise(4, 2, 8, 8, seed=1), images + 0.1 * noise(4, 2, 8, 8, seed=2)
    peak = float(images.max() - images.min())

    def psnr(other: torch.Tensor) -> float:
        return 10 * math.log10(peak**2 / float((other - images).square().mean()))

    assert gain_db(image, corrupted, images).item() == pytest.approx(psnr(image) - psnr(corrupted), rel=1e-5)
    assert gain_db(corrupted, corrupted, images).item() == 0
    where = torch.zeros(4, 8, 8, dtype=torch.bool)
    where[:, 2:4] = True
    corrupted[:, :, 4:], image[:, :, 4:] = 9, 0  # not counted
    cut = [each[:, :, 2:4] for each in (image, corrupted, images)]
    assert gain_db(image, corrupted, images, where).item() == pytest.approx(gain_db(*cut).item(), rel=1e-5)


def test_the_gain_is_finite_where_nothing_was_corrupted_or_all_is_restored() -> None:
    images = noise(2, 1, 4, 4)
    for one, other in ((images, images + 1), (images + 1, images), (images, images)):
        assert math.isfinite(gain_db(one, other, images).item())


def test_it_restores_by_the_maps_alone() -> None:
    """A backbone that sees nothing gives the same image for all."""

    class Blind(nn.Module):
        def __init__(self, backbone: Backbone) -> None:
            super().__init__()
            self.backbone = backbone

        def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
            return [torch.zeros_like(each) for each in self.backbone.maps(images)]

    backbone, restorer = small("test_resnet")
    image, _ = restored(Blind(backbone.eval()), restorer.eval(), noise(3, 1, 32, 32))  # type: ignore[arg-type]
    assert torch.equal(image, image[:1].expand_as(image))
