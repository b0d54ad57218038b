"""What every modality promises."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslmed.config import UsageError
from sslmed.data.acceptance import accept
from sslmed.data.intensity import Jitter
from sslmed.data.modality import MODALITIES, Modality, in_words, planes_of, policy_record, set_knobs, with_views
from sslmed.data.views import Augment, ViewConfig

RNG = np.random.default_rng(0)
GREY = {
    "constant 0": np.zeros((24, 32), np.uint8),
    "constant maximum": np.full((24, 32), 65535, np.uint16),
    "8 bit": RNG.integers(0, 256, (24, 32), dtype=np.uint8),
    "16 bit": RNG.integers(0, 65536, (24, 32), dtype=np.uint16),
    "12 in 16 bit": RNG.integers(0, 4096, (24, 32), dtype=np.uint16),
    "one pixel": np.array([[7]], np.uint8),
}
VOLUMES = {
    "signed": RNG.integers(-2000, 3000, (4, 24, 32)).astype(np.int16),
    "float": RNG.normal(0, 300, (4, 24, 32)).astype(np.float32),
    "constant": np.full((4, 24, 32), -1024, np.int16),
    "one voxel": np.array([[[7]]], np.int16),
}
ILLEGAL_VALUE = {
    "scale": 0.5,
    "hflip": 0.5,
    "vflip": 0.5,
    "rot90": 0.5,
    "colour": 0.2,
    "grey": 0.2,
    "rotate": 5.0,
    "noise": 0.1,
    "stain": 0.05,
    "solarize": 0.2,
    "window": 0.05,
    "brightness": 0.1,
    "contrast": 0.1,
    "gamma": 0.1,
}


@pytest.fixture(params=MODALITIES)
def modality(request: pytest.FixtureRequest) -> Modality:
    return MODALITIES[request.param]


def test_the_key_is_the_name(modality: Modality) -> None:
    assert MODALITIES[modality.name] is modality


@pytest.mark.parametrize("name", GREY)
@pytest.mark.parametrize("channels", [1, 3])
def test_output_is_finite_float32_of_the_same_shape(modality: Modality, name: str, channels: int) -> None:
    pixels = GREY[name] if channels == 1 else np.dstack([GREY[name]] * 3)
    pixels.setflags(write=False)
    stored = accept(modality, pixels)
    assert stored.shape == (pixels.shape if channels in modality.channels else pixels.shape[:2])
    check(modality, stored, stored)


@pytest.mark.parametrize("name", VOLUMES)
def test_slices_and_stacks_of_a_volume_too(modality: Modality, name: str) -> None:
    if modality.kinds == ("image",):
        pytest.skip("reads no volumes and clips")
    volume = VOLUMES[name] if "volume" in modality.kinds else np.abs(VOLUMES[name])
    stored = accept(modality, volume, "volume" if "volume" in modality.kinds else "clip")
    assert stored.shape == volume.shape
    assert stored.dtype == volume.dtype
    check(modality, stored, stored[0])
    check(modality, stored, np.moveaxis(stored, 0, -1))


def check(modality: Modality, whole: np.ndarray, part: np.ndarray) -> None:
    """A part of a scan is measured by the whole, and comes out finite, bounded and of its shape."""
    intensity = modality.intensity(whole)
    assert np.isfinite(intensity).all()
    assert intensity.low < intensity.high
    assert intensity.low <= intensity.mean <= intensity.high
    assert intensity.std > 0
    normalised = modality.normalise(part, intensity, Jitter(0.05, 0.95))
    assert normalised.dtype == np.float32
    assert normalised.shape == part.shape
    assert np.isfinite(normalised).all()
    assert np.abs(normalised).max() < 10


def test_order_of_intensities_is_kept(modality: Modality) -> None:
    pixels = np.linspace(-900, 900, 24).astype(np.int16).reshape(4, 6)
    pixels = pixels if modality.unit else pixels.astype(np.float32) - pixels.min()
    if modality.intensity(pixels).low == 0:  # by the dtype's range
        pixels = np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6)
    inner = modality.normalise(pixels, modality.intensity(pixels)).ravel()[1:-1]
    assert (np.diff(inner) > 0).all()


def test_the_default_view_is_within_what_is_legal(modality: Modality) -> None:
    assert modality.legal.keys() <= set(ViewConfig.model_fields)
    assert set_knobs(modality.view) <= modality.legal.keys()
    assert with_views(modality, modality.view.model_dump()).view == modality.view


def test_illegal_knobs_are_refused_by_name(modality: Modality) -> None:
    for knob in set(ViewConfig.model_fields) - modality.legal.keys():
        with pytest.raises(UsageError, match=rf"views\.{knob}.*{modality.name}"):
            with_views(modality, {knob: ILLEGAL_VALUE[knob]})


def test_bounds_are_kept_at_either_end(modality: Modality) -> None:
    for knob, (low, high) in modality.legal.items():
        both = isinstance(getattr(modality.view, knob), tuple)
        for number in (low, high):
            with_views(modality, {knob: (number, number) if both else number})
        beyond = high * 1.01
        with pytest.raises(UsageError, match=rf"views.*{knob}"):
            with_views(modality, {knob: (low, beyond) if both else beyond})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("slices", [(), (3,), (5,)], ids=["one", "three", "five"])
def test_views_of_every_stored_dtype_and_stack(
    modality: Modality, dtype: type[np.generic], slices: tuple[int, ...]
) -> None:
    if modality.channels == (1, 3) and slices == (5,):
        pytest.skip("has colours, no slices")
    pixels = (RNG.random((40, 48, *slices)) * 250).astype(dtype)
    augment = Augment((modality.view,), 32, modality.normalise, seed=0)
    for sample in range(4):
        (view,) = augment(pixels, modality.intensity(pixels), epoch=0, sample=sample)
        assert view.shape == (32, 32, *slices)
        assert view.dtype == np.float32
        assert np.isfinite(view).all()


def test_the_table_of_views_is_true(modality: Modality) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    (head,) = (line for line in lines if line[0] == "`views.` key")
    cells = {line[0].strip("`"): line[head.index(modality.name)] for line in lines if len(line) == len(head)}
    for knob in ViewConfig.model_fields:
        if knob in modality.legal:
            low, high = modality.legal[knob]
            assert cells[knob] == f"{shown(getattr(modality.view, knob))} ({low:g} to {high:g})", knob
        else:
            assert cells[knob] == "–", knob


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join('3/4' if each == 3 / 4 else '4/3' if each == 4 / 3 else f'{each:g}' for each in value)}]"
    return f"{value:g}"


def test_its_record_is_json_and_its_words_are_told(modality: Modality) -> None:
    record = policy_record(modality)
    assert json.loads(json.dumps(record)) == record
    assert record["name"] == modality.name
    assert len(in_words(modality)) > 20
    assert planes_of(modality) == 1


def test_it_travels_to_workers(modality: Modality) -> None:
    assert pickle.loads(pickle.dumps(modality)) == modality  # noqa: S301
