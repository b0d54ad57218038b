import json
from pathlib import Path

import numpy as np
import pytest
from dicoms import make_dataset

from sslmed.config import DataError, UsageError
from sslmed.data.acceptance import accept, accept_scan
from sslmed.data.input import network_input
from sslmed.data.modality import (
    MODALITIES,
    in_words,
    named,
    planes_of,
    policy_record,
    refuse_other_policy,
    set_knobs,
    with_views,
    with_windows,
)
from sslmed.data.readers import read
from sslmed.data.scan import Scan

CT, MRI, XRAY, PHOTO = (MODALITIES[name] for name in ("ct", "mri", "xray", "photo"))
ULTRASOUND = MODALITIES["ultrasound"]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
HU = RNG.integers(-1024, 2000, (5, 20, 30)).astype(np.int16)


def scan(pixels: np.ndarray, **about: object) -> Scan:
    return Scan(pixels, None, Path("a"), **about)  # type: ignore[arg-type]


# What is taken.


def test_equal_channels_collapse_for_xray_and_colour_is_refused() -> None:
    grey = RGB[..., 0]
    stored = accept(XRAY, np.dstack([grey] * 3))
    np.testing.assert_array_equal(stored, grey)
    assert accept(XRAY, grey) is grey
    with pytest.raises(DataError, match="--modality photo"):
        accept(XRAY, RGB)
    one_coloured_pixel = np.dstack([grey] * 3)
    one_coloured_pixel[3, 4, 2] ^= 128
    with pytest.raises(DataError, match="save it as grey"):
        accept(XRAY, one_coloured_pixel)


def test_photo_takes_grey_and_colour_as_they_are() -> None:
    assert accept(PHOTO, RGB) is RGB
    assert accept(PHOTO, RGB[..., 0]).shape == (20, 30)


def test_a_grey_jpeg_in_colour_coding_is_grey_and_a_coloured_marker_is_not() -> None:
    grey = RNG.integers(10, 240, (20, 30), dtype=np.uint8)
    nearly = np.stack([grey, grey + 3, grey - 3], axis=2)
    taken = accept(XRAY, nearly)
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, grey)
    nearly[3:6, 3:6] = (255, 0, 0)
    with pytest.raises(DataError, match="colour"):
        accept(XRAY, nearly)


def test_volumes_go_to_ct_and_mri_and_clips_to_ultrasound() -> None:
    assert accept_scan(CT, scan(HU, kind="volume", unit="HU", modality="CT")).shape == HU.shape
    assert accept_scan(MRI, scan(HU, kind="volume", modality="MR")).dtype == np.int16
    assert accept_scan(ULTRASOUND, scan(np.abs(HU), kind="clip", modality="US")).shape == HU.shape
    with pytest.raises(DataError, match="is a volume of 5 x 20 x 30 pixels, not image or clip"):
        accept_scan(ULTRASOUND, scan(HU, kind="volume"))
    with pytest.raises(DataError, match=r"is a clip of 5 x 20 x 30 pixels \(CT\), not image or volume"):
        accept_scan(CT, scan(HU, kind="clip", modality="CT"))
    with pytest.raises(DataError, match=r"is a slice of a series \(MR\).*modality ct"):
        accept_scan(CT, scan(HU, kind="volume", modality="MR"))
    with pytest.raises(DataError, match="was taken as US: not read by modality mri, which takes MR"):
        accept_scan(MRI, scan(HU[0], modality="US"))


@pytest.mark.parametrize(
    "pixels",
    [
        HU,
        HU.astype(np.float32),
        np.full((2, 4, 4), -1024, np.int16),
        np.clip(HU, -175, 250),
    ],
    ids=["int16", "float32", "only air", "clipped"],
)
def test_a_nifti_volume_in_hu_is_taken(pixels: np.ndarray) -> None:
    assert accept_scan(CT, scan(pixels, kind="volume")) is pixels


