"""Models Genesis: each of the four damages by itself, all of them together, and their undoing."""

import numpy as np
import pytest
import torch
from restorations import HELD_OUT, batch, noise, small, trained, waves

from sslmed.methods.models_genesis import BLOCKS, ModelsGenesisConfig, painted
from sslmed.models.corruptions import unit_range

NONE = {"curve": 0.0, "shuffle": 0.0, "paint": 0.0}


def damaged(images: torch.Tensor, **settings: float) -> torch.Tensor:
    found: torch.Tensor = small("models_genesis", **(NONE | settings)).corrupted(batch(images))
    return found


def test_the_defaults_are_the_references() -> None:
    config = ModelsGenesisConfig()
    assert (config.curve, config.shuffle, config.paint, config.inner) == (0.9, 0.5, 0.9, 0.2)


def test_nothing_is_nothing() -> None:
    images = noise(4, 2, 20, 30)
    torch.testing.assert_close(damaged(images), images, atol=1e-6, rtol=1e-6)


def test_shuffling_keeps_the_histogram_exactly_and_moves_pixels_a_tenth_of_the_side() -> None:
    images = torch.arange(6 * 40 * 50.0).view(6, 1, 40, 50) % 997
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 1000
    unit, *_ = unit_range(images)
    found, *_ = unit_range(damaged(images, shuffle=1.0))
    assert torch.equal(found.flatten(1).sort().values, unit.flatten(1).sort().values)
    assert (found != unit).float().mean() > 0.7
    bright = torch.zeros(40, 1, 40, 50)
    bright[:, 0, 20, 25] = 1
    places = damaged(bright, shuffle=1.0).flatten(1).argmax(dim=1)
    down, across = (places // 50 - 20).abs(), (places % 50 - 25).abs()
    assert 0 < down.max() < 4
    assert 0 < across.max() < 5


def test_curves_keep_or_turn_the_order_of_grey_values_half_of_the_time() -> None:
    images = noise(200, 1, 8, 8)
    found = damaged(images, curve=1.0)
    inverted = 0
    for before, after in zip(images.flatten(1), found.flatten(1), strict=True):
        steps = after[before.argsort()].diff()
        assert (steps >= -1e-5).all() or (steps <= 1e-5).all(), "monotone"
        inverted += int(after[before.argmin()] > after[before.argmax()])
        ends = after[before.argmin()], after[before.argmax()]
        torch.testing.assert_close(torch.stack(ends).sort().values, torch.stack([before.min(), before.max()]))
    assert 75 < inverted < 125


@pytest.mark.parametrize(
    ("settings", "expected"), [({"shuffle": 0.5}, 0.5), ({"curve": 0.9}, 0.9), ({"paint": 0.9}, 0.9)]
)
def test_as_many_images_are_damaged_as_is_asked(settings: dict[str, float], expected: float) -> None:
    images = noise(400, 1, 24, 24)
    changed = ((damaged(images, **settings) - images).abs() > 1e-4).flatten(1).any(dim=1).float().mean()
    assert changed.item() == pytest.approx(expected, abs=0.07)


def test_in_painting_hides_up_to_five_blocks_and_out_painting_keeps_one_to_five() -> None:
    draws = torch.from_numpy(np.random.default_rng(0).random((600, BLOCKS, 5)))
    for inner, side, least, most in ((True, 42, 7, 14), (False, 42, 18, 24)):
        hidden = painted(draws, torch.full((600,), inner), (side, side))
        blocks = hidden if inner else ~hidden
        assert not blocks[:, :3].any(), "a margin"
        assert not blocks[:, -3:].any()
        assert not blocks[:, :, :3].any()
        assert not blocks[:, :, -3:].any()
        alone = draws.clone()
        alone[:, 0, 0], alone[:, 1, 0] = 0.5, 0.97  # one block, and no more
        one = painted(alone, torch.full((600,), inner), (side, side))
        one = one if inner else ~one
        for axis in (1, 2):
            assert set(one.any(dim=axis).sum(dim=1).tolist()) == set(range(least, most + 1))
        several = (blocks.sum(dim=(1, 2)) > most**2).float().mean()
        assert several > 0.5
        nothing = (~blocks).all(dim=2).all(dim=1).float().mean().item()
        assert nothing == pytest.approx(0.05 if inner else 0, abs=0.03)


def test_a_fifth_of_the_paintings_is_within_the_image() -> None:
    images = torch.full((400, 1, 32, 32), 0.5)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = 0, 1
    changed = (damaged(images, paint=1.0, inner=0.2) != images).float()
    corners = changed[:, 0, 0, 3]
    assert corners.mean().item() == pytest.approx(0.8, abs=0.07), "out-painting reaches the edges"


def test_paint_is_uniform_over_the_images_own_range_and_alike_in_all_channels() -> None:
    images = torch.zeros(50, 3, 40, 40)
    images[:, :, 20] = torch.linspace(-3, 5, 40)
    found = damaged(images, paint=1.0, inner=0.0)
    border = found[:, :, :3]
    assert torch.equal(border[:, 0], border[:, 2])
    shares = torch.histc(border, 8, -3, 5) / border.numel()
    assert (shares - 1 / 8).abs().max() < 0.01


def test_all_stay_within_the_range_of_their_image() -> None:
    images = 3 + 2 * noise(200, 1, 16, 16)
    found = damaged(images, curve=0.9, shuffle=0.5, paint=0.9, inner=0.2)
    low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))
    assert (found.amin((1, 2, 3)) >= low - 1e-5).all()
    assert (found.amax((1, 2, 3)) <= high + 1e-5).all()


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 5), (9, 13), (10, 10)])
def test_images_of_fewer_than_ten_pixels_a_side(size: tuple[int, int]) -> None:
    """The reference draws a window of 1 to 0 pixels there, and fails."""
    images = noise(30, 1, *size)
    found = damaged(images, curve=0.9, shuffle=1.0, paint=0.9, inner=0.5)
    assert found.shape == images.shape
    assert torch.isfinite(found).all()


def test_it_beats_leaving_held_out_images_as_they_came() -> None:
    method, data = small("models_genesis"), batch(waves(16, seed=1), HELD_OUT)
    outputs = trained(method).loss(data)
    assert outputs["gain_db"] > 1.5
