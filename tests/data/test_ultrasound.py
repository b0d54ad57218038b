from pathlib import Path

import cv2
import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.acceptance import accept
from sslmed.data.modality import MODALITIES
from sslmed.data.readers import find, read
from sslmed.data.ultrasound import _hull, beam, sector

ULTRASOUND = MODALITIES["ultrasound"]
HEIGHT, WIDTH = 240, 320
Y, X = np.mgrid[:HEIGHT, :WIDTH]
AWAY, ANGLE = np.hypot(X - 160, Y + 20), np.arctan2(X - 160, Y + 20)
SECTOR = (AWAY > 45) & (AWAY < 240) & (np.abs(ANGLE) < 0.6)
CYST = np.hypot(X - 180, Y - 140) < 20
REAL = Path(__file__).parents[3] / "shared" / "data" / "ultrasound_nerve" / "images"


def tissue(seed: int = 0) -> np.ndarray:
    """A sector of speckle with a black cyst inside, black around; uint8."""
    speckle = np.random.default_rng(seed).gamma(1.2, 40, (HEIGHT, WIDTH))
    return np.where(SECTOR & ~CYST, np.clip(speckle, 0, 255), 0).astype(np.uint8)


def with_text(picture: np.ndarray) -> np.ndarray:
    """What machines write beside the sector, in white."""
    drawn = picture.copy()
    for line in range(6):
        cv2.putText(drawn, "TIS0.4 MI", (3, 14 + 14 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (255,) * 3, 1)
    cv2.putText(drawn, "HOSPITAL 1234", (212, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255,) * 3, 1)
    drawn[30:200, 312:314] = 255  # a scale
    return drawn


def shares(found: np.ndarray) -> tuple[float, float]:
    """How much of the sector is kept, and how much beside it, relative to it."""
    return float(found[SECTOR].mean()), float(found[~SECTOR].sum() / SECTOR.sum())


def test_text_beside_the_sector_goes_and_the_sector_stays() -> None:
    picture = with_text(tissue())
    found = sector(picture)
    assert found is not None
    kept, beside = shares(found)
    assert kept > 0.99
    assert beside < 0.06  # the hull closes the arc of the probe
    assert found[CYST].all()  # dark inside is inside
    masked = beam(picture, False)
    assert (masked[~found] == 0).all()
    np.testing.assert_array_equal(masked[found], picture[found])
    letters = (picture == 255) & ~SECTOR
    assert (masked[letters] > 0).mean() < 0.01


@pytest.mark.parametrize("quality", [90, 60])
def test_compression_brings_no_text_back(quality: int) -> None:
    drawn = with_text(tissue())
    picture = cv2.imdecode(cv2.imencode(".jpg", drawn, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)
    found = sector(picture)
    assert found is not None
    kept, beside = shares(found)
    assert kept > 0.99
    assert beside < 0.15
    assert not found[:100, :60].any()


def test_of_a_clip_what_stands_still_goes() -> None:
    clip = np.stack([with_text(tissue(seed)) for seed in range(5)])
    clip[:, 224:238, 20:300] = 180  # a bar of buttons, larger than letters and bright
    found = sector(clip)
    assert found is not None
    kept, beside = shares(found)
    assert kept > 0.98
    assert beside < 0.06
    masked = beam(clip, False)
    assert masked.shape == clip.shape
    assert (masked[:, 228, 22] == 0).all()


def test_a_clip_that_stands_still_is_a_picture() -> None:
    clip = np.stack([with_text(tissue())] * 3)
    np.testing.assert_array_equal(sector(clip), sector(clip[0]))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((60, 80), np.uint8),
        np.full((60, 80), 90, np.uint8),
        np.random.default_rng(0).integers(20, 200, (60, 80)).astype(np.uint8),
        np.random.default_rng(0).integers(0, 60000, (5, 7)).astype(np.uint16),
        np.array([[9]], np.uint8),
    ],
    ids=["black", "flat", "cropped", "tiny", "a pixel"],
)
def test_a_picture_without_a_sector_is_left_as_it_is(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(beam(picture, False), picture)


def test_a_component_too_small_to_be_a_sector_destroys_nothing() -> None:
    picture = np.zeros((100, 100), np.uint8)
    picture[40:60, 40:60] = 200
    picture[5:8, 5:90] = 100
    assert sector(picture) is None
    np.testing.assert_array_equal(beam(picture, False), picture)


def test_scattered_light_is_no_sector() -> None:
    picture = np.zeros((200, 200), np.uint8)
    picture[20:100, 20:100] = 90
    for row in range(110, 195, 14):
        for column in range(5, 190, 14):
            picture[row : row + 10, column : column + 10] = 90
    assert sector(picture) is None


def test_a_coloured_mark_is_filled_from_beside_it() -> None:
    picture = np.dstack([with_text(tissue())] * 3)
    around = picture[110:130, 120:140, 0].copy()
    picture[118:121, 128:131] = (255, 220, 0)
    stored = accept(ULTRASOUND, picture)
    assert stored.shape == (HEIGHT, WIDTH)
    assert stored.dtype == np.uint8
    assert set(np.unique(stored[114:125, 124:135])) <= set(np.unique(around))
    untouched = np.ones_like(CYST)
    untouched[114:125, 124:135] = False
    np.testing.assert_array_equal(stored[untouched], beam(picture[..., 0], False)[untouched])


def test_nearly_grey_is_grey() -> None:
    grey = tissue()
    picture = np.dstack([grey, np.minimum(grey, 250) + 3, np.maximum(grey, 3) - 3]).astype(np.uint8)
    stored = beam(picture, True)
    assert (np.abs(stored[SECTOR].astype(int) - grey[SECTOR]) <= 3).mean() > 0.99


def test_a_coloured_bar_beside_the_sector_is_no_doppler() -> None:
    picture = np.dstack([tissue()] * 3)
    picture[:26] = (40, 60, 160)
    stored = beam(picture, True)
    assert (stored[:20, :120] == 0).all()
    assert stored[100:200].any()


def test_doppler_is_refused_with_the_reason() -> None:
    picture = np.dstack([tissue()] * 3)
    picture[100:150, 130:190] = (220, 30, 10)
    with pytest.raises(DataError, match=r"in colour over \d+% of its sector \(Doppler.*Leave it out"):
        accept(ULTRASOUND, picture)
    clip = np.stack([picture] * 3)
    with pytest.raises(DataError, match="Doppler"):
        accept(ULTRASOUND, clip, "clip")


def test_a_tinted_picture_is_refused() -> None:
    with pytest.raises(DataError, match="a coloured scale"):
        beam(np.dstack([tissue(), tissue() // 2, tissue() // 4]), True)


def test_a_clip_in_colours_becomes_grey_frame_by_frame() -> None:
    clip = np.stack([np.dstack([with_text(tissue(seed))] * 3) for seed in range(4)])
    clip[2, 118:121, 128:131] = (0, 255, 0)
    stored = accept(ULTRASOUND, clip, "clip")
    assert stored.shape == (4, HEIGHT, WIDTH)
    assert (stored[0] == clip[0, ..., 0])[SECTOR].mean() > 0.99
    assert stored[2, 119, 129] != 255


def test_the_hull_of_a_shape() -> None:
    mask = np.zeros((9, 9), bool)
    mask[[1, 1, 7, 4], [1, 7, 4, 4]] = True
    hull = _hull(mask)
    assert [np.flatnonzero(row).tolist() for row in hull[[0, 1, 4, 7, 8]]] == [
        [],
        list(range(1, 8)),
        [3, 4, 5],
        [4],
        [],
    ]
    ring = (np.hypot(*(np.mgrid[:41, :41] - 20)) < 18) & (np.hypot(*(np.mgrid[:41, :41] - 20)) > 10)
    np.testing.assert_array_equal(_hull(ring), np.hypot(*(np.mgrid[:41, :41] - 20)) < 18)


@pytest.mark.real
@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_cropped_images_of_a_machine_lose_nothing_but_its_mark() -> None:
    lost = []
    for path in find(REAL)[::5]:
        picture = read(path).pixels
        grey = picture if picture.ndim == 2 else picture[..., 0]
        lost.append(1 - float(beam(grey, False).sum() / grey.sum()))
    assert np.median(lost) < 0.001
    assert max(lost) < 0.04
