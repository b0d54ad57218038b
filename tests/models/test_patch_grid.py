"""Patches lie where they should, with room between them, and say nothing of brightness; too small ones are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.config import UsageError
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.patch_grid import FLAT, PatchGrid, features, standardised, takes

JIGSAW, DOERSCH = PatchGrid(0.0, 21 / 85), PatchGrid(34 / 144, 14 / 144)


def images(count: int, channels: int, *size: int) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(0))


def test_patches_have_the_sides_of_the_references() -> None:
    assert JIGSAW.patch((255, 255)) == (64, 64), "VISSL: cells of 85, patches of 64, moved by up to 21"
    assert DOERSCH.patch((432, 432)) == (96, 96), "the paper: 96, 48 apart, moved by 7 either way"
    assert (JIGSAW.patch((96, 96)), DOERSCH.patch((96, 48))) == ((24, 24), (21, 10))


@settings(max_examples=60, deadline=None)
@given(st.integers(24, 300), st.integers(24, 300), st.floats(0, 0.25), st.floats(0, 0.25), st.integers(0, 1000))
def test_neighbours_are_apart_by_the_gap_and_at_most_twice_the_jitter_more(
    height: int, width: int, gap: float, jitter: float, seed: int
) -> None:
    grid = PatchGrid(gap, jitter)
    corners = grid.corners(seed, 0, torch.arange(8), (height, width), "x").view(8, 3, 3, 2)
    for axis, side in enumerate((height, width)):
        cell, patch = side // 3, grid.patch((height, width))[axis]
        least, room = round(gap * cell), round(jitter * cell)
        assert patch == cell - least - room
        starts = corners[..., axis] if axis == 1 else corners[..., axis].transpose(1, 2)
        apart = starts.diff(dim=2) - patch
        assert apart.min() >= least
        assert apart.max() <= least + 2 * room
        assert starts.min() >= 0
        assert starts.max() + patch <= side


def test_every_offset_comes_alike_whatever_the_rest_of_the_batch() -> None:
    corners = JIGSAW.corners(0, 0, torch.arange(400), (96, 96), "x")
    moved = corners - corners.amin(dim=0)
    counts = np.bincount(moved.flatten(), minlength=9)
    assert len(counts) == 9, "from 0 to 8 pixels"
    assert counts.min() > 0.8 * 800
    assert torch.equal(JIGSAW.corners(0, 0, torch.tensor([7, 3]), (96, 96), "x"), corners[[7, 3]])
    for other in ((1, 0, "x"), (0, 1, "x"), (0, 0, "y")):
        assert not torch.equal(JIGSAW.corners(*other[:2], torch.arange(400), (96, 96), other[2]), corners)


def test_patches_are_cut_row_by_row_where_the_corners_say() -> None:
    pictures, ids = images(4, 2, 96, 66), torch.tensor([5, 9, 2, 30])
    corners, (p, q) = JIGSAW.corners(3, 1, ids, (96, 66), "x"), JIGSAW.patch((96, 66))
    patches = JIGSAW.cut(pictures, 3, 1, ids, "x")
    assert patches.shape == (4, 9, 2, p, q)
    for n in range(4):
        for place in range(9):
            top, left = corners[n, place].tolist()
            assert place // 3 == top // 32
            assert place % 3 == left // 22
            torch.testing.assert_close(patches[n, place], standardised(pictures[n, :, top : top + p, left : left + q]))


def test_without_gap_and_jitter_the_cells_are_the_whole_image() -> None:
    pictures = images(2, 1, 48, 96)
    patches = PatchGrid(0, 0).cut(pictures, 0, 0, torch.arange(2), "x")
    cells = pictures.unflatten(2, (3, 16)).unflatten(4, (3, 32)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    torch.testing.assert_close(patches, standardised(cells))


def test_a_patch_says_nothing_of_brightness_and_contrast() -> None:
    patches = images(3, 2, 24, 24)
    flat = standardised(patches)
    assert flat.mean(dim=(2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(flat.std(dim=(2, 3), correction=0), torch.ones(3, 2))
    scale = torch.tensor([0.5, 3.0])[:, None, None]
    torch.testing.assert_close(standardised(scale * patches - 2 * scale), flat, msg="each channel by itself")


def test_flat_patches_stay_flat() -> None:
    for level in (0.0, -2.0, 1e4):
        assert torch.equal(standardised(torch.full((1, 1, 8, 8), level)), torch.zeros(1, 1, 8, 8))
    faint = 0.01 * images(1, 1, 24, 24)
    assert standardised(faint).std().item() == pytest.approx(0.01 / FLAT, rel=0.1), "noise is not blown up"


def test_features_are_those_of_each_patch() -> None:
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0).eval()
    patches = images(3 * 9, 1, 8, 8).unflatten(0, (3, 9))
    with torch.no_grad():
        found = features(backbone, patches)
        torch.testing.assert_close(found[1, 4], backbone(patches[1, 4][None])[0])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_images_with_patches_too_small_are_refused_with_the_least_size_that_will_do(name: str) -> None:
    backbone = build(BackboneConfig(name=name), 96, 0)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UsageError, match=rf"jigsaw cuts images of 24 x 24.*too small for {name}") as caught:
        JIGSAW.check(backbone, (1, 24, 24), "jigsaw")
    least = int(str(caught.value).partition("data.size=")[2].split()[0])
    JIGSAW.check(backbone, (1, least, least), "jigsaw")
    assert not takes(backbone, 1, JIGSAW.patch((least - 1, least - 1)))
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    assert all(part.training for part in backbone.modules())


def test_a_network_of_one_size_is_refused_in_words() -> None:
    backbone = build(BackboneConfig(name="vit_tiny_patch16_224"), 96, 0)
    with pytest.raises(UsageError, match=r"vit_tiny_patch16_224 is built for whole images of one size; take") as caught:
        DOERSCH.check(backbone, (1, 96, 96), "relative_position")
    assert "resnet18" in str(caught.value)
