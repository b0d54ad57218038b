"""Context restoration: only places are wrong, and they are found."""

import pytest
import torch
from courses import course
from restorations import HELD_OUT, batch, noise, small, trained, waves

from sslmed.config import UsageError


def test_the_histogram_is_kept_exactly_and_some_patches_moved() -> None:
    images = torch.arange(8 * 48 * 40.0).view(8, 1, 48, 40).repeat(1, 2, 1, 1)
    images[:, 1] += 0.5
    found = small("context_restoration", size=(48, 40), channels=2, swaps=6).corrupted(batch(images))
    assert torch.equal(found.flatten(2).sort().values, images.flatten(2).sort().values)
    moved = (found != images).any(dim=1)
    assert (moved.sum(dim=(1, 2)) == 2 * 6 * 6 * 5).all(), "12 patches of 6 x 5 pixels"
    assert torch.equal(found[:, 0] + 0.5, found[:, 1]), "channels move together"


def test_it_beats_leaving_held_out_images_as_they_came() -> None:
    method, data = small("context_restoration"), batch(waves(16, seed=1), HELD_OUT)
    assert method.eval().loss(data)["gain_db"] < 0
    outputs = trained(method.train()).loss(data)
    identity = (method.corrupted(data) - data.views[0]).square().mean()
    assert outputs["loss"] < 0.3 * identity
    assert outputs["gain_db"] > 5


def test_more_swaps_than_patches_are_refused() -> None:
    method = small("context_restoration", swaps=25)
    with pytest.raises(UsageError, match=r"'method.swaps' is 25, but images of 32 x 32 .* 7 x 7 patches of 4 x 4"):
        method.check(course(shape=(1, 32, 32)))
    small("context_restoration", swaps=24).check(course(shape=(1, 32, 32)))


def test_images_of_a_few_pixels() -> None:
    images = noise(3, 1, 6, 5)
    found = small("context_restoration", swaps=2).corrupted(batch(images))
    assert torch.equal(found.flatten(2).sort().values, images.flatten(2).sort().values)
