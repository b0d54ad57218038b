"""What is kept of a scan."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.checks.likeness import scan_hash
from sslmed.data.checks.measured import Measure, saturation
from sslmed.data.identity import SiteKey
from sslmed.data.scan import Scan

KEY = SiteKey(b"k" * 32)


def scan(pixels: np.ndarray, **more: Any) -> Scan:
    return Scan(pixels, more.pop("spacing", None), Path("a"), **more)


def ramp(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def test_a_record_of_an_image() -> None:
    pixels = ramp(20, 30)
    told = Measure(KEY)(
        scan(pixels, spacing=(0.5, 0.25), modality="CR", patient="P1", orientation="LPS", identity=("PatientID",)),
        pixels,
    )
    assert (told.kind, told.shape, told.dtype, told.spacing) == ("image", (20, 30), "uint16", (0.5, 0.25))
    assert (told.low, told.high, told.orientation) == (0, 599, "LPS")
    assert told.content == KEY.content(pixels)
    assert told.likeness == scan_hash(scan(pixels))
    assert (told.modality, told.patient, told.identity, told.annotated) == ("CR", "P1", ("PatientID",), None)
    assert (told.sides, told.colour) == ((20, 30), False)


def test_neither_patient_nor_key_is_shown() -> None:
    measure = Measure(KEY)
    told = measure(scan(ramp(20, 20), patient="Ada^Lovelace"), ramp(20, 20))
    assert "Ada" not in repr(told)
    assert KEY.secret.hex() not in repr(measure)
    assert str(KEY.secret) not in repr(measure)


def test_it_goes_to_a_worker_and_back() -> None:
    measure = pickle.loads(pickle.dumps(Measure(KEY)))  # noqa: S301
    told = measure(scan(ramp(20, 20)), ramp(20, 20))
    assert pickle.loads(pickle.dumps(told)) == told  # noqa: S301
    assert len(pickle.dumps(told)) < 1000


@pytest.mark.parametrize(
    ("kind", "shape", "colour", "sides"),
    [
        ("image", (20, 30, 3), True, (20, 30)),
        ("volume", (5, 20, 30), False, (20, 30)),
        ("clip", (5, 20, 30), False, (20, 30)),
        ("clip", (5, 20, 30, 3), True, (20, 30)),
    ],
)
def test_shapes_are_read_by_what_the_scan_is(
    kind: Any, shape: tuple[int, ...], colour: bool, sides: tuple[int, int]
) -> None:
    told = Measure(KEY)(scan(ramp(*shape), kind=kind), ramp(*shape))
    assert (told.colour, told.sides) == (colour, sides)


def test_nothing_cannot_be_measured() -> None:
    with pytest.raises(DataError, match="a: has no pixels"):
        Measure(KEY)(scan(np.zeros((0, 5), np.uint8)), np.zeros((0, 5), np.uint8))


def test_the_share_of_saturated_pixels() -> None:
    image = ramp(10, 10)
    assert saturation(image) == 1 / 99  # the least value is background
    image[2:6, 3:8] = 99
    assert saturation(image) == pytest.approx(21 / 99)


def test_padding_is_not_saturated() -> None:
    image = np.pad(ramp(10, 10), ((5, 5), (0, 7)), constant_values=99)
    assert saturation(image) == 1 / 99
    assert saturation(np.full((5, 5), 9, np.uint8)) == 0
    volume = np.stack([np.full((10, 10), 99, np.uint16), ramp(10, 10)])  # a blank slice
    assert saturation(volume) == 1 / 99


def test_colour_is_saturated_where_every_channel_is() -> None:
    image = np.zeros((10, 10, 3), np.uint8)
    image[..., 0] = 255  # red, not white
    image[..., 1] = ramp(10, 10)
    assert Measure(KEY)(scan(image.copy()), image).saturated < 0.02
    image[2:8, 2:8] = 255
    assert Measure(KEY)(scan(image.copy()), image).saturated > 0.3
