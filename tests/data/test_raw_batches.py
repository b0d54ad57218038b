import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import picture, write_shapes, write_store

from sslmed.config import DataError, UsageError
from sslmed.data import targets
from sslmed.data.annotations.writer import annotate
from sslmed.data.intensity import Intensity
from sslmed.data.loading import Batch, Collate, ViewDataset
from sslmed.data.modality import MODALITIES, with_views
from sslmed.data.positives import Positives
from sslmed.data.raw_batches import RawBatch, RawCollate, RawDataset
from sslmed.data.shards.format import LabelColumn
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store

SIZE = 32
XRAY = MODALITIES["xray"]
SHAPES = [(48, 60), (64, 40), (30, 30), (90, 70)]
DTYPES = ("uint8", "uint16", "int16", "float32")
FINDINGS = [
    (LabelColumn("edema", "binary", ("0", "1")), np.array([1, 0, -1, 1], np.int16)),
    (LabelColumn("mass", "binary", ("0", "1")), np.array([0, 1, -1, -1], np.int16)),
]


def waves(row: int) -> np.ndarray:
    """A picture of its own for each row, from 0 to 200."""
    height, width = SHAPES[row]
    rows, columns = np.mgrid[:height, :width]
    return np.asarray(100 + 100 * np.sin(rows / (4 + row)) * np.cos(columns / (7 - row)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four images of as many sizes and dtypes, of two patients."""
    path = tmp_path_factory.mktemp("raw") / "store"
    scans = [picture(waves(row).astype(DTYPES[row]), f"{row:064x}", 0, 200) for row in range(4)]
    write_store(path, scans, [f"{row // 3:032x}" for row in range(4)])
    annotate(path, labels=FINDINGS)
    return Store(path)


def raw(store: Store, rows: Any = range(4), epoch: int = 0, modality: Any = XRAY, **options: Any) -> RawBatch:
    arguments = {"size": SIZE, "channels": 1, "seed": 4, "target": None} | options
    dataset = RawDataset(store, modality, (modality.view, modality.view), **arguments)
    batch = RawCollate(4)([dataset[epoch, row] for row in rows])
    assert isinstance(batch, RawBatch)
    return batch


def usual(store: Store, rows: Any = range(4), epoch: int = 0, modality: Any = XRAY, **options: Any) -> Batch:
    arguments = {"size": SIZE, "channels": 1, "seed": 4, "target": None} | options
    dataset = ViewDataset(store, modality, (modality.view, modality.view), **arguments)
    batch = Collate(4)([dataset[epoch, row] for row in rows])
    assert isinstance(batch, Batch)
    return batch


def assert_alike(made: Batch, expected: Batch, level: float = 4 / 200) -> None:
    """To the rounding of whole numbers on the CPU, ``level`` apart, which gamma may steepen where it is dark."""
    for name in ("target", "ids", "groups"):
        assert torch.equal(getattr(made, name), getattr(expected, name))
        assert getattr(made, name).dtype == torch.int64
    assert (made.seed, made.epoch) == (expected.seed, expected.epoch)
    assert len(made.views) == len(expected.views)
    for one, two in zip(made.views, expected.views, strict=True):
        assert (one.shape, one.dtype) == (two.shape, torch.float32)
        assert (one - two).abs().mean() < level
        assert (one - two).abs().max() < 10 * level


def test_a_batch_becomes_the_one_of_the_cpu(store: Store) -> None:
    for epoch in (0, 3):
        batch = raw(store, (2, 0, 3, 1), epoch)
        assert batch.images[0].pixels.shape == (4, 90, 70, 1)
        assert len(batch.images) == 1
        assert_alike(batch.render(), usual(store, (2, 0, 3, 1), epoch))


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [((0, 0), "uint8"), ((0, 1), "uint16"), ((0, 2), "int16"), ((1, 2), "int32"), ((0, 3), "float32"), ((2,), "int16")],
)
def test_pixels_travel_in_the_smallest_dtype_that_holds_them(store: Store, rows: Any, dtype: str) -> None:
    pixels = raw(store, rows).images[0].pixels
    assert pixels.dtype == getattr(torch, dtype)
    for place, row in zip(pixels.numpy(), rows, strict=True):
        height, width = SHAPES[row]
        np.testing.assert_array_equal(place[:height, :width, 0], store.pixels(row))
        assert not place[height:].any()


def test_a_sample_is_the_same_in_any_batch(store: Store) -> None:
    modality = with_views(XRAY, {"noise": 0.2})
    whole = raw(store, (0, 1, 2, 3), modality=modality).render()
    other = raw(store, (3, 1), modality=modality).render()
    for one, two in zip(whole.views, other.views, strict=True):
        torch.testing.assert_close(two, one[[3, 1]], rtol=0, atol=2e-5)
    again = raw(store, (0, 1, 2, 3), modality=modality)
    again = pickle.loads(pickle.dumps(again))  # noqa: S301
    for _ in range(2):  # rendering takes nothing from it
        for one, two in zip(again.render().views, whole.views, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("wanted", ["edema", ("edema", "mass")])
def test_targets_come_along(store: Store, wanted: Any) -> None:
    target = targets.labels(store, wanted)
    assert_alike(raw(store, target=target).render(), usual(store, target=target))


def test_other_views_come_from_the_partner(store: Store) -> None:
    """The last patient has one image: it is its own partner."""
    positives = Positives("patient", store, np.arange(4), 5)
    for epoch in range(3):
        batch = raw(store, epoch=epoch, positives=positives)
        assert len(batch.images) == 2
        assert_alike(batch.render(), usual(store, epoch=epoch, positives=positives))
    own = raw(store, (3,), positives=positives)
    assert torch.equal(own.images[0].pixels, own.images[1].pixels)


def test_slices_of_volumes(tmp_path: Path) -> None:
    pixels = (np.random.default_rng(0).normal(size=(5, 24, 28)).cumsum(axis=2) * 100).astype(np.int16)
    scan = NewScan(pixels, Intensity(-1024, 1024, 0, 512), "0" * 64, kind="volume", spacing=(1.0, 1.0, 1.0))
    volume = write_store(tmp_path / "store", [scan], ["0" * 32], modality="ct")
    modality = with_views(MODALITIES["ct"], {"noise": 0.0, "rotate": 0.0})
    options = {"modality": modality, "slices": 3, "channels": 3}
    assert_alike(raw(volume, range(5), **options).render(), usual(volume, range(5), **options), level=4 / 2048)


def test_colour_and_grey_in_one_batch(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    pixels = [stream.integers(0, 256, shape, dtype=np.uint8) for shape in ((40, 44, 3), (50, 40), (33, 37, 3))]
    scans = [NewScan(each, Intensity(0, 255, 115, 57), f"{row:064x}") for row, each in enumerate(pixels)]
    photos = write_store(tmp_path / "store", scans, [f"{row:032x}" for row in range(3)], modality="photo")
    options = {"modality": MODALITIES["photo"], "channels": 3}
    batch = raw(photos, range(3), **options)
    assert batch.images[0].single.tolist() == [False, True, False]
    assert_alike(batch.render(), usual(photos, range(3), **options))


def test_an_error_is_handed_on(store: Store) -> None:
    dataset = RawDataset(store, XRAY, (XRAY.view,), SIZE, 1, 0, None)
    error = DataError("damaged")
    assert RawCollate(0)([dataset[0, 0], error]) is error
    colour = RawDataset(store, XRAY, (XRAY.view,), SIZE, 2, 0, None, slices=3)[0, 0]
    assert isinstance(colour, UsageError)
    assert "the store holds 3-channel images" in str(colour)


def test_masks_and_boxes_are_refused(tmp_path: Path) -> None:
    shapes = write_shapes(tmp_path / "store", patients=4)
    for target in (targets.masks(shapes), targets.boxes(shapes)):
        with pytest.raises(UsageError, match="no masks or boxes along; allowed targets: a class, findings, or none"):
            RawDataset(shapes, XRAY, (XRAY.view,), SIZE, 1, 0, target)


def test_it_moves_with_everything_but_the_numbers_that_were_drawn(store: Store) -> None:
    moved = raw(store, positives=Positives("patient", store, np.arange(4), 5)).to("meta", non_blocking=True)
    tensors = [moved.target, moved.ids, moved.groups]
    tensors += [tensor for images in moved.images for tensor in (images.pixels, images.intensity, images.single)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.drawn.device.type == "cpu"
    assert (moved.seed, moved.epoch) == (4, 0)


@pytest.mark.gpu
def test_a_gpu_fetches_and_renders_it(store: Store) -> None:
    modality = with_views(XRAY, {"noise": 0.2})
    batch = raw(store, positives=Positives("patient", store, np.arange(4), 5), modality=modality)
    made = batch.pin_memory().to("cuda", non_blocking=True).render()
    for one, two in zip(made.views, batch.render().views, strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=0, atol=1e-3)
