"""The hash keeps what the eye keeps, and near pairs are exactly those that a comparison of all with all finds."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sslmed.data.checks import likeness
from sslmed.data.checks.likeness import image_hash, near, scan_hash, survey
from sslmed.data.phantoms import phantom
from sslmed.data.scan import Scan

SEEDS = range(6)


def xray(seed: int) -> np.ndarray:
    """A synthetic radiograph, uint16."""
    return phantom(np.random.default_rng(seed), (96, 80))


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def smooth(seed: int, shape: tuple[int, int] = (96, 80)) -> np.ndarray:
    """A different random landscape for every seed, float32 in 0 to 1."""
    noise = np.random.default_rng(seed).random((9, 9), np.float32)
    land = cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return (land - land.min()) / (land.max() - land.min())


def brute(hashes: list[int], most: int) -> list[list[int]]:
    return [
        [one, other]
        for one in range(len(hashes))
        for other in range(one + 1, len(hashes))
        if hashes[one] and hashes[other] and bits(hashes[one], hashes[other]) <= most
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_and_scale_of_the_values_do_not_matter(seed: int) -> None:
    eight = np.rint(smooth(seed) * 255).astype(np.uint8)
    first = image_hash(eight)
    assert first == image_hash(eight.astype(np.uint16) * 257)
    assert first == image_hash(eight.astype(np.int16) * 16 - 1024)
    assert first == image_hash(eight.astype(np.float32) / 7 + 3)
    assert first == image_hash(np.repeat(eight[..., None], 3, axis=2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_and_another_size_leave_it_near(seed: int, quality: int) -> None:
    eight = np.rint(smooth(seed) * 255).astype(np.uint8)
    coded = cv2.imdecode(cv2.imencode(".jpg", eight, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_UNCHANGED)
    half = cv2.resize(eight, (40, 48), interpolation=cv2.INTER_AREA)
    assert bits(image_hash(eight), image_hash(coded)) <= likeness.MOST
    assert bits(image_hash(eight), image_hash(half)) <= likeness.MOST


def test_other_images_are_far() -> None:
    hashes = np.array([image_hash(smooth(seed)) for seed in range(40)], np.uint64)
    assert len(near(hashes)) == 0
    assert bits(image_hash(smooth(0)), image_hash(smooth(0)[:, ::-1])) > 8
    assert bits(image_hash(smooth(0)), image_hash(1 - smooth(0))) > 8


def test_one_bright_spot_does_not_decide() -> None:
    plain = np.rint(smooth(1, (256, 256)) * 100).astype(np.uint16)
    marked = plain.copy()
    marked[:6, :6] = 65535
    assert bits(image_hash(plain), image_hash(marked)) <= 8


def test_a_constant_image_has_zero_and_no_other_has() -> None:
    assert image_hash(np.full((40, 50), 7, np.uint8)) == 0
    assert image_hash(np.full((40, 50, 3), 0.1, np.float32)) == 0
    spot = np.zeros((64, 64), np.uint8)
    spot[20, 30] = 255
    assert image_hash(spot) != 0
    assert image_hash(np.arange(2, dtype=np.uint8)[None]) != 0  # two pixels


def test_a_volume_is_hashed_by_the_mean_of_its_slices() -> None:
    volume = np.stack([np.rint(smooth(seed) * 255).astype(np.int16) for seed in range(3)])
    scan = Scan(volume.copy(), None, Path("a.nii"), kind="volume")
    assert scan_hash(scan) == image_hash(volume.mean(axis=0))
    assert scan_hash(scan) == scan_hash(Scan(volume[::-1].copy(), None, Path("b.nii"), kind="volume"))
    clip = Scan(np.repeat(volume.astype(np.uint8)[..., None], 3, axis=3), None, Path("c.dcm"), kind="clip")
    assert bits(scan_hash(clip), scan_hash(scan)) <= 2


@given(
    st.lists(st.integers(1, 2**64 - 1), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=6)), max_size=30),
    st.integers(0, 5),
)
def test_banding_equals_brute_force(bases: list[int], changes: list[tuple[int, set[int]]], most: int) -> None:
    hashes = [0, *bases]
    for base, flipped in changes:
        hashes.append(bases[base % len(bases)] ^ sum(1 << bit for bit in flipped))
    assert near(np.array(hashes, np.uint64), most).tolist() == brute(hashes, most)


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_a_survey_sums_up_the_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "_PAIRS", block)
    stream = np.random.default_rng(0)
    bases = stream.integers(1, 2**64, 5, dtype=np.uint64)
    hashes = bases[stream.integers(0, 5, 60)]
    for flipped in (60, 30):
        hashes[:flipped] ^= np.uint64(1) << stream.integers(0, 64, flipped).astype(np.uint64)
    patients = stream.integers(0, 30, 60)
    pairs = [pair for pair in near(hashes).tolist() if patients[pair[0]] != patients[pair[1]]]
    found = survey(hashes, patients, show=10)
    assert len(pairs) > 20
    assert found.pairs == len(pairs)
    assert found.images == len({row for pair in pairs for row in pair})
    by_distance = sorted((bits(int(hashes[one]), int(hashes[other])), one, other) for one, other in pairs)
    shown = zip(found.distances.tolist(), found.closest.tolist(), strict=True)
    assert [(far, *pair) for far, pair in shown] == by_distance[:10]
    groups: list[set[int]] = []
    for one, other in pairs:
        joined = [group for group in groups if group & {one, other}]
        groups = [group for group in groups if group not in joined] + [set().union({one, other}, *joined)]
    assert (found.groups, found.largest) == (len(groups), max(map(len, groups)))


def test_nothing_is_near_in_a_set_of_none_or_one() -> None:
    for hashes in ([], [5], [0, 0]):
        assert near(np.array(hashes, np.uint64)).shape == (0, 2)
        assert survey(np.array(hashes, np.uint64), np.arange(len(hashes))).groups == 0


@pytest.mark.parametrize("most", [-1, 64])
def test_a_distance_that_no_hash_can_have_is_refused(most: int) -> None:
    with pytest.raises(ValueError, match="allowed: 0 to 63"):
        near(np.array([1, 2], np.uint64), most)


def test_radiographs_of_different_bodies_are_mostly_apart() -> None:
    """They are alike by nature: hence a warning, at a distance where a copy is found and most others are not."""
    hashes = np.array([image_hash(xray(seed)) for seed in range(30)], np.uint64)
    found = survey(hashes, np.arange(30))
    assert found.images <= 10
