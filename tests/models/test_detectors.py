"""Where places lie, what their boxes are, and how the levels of a pyramid meet."""

import math

import pytest
import torch

from sslmed.models.backbones import BackboneConfig, Level, build
from sslmed.models.detectors import Detector, FeaturePyramid


def maps_of(levels: list[Level], side: int) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(0)
    return [torch.randn(2, level.channels, *[math.ceil(side / level.stride)] * 2, generator=stream) for level in levels]


LEVELS = [Level(3, 2), Level(4, 4), Level(6, 8), Level(5, 16)]


def test_places_lie_row_by_row_in_the_middles_of_cells() -> None:
    detector = Detector(LEVELS, classes=3, width=8, depth=1)
    places = detector([each[..., :-1] for each in maps_of(LEVELS, 48)])  # one column less than rows
    expected = [
        ((column + 0.5) * stride, (row + 0.5) * stride, stride)
        for stride in (4.0, 8.0, 16.0)
        for row in range(int(48 // stride))
        for column in range(int(48 // stride) - 1)
    ]
    assert torch.cat([places.centres, places.strides[:, None]], dim=1).tolist() == [list(each) for each in expected]
    assert places.classes.shape == (2, len(expected), 3)
    assert places.boxes.shape == (2, len(expected), 4)
    assert places.central.shape == (2, len(expected))
    assert places.finest.shape == (2, 8, 12, 11)


def test_a_box_is_so_many_strides_from_its_place_and_each_level_has_its_scale() -> None:
    detector = Detector(LEVELS, classes=1, width=8, depth=0)
    with torch.no_grad():
        detector.distances.weight.zero_()
        detector.distances.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 2.0]))
        detector.scales.copy_(torch.tensor([1.0, 0.5, 2.0]))
        places = detector(maps_of(LEVELS, 32))
    for stride, scale in ((4, 1.0), (8, 0.5), (16, 2.0)):
        own = places.strides == stride
        away = [stride * math.exp(scale * each) for each in (0.0, 1.0, -1.0, 2.0)]
        signed = torch.tensor([-away[0], -away[1], away[2], away[3]])
        expected = places.centres[own].repeat(1, 2) + signed
        torch.testing.assert_close(places.boxes[0, own], expected)


@pytest.mark.parametrize("extreme", [-1e6, 1e6, -math.inf, math.inf])
def test_boxes_have_an_area_whatever_the_network_says(extreme: float) -> None:
    detector = Detector(LEVELS, classes=1, width=8, depth=0)
    with torch.no_grad():
        detector.distances.bias.fill_(extreme)
        wide = [torch.zeros(1, level.channels, 1, int(8192 // level.stride)) for level in LEVELS]
        places = detector(wide)  # far from the corner numbers are coarser
    sides = places.boxes[..., 2:] - places.boxes[..., :2]
    assert (sides > 0).all()
    assert torch.isfinite(places.boxes).all()
    assert sides.max() <= 2 * 16 * math.exp(6) * 1.001


def test_before_training_a_place_has_a_class_with_a_probability_of_one_in_a_hundred() -> None:
    torch.manual_seed(0)
    detector = Detector(LEVELS, classes=3, width=16, depth=2)
    with torch.no_grad():
        chance = detector(maps_of(LEVELS, 64)).classes.sigmoid()
    assert chance.mean().item() == pytest.approx(0.01, rel=0.1)


def test_fine_levels_are_left_aside_and_coarse_ones_are_added() -> None:
    pyramid = FeaturePyramid(LEVELS, width=8)
    assert pyramid.strides == [4.0, 8.0, 16.0]
    maps = maps_of(LEVELS, 64)
    before = pyramid(maps)
    for changed, reached in ((0, set()), (1, {0}), (2, {0, 1}), (3, {0, 1, 2})):
        other = [each + (number == changed) for number, each in enumerate(maps)]
        after = pyramid(other)
        assert {at for at in range(3) if not torch.equal(before[at], after[at])} == reached


def test_a_network_with_one_coarse_level_has_places_all_the_same() -> None:
    alone = FeaturePyramid([Level(4, 1), Level(4, 2)], width=8)
    assert alone.strides == [2.0]
    assert FeaturePyramid([Level(4, 3.5)], width=8).strides == [3.5]


@pytest.mark.parametrize(
    ("network", "strides"),
    [("test_resnet", [4, 8, 16, 32]), ("test_convnext", [4, 8, 16, 32]), ("test_vit", [4, 8, 16, 32])],
)
def test_the_levels_of_real_networks(network: str, strides: list[int]) -> None:
    backbone = build(BackboneConfig(name=network), 64, 0).eval()
    detector = Detector(backbone.levels, classes=2, width=8, depth=1).eval()
    assert detector.pyramid.strides == strides
    images = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = detector(backbone.maps(images))
        alone = [detector(backbone.maps(each[None])) for each in images]
    assert together.classes.shape == (2, 256 + 64 + 16 + 4, 2)
    for name in ("classes", "boxes", "central"):  # whatever else is in the batch
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(each, name) for each in alone]), rtol=1e-4, atol=1e-4
        )


def test_what_is_seen_at_a_place_is_told_there() -> None:
    """A map that is bright in one cell alone raises the answer of the place there most, at every level."""
    detector = Detector(LEVELS, classes=1, width=8, depth=0)
    with torch.no_grad():
        for layer in (*detector.pyramid.sideways, *detector.pyramid.smooth, detector.classes):
            layer.weight.fill_(0.1)
            layer.bias.zero_()
        for number, (stride, offset, cells) in enumerate(((4, 0, 16), (8, 256, 8), (16, 320, 4)), start=1):
            maps = [torch.zeros_like(each) for each in maps_of(LEVELS, 64)]
            row, column = cells // 2, cells - 2
            maps[number][:, :, row, column] = 1
            places = detector(maps)
            own = places.classes[0, offset : offset + cells**2, 0]
            best = own.argmax().item()
            assert best == row * cells + column
            assert places.centres[offset + best].tolist() == [(column + 0.5) * stride, (row + 0.5) * stride]
