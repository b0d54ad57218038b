"""Stain jitter against its formula, pixel by pixel."""

import numpy as np
import pytest

from sslmed.data.intensity import Intensity
from sslmed.data.modality import MODALITIES
from sslmed.data.stain import RGB_FROM_HED, jitter
from sslmed.data.views import Augment, ViewConfig

IMAGE = np.random.default_rng(0).uniform(0.05, 0.98, size=(5, 6, 3))


def test_no_strength_changes_nothing() -> None:
    np.testing.assert_allclose(jitter(IMAGE, 0.0, np.random.default_rng(1)), IMAGE, atol=1e-6)


def test_it_scales_and_shifts_the_densities_of_three_stains() -> None:
    found = jitter(IMAGE, 0.05, np.random.default_rng(2))
    stream = np.random.default_rng(2)
    scale, shift = stream.uniform(0.95, 1.05, 3), stream.uniform(-0.05, 0.05, 3)
    for row, column in np.ndindex(5, 6):
        absorbed = [-np.log(value) for value in IMAGE[row, column]]
        stains = np.linalg.solve(RGB_FROM_HED.T, absorbed)  # absorbed = sum of stains, each with its colour
        changed = [scale[k] * stains[k] + shift[k] for k in range(3)]
        light = [np.exp(-sum(changed[k] * RGB_FROM_HED[k, channel] for k in range(3))) for channel in range(3)]
        assert found[row, column] == pytest.approx(np.clip(light, 0, 1), abs=1e-6)


def test_black_and_white_stay_finite_and_in_range() -> None:
    for level in (0.0, 1.0):
        found = jitter(np.full((4, 4, 3), level), 0.2, np.random.default_rng(3))
        assert np.isfinite(found).all()
        assert found.min() >= 0
        assert found.max() <= 1
        assert abs(found - level).max() < 0.35  # glass stays bright, ink dark


def test_a_view_of_tissue_is_stained_by_its_key_and_grey_is_left_alone() -> None:
    policy, bytes_ = MODALITIES["histology"], Intensity(0, 255, 114, 57)
    pixels = (255 * np.random.default_rng(4).uniform(0.2, 0.9, size=(40, 40, 3))).astype(np.uint8)
    plain, stained = (
        Augment([ViewConfig(crop=(1.0, 1.0), aspect=(1.0, 1.0), stain=strength)], 32, policy.normalise, seed=0)
        for strength in (0.0, 0.1)
    )
    (before,) = plain(pixels, bytes_, epoch=0, sample=1)
    (after,) = stained(pixels, bytes_, epoch=0, sample=1)
    assert 0.01 < np.abs(after - before).mean() < 1.5
    (again,) = stained(pixels, bytes_, epoch=0, sample=1)
    assert np.array_equal(after, again)
    grey = pixels[..., 0]
    assert np.array_equal(plain(grey, bytes_, epoch=0, sample=1)[0], stained(grey, bytes_, epoch=0, sample=1)[0])
