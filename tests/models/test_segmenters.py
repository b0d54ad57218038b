"""The U-Net decoder answers at the size of the image, wherever that lies, and can learn."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from sslmed.models.backbones import Backbone, BackboneConfig, Level, build
from sslmed.models.pyramids import enlarged, neck
from sslmed.models.segmenters import UNetDecoder

CLASSES = 3


def any_size_vit() -> Backbone:
    network = timm.create_model(
        "test_vit", in_chans=1, num_classes=0, img_size=64, dynamic_img_size=True, dynamic_img_pad=True
    )
    return Backbone(network)


def segmenter(backbone: Backbone) -> torch.nn.ModuleDict:
    between = neck(backbone.levels)
    decoder = UNetDecoder(between.levels, CLASSES)
    return torch.nn.ModuleDict({"backbone": backbone, "neck": between, "decoder": decoder})


def logits_of(parts: torch.nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    maps = parts["backbone"].maps(images)  # type: ignore[operator]
    logits: torch.Tensor = parts["decoder"](parts["neck"](maps), images.shape[-2:])
    return logits


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (100, 76)])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "vit"])
def test_logits_have_the_size_of_the_image(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parts = segmenter(any_size_vit() if name == "vit" else build(BackboneConfig(name=name), 64, 0))
    logits = logits_of(parts, torch.randn(2, 1, *size))
    assert logits.shape == (2, CLASSES, *size)
    first = F.cross_entropy(logits, torch.randint(CLASSES, (2, *size)))
    assert first.item() == pytest.approx(math.log(CLASSES), abs=0.15)


@pytest.mark.parametrize(
    "levels", [neck((Level(16, 14),)).levels, (Level(8, 1), Level(8, 2)), (Level(8, 8),)], ids=["14", "1", "8"]
)
def test_levels_of_any_strides(levels: tuple[Level, ...]) -> None:
    maps = [torch.randn(1, each.channels, round(56 / each.stride), round(56 / each.stride)) for each in levels]
    assert UNetDecoder(levels, CLASSES)(maps, (56, 56)).shape == (1, CLASSES, 56, 56)


@pytest.mark.parametrize("name", ["test_resnet", "vit"])
def test_it_overfits_four_masks(name: str) -> None:
    """Discs and squares, each class of another grey."""
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    masks = torch.zeros(4, 32, 32, dtype=torch.long)
    for mask, row, column in zip(masks, (10, 20, 12, 18), (20, 12, 12, 22), strict=True):
        mask[(rows - row) ** 2 + (columns - column) ** 2 < 50] = 1
        mask[(rows - row - 4).abs().maximum((columns - column + 4).abs()) < 4] = 2
    images = (masks.float() + 0.3 * torch.randn(4, 32, 32))[:, None]
    parts = segmenter(any_size_vit() if name == "vit" else build(BackboneConfig(name=name), 32, 0)).train()
    optimizer = torch.optim.AdamW(parts.parameters(), 5e-3)
    for _ in range(60):
        loss = F.cross_entropy(logits_of(parts, images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = logits_of(parts, images).argmax(dim=1)
    for label in (1, 2):
        both = ((found == label) & (masks == label)).sum()
        assert 2 * both / ((found == label).sum() + (masks == label).sum()) > 0.9


def test_every_weight_gets_a_gradient() -> None:
    parts = segmenter(build(BackboneConfig(name="test_resnet"), 32, 0))
    F.cross_entropy(logits_of(parts, torch.randn(4, 1, 32, 32)), torch.randint(CLASSES, (4, 32, 32))).backward()
    assert all(each.grad is not None for each in parts.parameters())
    assert all(each.grad.any() for each in parts["decoder"].parameters() if each.grad is not None)


def test_a_shifted_image_gives_a_shifted_answer() -> None:
    """By a multiple of the coarsest stride, where the receptive field does not reach the border."""
    torch.manual_seed(0)
    levels = (Level(8, 2), Level(8, 4))
    decoder = UNetDecoder(levels, CLASSES).double().eval()
    maps = [torch.randn(1, each.channels, int(96 / each.stride), int(96 / each.stride)).double() for each in levels]
    moved = [torch.roll(each, int(32 / stride), dims=-1) for each, (_, stride) in zip(maps, levels, strict=True)]
    before, after = decoder(maps, (96, 96)), decoder(moved, (96, 96))
    assert before.std() > 1e-3
    assert torch.allclose(after[..., 32 + 16 : 80], before[..., 16:48], atol=1e-12)


def test_a_shifted_image_gives_a_shifted_answer_through_a_backbone() -> None:
    torch.manual_seed(0)
    parts = segmenter(build(BackboneConfig(name="test_resnet"), 64, 0)).double().eval()
    field = 128  # of nothing on every side, so that both the image and its border lie far from the border
    image = F.pad(torch.randn(1, 1, 32, 32).double(), (field, field + 32, field, field + 32))
    before, after = logits_of(parts, image), logits_of(parts, torch.roll(image, (32, 32), dims=(-2, -1)))
    inner = slice(field - 32, field + 64)
    moved = slice(field, field + 96)
    assert before[..., inner, inner].std() > 1e-3
    assert torch.allclose(after[..., moved, moved], before[..., inner, inner], atol=1e-9)


def test_an_answer_in_evaluation_mode_does_not_depend_on_the_rest_of_the_window() -> None:
    torch.manual_seed(0)
    levels = (Level(8, 2), Level(8, 4))
    decoder = UNetDecoder(levels, CLASSES).eval()
    maps = [torch.randn(1, 8, int(96 / stride), int(96 / stride)) for _, stride in levels]
    changed = [each.clone() for each in maps]
    for each in changed:
        each[..., each.shape[-1] // 2 :] += 10
    before, after = decoder(maps, (96, 96)), decoder(changed, (96, 96))
    assert torch.equal(before[..., :24], after[..., :24])
    assert not torch.equal(before[..., 48:], after[..., 48:])


def test_maps_stay_in_place_where_the_stride_does_not_divide_the_side() -> None:
    """A ramp over cell centres goes on as the same ramp, cut or continued, and is not stretched."""
    ramp = (torch.arange(4.0) + 0.5) * 2
    ramp = ramp.expand(1, 1, 4, 4)
    expected = torch.arange(8.0) + 0.5
    cut, continued = enlarged(ramp, 2, (7, 6))[0, 0], enlarged(ramp, 2, (9, 10))[0, 0]
    assert cut.shape == (7, 6)
    assert torch.allclose(cut[3, 1:], expected[1:6])
    assert continued.shape == (9, 10)
    assert torch.allclose(continued[8, 1:7], expected[1:7])
    assert torch.equal(continued[:, 8:], continued[:, 7:8].expand(9, 2))


def test_the_last_layer_keeps_its_precision_under_autocast() -> None:
    parts = segmenter(build(BackboneConfig(name="test_resnet"), 64, 0)).eval()
    images = torch.randn(1, 1, 70, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = logits_of(parts, images)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, logits_of(parts, images), atol=0.02)
