"""The denoising autoencoder: its noise as told, and a gain in PSNR on images and noise it has not seen."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from restorations import HELD_OUT, batch, small, trained, waves

from sslmed.methods.denoising import DenoisingConfig


def added(count: int = 200, side: int = 64, **settings: object) -> torch.Tensor:
    """The noise alone."""
    return small("denoising", size=side, **settings).corrupted(batch(torch.zeros(count, 1, side, side)))


def test_it_gains_over_the_noisy_input_on_held_out_images() -> None:
    method, data = small("denoising"), batch(waves(16, seed=1), HELD_OUT)
    assert method.eval().loss(data)["gain_db"] < 1
    outputs = trained(method.train()).loss(data)
    assert outputs["gain_db"] > 6
    noisy = float((method.corrupted(data) - data.views[0]).square().mean())
    assert outputs["loss"].item() == pytest.approx(noisy / 10 ** (outputs["gain_db"].item() / 10), rel=1e-5)


@pytest.mark.parametrize("sigma", [0.2, 0.8])
def test_noise_of_every_pixel_has_its_deviation_and_no_neighbours(sigma: float) -> None:
    noise = added(resolution=0, sigma=(sigma, sigma))
    assert noise.mean().abs() < 0.01 * sigma
    assert noise.std().item() == pytest.approx(sigma, rel=0.01)
    neighbours = np.corrcoef(noise[..., 1:].flatten(), noise[..., :-1].flatten())[0, 1]
    assert abs(neighbours) < 0.01


def test_coarse_noise_has_the_deviation_of_bilinear_interpolation_and_reaches_as_far_as_its_nodes() -> None:
    """A weight w between two nodes leaves a variance of w^2 + (1 - w)^2: 2/3 in the mean, along each axis."""
    noise = added(resolution=16, sigma=(0.8, 0.8))
    assert noise.std().item() == pytest.approx(0.8 * 2 / 3, rel=0.02)
    near, far = (np.corrcoef(noise[..., lag:].flatten(), noise[..., :-lag].flatten())[0, 1] for lag in (1, 9))
    assert near > 0.85, "4 pixels from node to node"
    assert abs(far) < 0.02
    for axes in ((0, 1, 2), (0, 1, 3)):
        deviation = noise.square().mean(dim=axes).sqrt()
        assert deviation.min() > 0.93 * deviation.max(), "no row or column is always one of nodes"


def test_every_image_draws_its_own_deviation() -> None:
    deviations = added(resolution=0, sigma=(0.2, 0.8)).std(dim=(1, 2, 3))
    assert 0.19 < deviations.min() < 0.25
    assert 0.75 < deviations.max() < 0.82


def test_a_range_ascends() -> None:
    with pytest.raises(ValidationError, match="the smaller first"):
        DenoisingConfig(sigma=(0.8, 0.2))
