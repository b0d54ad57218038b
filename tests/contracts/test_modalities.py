"""What every modality promises."""

import pickle

import numpy as np
import pytest

from sslmed.config import UsageError
from sslmed.data.modality import MODALITIES, Modality, accept, set_knobs, with_views
from sslmed.data.views import ViewConfig

RNG = np.random.default_rng(0)
INPUTS = {
    "constant 0": np.zeros((24, 32), np.uint8),
    "constant maximum": np.full((24, 32), 65535, np.uint16),
    "8 bit": RNG.integers(0, 256, (24, 32), dtype=np.uint8),
    "16 bit": RNG.integers(0, 65536, (24, 32), dtype=np.uint16),
    "12 in 16 bit": RNG.integers(0, 4096, (24, 32), dtype=np.uint16),
    "one pixel": np.array([[7]], np.uint8),
}
ILLEGAL_VALUE = {
    "hflip": 0.5,
    "vflip": 0.5,
    "rot90": 0.5,
    "colour": 0.2,
    "grey": 0.2,
    "rotate": 5.0,
    "noise": 0.1,
    "stain": 0.05,
}
ILLEGAL_VALUE |= {"solarize": 0.2}


@pytest.fixture(params=MODALITIES)
def modality(request: pytest.FixtureRequest) -> Modality:
    return MODALITIES[request.param]


def test_the_key_is_the_name(modality: Modality) -> None:
    assert MODALITIES[modality.name] is modality


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_output_is_finite_float32_of_the_same_shape(modality: Modality, name: str, channels: int) -> None:
    pixels = INPUTS[name] if channels == 1 else np.dstack([INPUTS[name]] * 3)
    pixels.setflags(write=False)
    stored = accept(modality, pixels)
    low, high = modality.intensity_range(stored)
    assert np.isfinite([low, high]).all()
    assert low < high
    normalised = modality.normalise(stored, low, high)
    assert normalised.dtype == np.float32
    assert normalised.shape == stored.shape
    assert stored.shape == (pixels.shape if channels in modality.channels else pixels.shape[:2])
    assert np.isfinite(normalised).all()
    assert np.abs(normalised).max() < 10


def test_order_of_intensities_is_kept(modality: Modality) -> None:
    pixels = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    assert (np.diff(modality.normalise(pixels, 0, 255).ravel()) > 0).all()


def test_the_default_view_uses_legal_knobs_only(modality: Modality) -> None:
    assert modality.legal <= set(ViewConfig.model_fields)
    assert set_knobs(modality.view) <= modality.legal


def test_illegal_knobs_are_refused_by_name(modality: Modality) -> None:
    for knob in set(ViewConfig.model_fields) - modality.legal:
        with pytest.raises(UsageError, match=rf"views\.{knob}.*{modality.name}"):
            with_views(modality, {knob: ILLEGAL_VALUE[knob]})


def test_it_travels_to_workers(modality: Modality) -> None:
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
