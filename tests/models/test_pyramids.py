"""A plain ViT's map becomes a pyramid of the strides that it says; other maps pass."""

import pytest
import torch

from sslmed.models.backbones import BackboneConfig, Level, build
from sslmed.models.pyramids import SimpleFeaturePyramid, Unchanged, neck


@pytest.mark.parametrize(
    ("patch", "strides"),
    [(16, (4, 8, 16, 32)), (8, (4, 8, 16, 32)), (32, (4, 8, 16, 32)), (4, (4, 8, 16, 32)), (14, (3.5, 7, 14, 28))],
)
def test_strides_are_the_nearest(patch: int, strides: tuple[float, ...]) -> None:
    pyramid = SimpleFeaturePyramid(32, patch, 24)
    assert pyramid.levels == tuple(Level(24, stride) for stride in strides)
    size = patch * 8
    maps = pyramid([torch.randn(2, 32, 8, 8)])
    assert [tuple(each.shape) for each in maps] == [(2, 24, size / each, size / each) for each in strides]


def test_halved_sides_are_rounded_up() -> None:
    assert [each.shape[-2:] for each in SimpleFeaturePyramid(16, 16, 8)([torch.randn(1, 16, 5, 1)])][-1] == (3, 1)


def test_every_weight_gets_a_gradient() -> None:
    pyramid = SimpleFeaturePyramid(16, 16, 8)
    sum((each * torch.randn_like(each)).sum() for each in pyramid([torch.randn(2, 16, 4, 4)])).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in pyramid.parameters())


def test_an_answer_depends_on_its_neighbourhood_alone() -> None:
    """A tile's answer must not change with what lies at the tile's other end, in training either."""
    pyramid = SimpleFeaturePyramid(16, 16, 8).train()
    patches = torch.randn(1, 16, 8, 8)
    changed = patches.clone()
    changed[..., 6:] += 100
    for level, before, after in zip(pyramid.levels, pyramid([patches]), pyramid([changed]), strict=True):
        same = int((6 * 16) / level.stride) - 1  # a 3x3 convolution looks one cell further
        assert torch.allclose(before[..., :same], after[..., :same], atol=1e-5)
        assert not torch.allclose(before[..., same:], after[..., same:], atol=1e-2)


def test_which_neck_a_backbone_gets() -> None:
    cnn = build(BackboneConfig(name="test_resnet"), 64, 0)
    passing = neck(cnn.levels)
    assert isinstance(passing, Unchanged)
    assert passing.levels == cnn.levels
    assert not list(passing.parameters())
    maps = cnn.maps(torch.randn(1, 1, 64, 64))
    assert all(before is after for before, after in zip(maps, passing(maps), strict=True))

    vit = build(BackboneConfig(name="test_vit"), 64, 0)
    making = neck(vit.levels)
    assert making.levels == tuple(Level(64, stride) for stride in (4, 8, 16, 32)), "no wider than the ViT"
    assert [each.shape[-1] for each in making(vit.maps(torch.randn(1, 1, 64, 64)))] == [16, 8, 4, 2]