@pytest.mark.parametrize(
    "pixels",
    [
        (HU + 1024).astype(np.uint16),
        ((HU + 1024) // 12).astype(np.uint8),
        (HU + 1024).astype(np.int16),
        (HU / 1000).astype(np.float32),
        np.zeros((2, 4, 4), np.int16),
    ],
    ids=["never rescaled", "a picture", "shifted", "standardised", "nothing"],
)
def test_what_cannot_be_hu_is_refused_and_the_reason_names_what_is_needed(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"no Hounsfield units.*Give the DICOM files, or a volume in HU"):
        accept_scan(CT, scan(pixels, kind="volume"))


def test_what_dicom_calls_hu_is_taken_as_it_is() -> None:
    bone = np.full((4, 4), 300, np.int16)
    assert accept_scan(CT, scan(bone, unit="HU", modality="CT")) is bone


# What becomes of it.


def test_a_film_in_monochrome1_and_its_twin_have_the_same_network_input(tmp_path: Path) -> None:
    film = np.minimum(RNG.gamma(2, 400, (64, 48)), 4095).astype(np.uint16)  # no symmetry between dark and bright
    inputs = []
    for values, meaning in ((film, "MONOCHROME2"), (4095 - film, "MONOCHROME1")):
        path = tmp_path / f"{meaning}.dcm"
        make_dataset(values, BitsStored=12, Modality="DX", PhotometricInterpretation=meaning).save_as(path)
        pixels = accept_scan(XRAY, read(path))
        inputs.append(network_input(pixels, XRAY.intensity(pixels), XRAY, 64, 1))
    np.testing.assert_allclose(inputs[0], inputs[1], atol=1e-5)
    assert inputs[0].min() < -1.5
    assert inputs[0].max() > 1


def test_slices_of_a_volume_keep_their_relative_intensities() -> None:
    dim, bright = np.full((24, 24), 200, np.int16), np.full((24, 24), 800, np.int16)
    dim[4:20, 4:20], bright[4:20, 4:20] = 250, 850
    volume = np.stack([dim, bright])
    intensity = MRI.intensity(volume)
    first, second = (MRI.normalise(slice_, intensity) for slice_ in volume)
    assert second.min() > first.max()
    alone = [MRI.normalise(slice_, MRI.intensity(slice_)) for slice_ in volume]
    assert alone[1].min() < alone[0].max()  # as it would be with percentiles of each slice


# Views.


def test_with_views_changes_only_what_is_asked_and_not_the_shared_instance() -> None:
    before = XRAY.view
    changed = with_views(XRAY, {"crop": [0.6, 1.0], "hflip": 0.5})
    assert changed.view.crop == (0.6, 1.0)
    assert changed.view.hflip == 0.5
    assert changed.view.rotate == before.rotate
    assert MODALITIES["xray"].view is before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"vflip": 0.5}, r"'views\.vflip' is 0\.5.*xray"),
        ({"colour": 0.1}, r"'views\.colour'"),
        ({"grey": 0.2}, r"'views\.grey'"),
        ({"rot90": 1}, r"'views\.rot90'"),
        ({"window": 0.1}, r"'views\.window'"),
        ({"brightnes": 0.5}, "did you mean 'brightness'"),
        ({"hflip": 1.5}, r"'views\.hflip' is 1\.5"),
        ({"crop": [0.9, 0.1]}, r"^views: crop is \[0\.9, 0\.1\]; allowed: two numbers above 0, the smaller first$"),
        ({"crop": [0.01, 1.0]}, r"'views\.crop' is \[0\.01, 1\.0\]; allowed for xray: from 0\.15 to 1"),
        ({"rotate": 90}, r"'views\.rotate' is 90\.0; allowed for xray: from 0 to 45"),
        ({"blur_sigma": [0.1, 4.0]}, r"'views\.blur_sigma' is \[0\.1, 4\.0\]; allowed for xray: from 0\.05 to 1\.5"),
    ],
)
def test_with_views_names_what_it_refuses(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        with_views(XRAY, overrides)
    assert str(caught.value).count("\n") < 6


@pytest.mark.parametrize("knob", ["brightness", "contrast", "gamma", "solarize", "vflip", "rot90", "grey", "stain"])
def test_a_ct_keeps_its_tones_and_its_up(knob: str) -> None:
    with pytest.raises(UsageError, match=rf"views\.{knob}.*ct images"):
        with_views(CT, {knob: 0.2})


def test_a_window_is_jittered_by_a_tenth_of_its_width_at_most() -> None:
    assert with_views(CT, {"window": 0.1}).view.window == 0.1
    with pytest.raises(UsageError, match=r"'views\.window' is 0\.2; allowed for ct: from 0 to 0\.1"):
        with_views(CT, {"window": 0.2})


def test_a_photo_may_be_turned_further_and_blurred_more() -> None:
    assert with_views(PHOTO, {"rotate": 180, "blur_sigma": [0.1, 4.0], "crop": [0.08, 1.0]}).view.rotate == 180


def test_a_neutral_value_of_a_forbidden_knob_is_no_error() -> None:
    assert "vflip" not in set_knobs(with_views(XRAY, {"vflip": 0.0, "colour": 0}).view)


# Windows and records.


def test_windows_are_channels_of_ct_alone() -> None:
    three = with_windows(CT, ("lung", "mediastinum", (500, 2000)))
    assert (planes_of(CT), planes_of(three), planes_of(XRAY)) == (1, 3, 1)
    assert in_words(three).endswith("-500/1500; 50/350; 500/2000 HU")
    assert in_words(CT).endswith("0/2048 HU")
    assert with_windows(XRAY, ()) is XRAY
    with pytest.raises(UsageError, match=r"data\.windows is for ct.*remove it for xray"):
        with_windows(XRAY, ("lung",))
    with pytest.raises(UsageError, match="'lungs' is no window; did you mean 'lung'"):
        with_windows(CT, ("lungs",))


def test_a_store_of_another_policy_is_refused_by_what_differs() -> None:
    record = json.loads(json.dumps(policy_record(MRI)))
    refuse_other_policy(record, "store")
    with pytest.raises(DataError, match=r"store was made by another policy for mri.*percentiles \[1, 99\] there"):
        refuse_other_policy(record | {"percentiles": [1, 99]}, "store")
    with pytest.raises(DataError, match=r"air none there, 0\.12 here"):
        refuse_other_policy({key: value for key, value in record.items() if key != "air"}, "store")


def test_an_unknown_modality_is_named() -> None:
    assert named("xray") is XRAY
    with pytest.raises(UsageError, match="did you mean 'xray'"):
        named("x-ray")
