"""Volumes in a store: what is handed out, where it lies, and how much is read for it."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from stores import write_store

from sslmed.config import UsageError
from sslmed.data.identity import SiteKey
from sslmed.data.intensity import Intensity
from sslmed.data.scan import NiftiGrid, Scan
from sslmed.data.shards.format import tile
from sslmed.data.shards.tables import NewScan
from sslmed.data.sources.kept import Keep
from sslmed.data.store import Store

SHAPE = (7, 300, 140)
AFFINE = np.array([[0, 0, 0.5, -3], [0, -0.75, 0, 4], [2.5, 0, 0, 5], [0, 0, 0, 1]])
VOLUME = np.random.default_rng(0).integers(-1000, 3000, SHAPE, np.int16)
GRID = NiftiGrid((140, 300, 7), np.array([[0, 1], [1, -1], [2, 1]], np.int8), np.arange(25) / 3)


def scan(pixels: np.ndarray, **given: Any) -> NewScan:
    return NewScan(pixels, Intensity(-1024, 1024, 0, 512), "c", kind=given.pop("kind", "volume"), **given)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A picture, the volume, a clip of the volume's shape."""
    scans = [
        scan(VOLUME[0], kind="image", spacing=(0.2, 0.3)),
        scan(VOLUME, spacing=(2.5, 0.75, 0.5), affine=AFFINE, grid=GRID),
        scan(VOLUME + 1, kind="clip"),
    ]
    return write_store(tmp_path / "store", scans, ["p", "q", "r"], modality="xray")


def test_rows_are_slices_in_order(store: Store) -> None:
    assert len(store) == 1 + 7 + 7
    assert store.index.scan.tolist() == [0] + [1] * 7 + [2] * 7
    assert store.index.slice.tolist() == [0, *range(7), *range(7)]
    assert store.scans.first.tolist() == [0, 1, 8]
    assert store.scans.kind.tolist() == [0, 1, 2]
    for number in range(7):
        np.testing.assert_array_equal(store.pixels(1 + number), VOLUME[number])
        np.testing.assert_array_equal(store.pixels(8 + number), VOLUME[number] + 1)
    assert store.patients(np.arange(15)).tolist() == [b"p"] + [b"q"] * 7 + [b"r"] * 7


def test_geometry_comes_back_exactly(store: Store) -> None:
    volume = store.volume(1)
    assert volume.shape == SHAPE
    assert volume.spacing == (2.5, 0.75, 0.5)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.grid is not None
    assert volume.grid.shape == GRID.shape
    np.testing.assert_array_equal(volume.grid.turn, GRID.turn)
    np.testing.assert_array_equal(volume.grid.fields, GRID.fields)
    clip = store.volume(2)
    assert np.isnan(clip.spacing).all()
    assert (clip.affine, clip.grid) == (None, None)
    np.testing.assert_array_equal(store.scans.spacing[0], [np.nan, 0.2, 0.3])


def test_slices_along_every_axis_stacks_and_crops(store: Store) -> None:
    volume = store.volume(1)
    np.testing.assert_array_equal(volume.slice(0, 6), VOLUME[6])
    np.testing.assert_array_equal(volume.slice(1, 123), VOLUME[:, 123])
    np.testing.assert_array_equal(volume.slice(2, 139), VOLUME[:, :, 139])
    np.testing.assert_array_equal(volume.stack(2, 0, 3), np.moveaxis(VOLUME[:, :, [0, 0, 1]], 2, -1))
    np.testing.assert_array_equal(volume.stack(1, 299, 5), np.moveaxis(VOLUME[:, [297, 298, 299, 299, 299]], 1, -1))
    np.testing.assert_array_equal(volume.crop((2, 250, 0), (3, 50, 140)), VOLUME[2:5, 250:300])
    np.testing.assert_array_equal(volume.whole(), VOLUME)
    for ask in (
        lambda: volume.slice(0, 7),
        lambda: volume.slice(3, 0),
        lambda: volume.stack(0, 0, 2),
        lambda: volume.crop((0, 0, 100), (1, 1, 41)),
        lambda: volume.crop((-1, 0, 0), (1, 1, 1)),
    ):
        with pytest.raises(UsageError):
            ask()


def test_a_stack_of_a_row_repeats_the_ends(store: Store) -> None:
    np.testing.assert_array_equal(store.pixels(3, 3), np.moveaxis(VOLUME[1:4], 0, -1))
    np.testing.assert_array_equal(store.pixels(1, 3), np.moveaxis(VOLUME[[0, 0, 1]], 0, -1))
    np.testing.assert_array_equal(store.pixels(7, 5), np.moveaxis(VOLUME[[4, 5, 6, 6, 6]], 0, -1))
    np.testing.assert_array_equal(store.pixels(0, 3), np.dstack([VOLUME[0]] * 3))


def test_only_the_tiles_that_are_touched_are_read(store: Store) -> None:
    """All tiles but those of the crop are damaged: the crop is read, the rest is not."""
    shard = store.path / "shard-00000.h5"
    content = bytearray(shard.read_bytes())
    with h5py.File(shard) as file:
        dataset = file["int16_300x140x1_tiled"]
        assert dataset.chunks == (1, 100, 70)
        for number in range(dataset.id.get_num_chunks()):
            chunk = dataset.id.get_chunk_info(number)
            if chunk.chunk_offset not in ((2, 100, 70), (3, 100, 70)):
                content[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    shard.write_bytes(bytes(content))
    damaged = Store(store.path).volume(1)
    np.testing.assert_array_equal(damaged.crop((2, 110, 80), (2, 80, 50)), VOLUME[2:4, 110:190, 80:130])
    with pytest.raises(Exception, match="cannot be read"):
        damaged.crop((2, 99, 80), (2, 80, 50))


@pytest.mark.parametrize(("side", "expected"), [(1, 1), (128, 128), (129, 65), (300, 100), (512, 128), (513, 103)])
def test_tiles_share_a_side_evenly(side: int, expected: int) -> None:
    assert tile(side) == expected


def test_shrinking_a_volume_keeps_every_voxel_where_it_was() -> None:
    """A ramp in mm, shrunk: the value of a pixel is still its place."""
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(64), np.arange(48), indexing="ij"), axis=-1)
    places = grid @ AFFINE[:3, :3].T + AFFINE[:3, 3]
    for axis in range(3):
        pixels = np.ascontiguousarray(places[..., axis], np.float32)
        given = Scan(pixels, (2.5, 0.75, 0.5), Path("v.nii"), kind="volume", affine=AFFINE.copy())
        kept = Keep("mri", 24, SiteKey(b"k" * 32))(given, pixels)
        assert kept.pixels.shape == (3, 32, 24)
        assert kept.source_size == (64, 48)
        assert kept.spacing == pytest.approx((2.5, 1.5, 1.0))
        small = np.stack(np.meshgrid(np.arange(3), np.arange(32), np.arange(24), indexing="ij"), axis=-1)
        expected = (small @ kept.affine[:3, :3].T + kept.affine[:3, 3])[..., axis]
        np.testing.assert_allclose(kept.pixels, expected, atol=1e-4)
