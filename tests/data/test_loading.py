import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import ranks
import torch

from sslmed.config import DataError, UsageError
from sslmed.data.input import check_channels, network_input, open_store
from sslmed.data.intensity import Intensity
from sslmed.data.loading import (
    MOST_WORKERS,
    Batch,
    Collate,
    DataConfig,
    StreamSampler,
    ViewDataset,
    plain_loader,
    steps_per_epoch,
    stream_loader,
)
from sslmed.data.modality import MODALITIES, with_windows
from sslmed.data.store import Store
from sslmed.data.views import letterbox

SIZE = 32
XRAY, PHOTO = MODALITIES["xray"], MODALITIES["photo"]
ROWS = np.array([3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])

Address = tuple[int, int]


def stream(batch_size: int = 4, steps: int = 12, seed: int = 0, **how: int) -> list[list[Address]]:
    return list(StreamSampler(ROWS, batch_size, steps, seed, **how))


def between(low: float, high: float) -> Intensity:
    return Intensity(low, high, (low + high) / 2, (high - low) / 4)


def flat(batches: list[list[Address]]) -> list[Address]:
    return [address for batch in batches for address in batch]


# Which samples.


def test_the_order_is_a_function_of_the_seed_alone() -> None:
    assert stream(seed=1) == stream(seed=1)
    assert stream(seed=1) != stream(seed=2)
    before = stream(seed=1)
    torch.manual_seed(5)
    np.random.seed(5)
    assert stream(seed=1) == before
    assert stream(seed=1, steps=20)[:12] == before  # a longer training begins like a shorter one


def test_every_epoch_is_a_permutation_of_its_own_without_repeats() -> None:
    batches = stream(batch_size=4, steps=12)  # eleven rows: two steps an epoch, three rows left out
    assert steps_per_epoch(len(ROWS), 4) == 2
    orders = []
    for epoch in range(6):
        addresses = flat(batches[2 * epoch : 2 * epoch + 2])
        assert {number for number, _ in addresses} == {epoch}
        rows = [row for _, row in addresses]
        assert len(set(rows)) == len(rows) == 8
        assert set(rows) < set(ROWS.tolist())
        orders.append(tuple(rows))
    assert len(set(orders)) == 6
    assert {row for order in orders for row in order} == set(ROWS.tolist())  # the left-out rows differ


@pytest.mark.parametrize("start", [0, 1, 2, 3, 5, 11, 12])
def test_a_resumed_stream_is_the_tail_of_the_whole(start: int) -> None:
    assert stream(start=start) == stream()[start:]


def test_the_length_is_of_the_whole_stream_even_when_resumed() -> None:
    """Lightning counts its batches from the start of the stream."""
    assert len(StreamSampler(ROWS, 4, 12, 0)) == len(StreamSampler(ROWS, 4, 12, 0, start=7)) == 12
    assert len(StreamSampler(ROWS, 4, 12, 0, accumulate=2)) == 24


def test_ranks_take_slices_of_the_same_global_batch() -> None:
    whole = stream()
    slices = [stream(rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*slices, strict=True)] == whole
    assert {len(batch) for rank in slices for batch in rank} == {2}


@pytest.mark.parametrize("start", [0, 3])
def test_accumulated_parts_join_to_the_same_global_batch(start: int) -> None:
    parts = stream(accumulate=2, start=2 * start)
    joined = [parts[number] + parts[number + 1] for number in range(0, len(parts), 2)]
    assert joined == stream(start=start)


def test_ranks_and_parts_together() -> None:
    """Each part is a global micro-batch, of which each rank takes its slice."""
    slices = [stream(rank=rank, world_size=2, accumulate=2) for rank in range(2)]
    micro = [first + second for first, second in zip(*slices, strict=True)]
    assert micro == stream(accumulate=2)


def test_more_samples_a_step_than_images_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"train\.batch_size is 12, but there are 11 .*train\.batch_size=11"):
        StreamSampler(ROWS, 12, 1, 0)
    assert steps_per_epoch(11, 11) == 1


@pytest.mark.parametrize("how", [{"accumulate": 3}, {"world_size": 3}, {"accumulate": 2, "world_size": 4}])
def test_a_batch_that_cannot_be_divided_is_a_usage_error(how: dict[str, int]) -> None:
    parts = how.get("accumulate", 1) * how.get("world_size", 1)
    with pytest.raises(UsageError, match=rf"train\.batch_size is 4.* {parts}"):
        StreamSampler(ROWS, 4, 1, 0, **how)


# What is made of them.


@pytest.fixture(scope="module")
def dataset(phantom_store: Store) -> ViewDataset:
    return ViewDataset(phantom_store, XRAY, (XRAY.view, XRAY.view), SIZE, 1, seed=0, target="finding")


def batches(dataset: ViewDataset, store: Store, workers: int, start: int = 0) -> Iterator[Batch]:
    sampler = StreamSampler(store.rows("train")[:8], 4, steps=5, seed=0, start=start)
    return iter(stream_loader(dataset, sampler, workers))


def assert_same(one: Batch, two: Batch) -> None:
    assert torch.equal(one.ids, two.ids)
    assert torch.equal(one.target, two.target)
    assert (one.seed, one.epoch) == (two.seed, two.epoch)
    for first, second in zip(one.views, two.views, strict=True):
        assert torch.equal(first, second)


def test_workers_give_the_same_samples_in_the_same_order(dataset: ViewDataset, phantom_store: Store) -> None:
    ranks.context()  # workers come from one forkserver that has the heavy imports done
    alone = list(batches(dataset, phantom_store, 0))
    iterator = batches(dataset, phantom_store, 2)
    helped = [next(iterator)]
    workers = multiprocessing.active_children()
    assert len(workers) >= 2
    for worker in workers:  # a Ctrl-C reaches them too, and the parent still wants to finish its step
        os.kill(worker.pid or 0, signal.SIGINT)
        os.kill(worker.pid or 0, signal.SIGTERM)
    helped += iterator
    assert len(alone) == len(helped) == 5
    for one, two in zip(alone, helped, strict=True):
        assert_same(one, two)
    resumed = list(batches(dataset, phantom_store, 0, start=3))
    for one, two in zip(alone[3:], resumed, strict=True):
        assert_same(one, two)


def test_a_batch_says_everything_that_a_method_needs(dataset: ViewDataset, phantom_store: Store) -> None:
    seen = list(batches(dataset, phantom_store, 0))
    assert [batch.epoch for batch in seen] == [0, 0, 1, 1, 2]
    target = phantom_store.target("finding")
    for batch in seen:
        assert [view.shape for view in batch.views] == [(4, 1, SIZE, SIZE)] * 2
        assert {view.dtype for view in batch.views} == {torch.float32}
        assert not torch.equal(*batch.views)
        assert batch.target.tolist() == target[batch.ids.numpy()].tolist()
        assert batch.seed == 0
        assert torch.equal(batch.groups, batch.ids)  # every image repels every other one
    first_epoch = {int(row): view for batch in seen[:2] for row, view in zip(batch.ids, batch.views[0], strict=True)}
    for batch in seen[2:4]:
        for row, view in zip(batch.ids, batch.views[0], strict=True):
            assert not torch.equal(view, first_epoch[int(row)])  # no epoch repeats an augmentation


def test_without_a_target_labels_are_minus_one(phantom_store: Store) -> None:
    dataset = ViewDataset(phantom_store, XRAY, (XRAY.view,), SIZE, 1, seed=0, target=None)
    assert next(batches(dataset, phantom_store, 0)).target.tolist() == [-1] * 4


def test_a_batch_moves_with_everything_it_holds() -> None:
    batch = Batch([torch.zeros(2, 1, 4, 4)] * 2, torch.zeros(2), torch.arange(2), torch.arange(2), seed=3, epoch=4)
    moved = batch.to("meta", non_blocking=True)
    assert {tensor.device.type for tensor in (*moved.views, moved.target, moved.ids, moved.groups)} == {"meta"}
    assert (moved.seed, moved.epoch) == (3, 4)


def test_views_of_several_sizes_stack_each_by_itself() -> None:
    from sslmed.data.loading import Sample

    samples = [Sample([torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)], row, 0, row % 2, 2) for row in (5, 6, 7)]
    batch = Collate(9)(samples)
    assert [view.shape for view in batch.views] == [(3, 1, 8, 8), (3, 1, 4, 4)]
    assert (batch.ids.tolist(), batch.seed, batch.epoch) == ([5, 6, 7], 9, 2)
    assert (batch.groups.tolist(), batch.groups.dtype) == ([1, 0, 1], torch.int64)


def test_it_can_be_sent_to_a_worker(dataset: ViewDataset, phantom_store: Store) -> None:
    row = int(phantom_store.rows("train")[0])
    before = dataset[0, row]
    after = pickle.loads(pickle.dumps(dataset))[0, row]  # noqa: S301
    assert torch.equal(before.views[0], after.views[0])


# Whole images.


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_plain_batches_come_in_the_order_of_the_rows(batch_size: int, phantom_store: Store) -> None:
    rows = phantom_store.rows("val")[[4, 0, 3, 1]]
    loader = plain_loader(phantom_store, rows, SIZE, XRAY, channels=1, batch_size=batch_size)
    seen = list(loader)
    assert len(seen) == -(-4 // batch_size)
    assert torch.cat([batch.ids for batch in seen]).tolist() == rows.tolist()
    images = torch.cat([batch.views[0] for batch in seen])
    for row, image in zip(rows.tolist(), images, strict=True):
        intensity = phantom_store.intensity(row)
        boxed = letterbox(phantom_store.pixels(row), SIZE, intensity.low)
        expected = XRAY.normalise(boxed, intensity)
        np.testing.assert_array_equal(image[0].numpy(), expected)


def test_an_input_that_is_not_square(phantom_store: Store) -> None:
    rows, size = phantom_store.rows("val")[:3], (32, 48)
    (batch,) = plain_loader(phantom_store, rows, size, XRAY, channels=1)
    assert batch.views[0].shape == (3, 1, 32, 48)
    assert torch.equal(batch.groups, batch.ids)
    views = ViewDataset(phantom_store, XRAY, (XRAY.view, XRAY.view), size, 3, seed=0, target=None)[0, int(rows[0])]
    assert [view.shape for view in views.views] == [(3, 32, 48)] * 2


def test_network_input_pads_with_the_darkest_value() -> None:
    image = np.full((10, 40), 3000, np.uint16)
    tensor = network_input(image, between(1000, 3000), XRAY, 40, 1)
    assert tensor.shape == (1, 40, 40)
    assert tensor[0, 20, 20] == 2
    assert tensor[0, 0, 0] == -2


def test_grey_is_repeated_for_a_network_with_colour_input() -> None:
    image = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    one, three = (network_input(image, between(0, 4095), XRAY, SIZE, channels) for channels in (1, 3))
    assert three.shape == (3, SIZE, SIZE)
    assert torch.equal(three, one.expand(3, -1, -1))


def test_colour_goes_channels_first_and_never_into_a_grey_network() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 2] = 255
    tensor = network_input(image, between(0, 255), PHOTO, 8, 3)
    assert tensor.shape == (3, 8, 8)
    assert (tensor[2] > 2).all()
    assert (tensor[:2] < 0).all()
    with pytest.raises(UsageError, match=r"backbone\.in_chans is 1.*3-channel"):
        network_input(image, between(0, 255), PHOTO, 8, 1)


# Windows and slices.


class Volumes(NamedTuple):
    """As much of a store as is asked how many planes an image has."""

    channels: int
    depth: int

    @property
    def index(self) -> Any:
        return SimpleNamespace(channels=np.array([self.channels]))

    @property
    def scans(self) -> Any:
        return SimpleNamespace(depth=np.array([1, self.depth]))


@pytest.mark.parametrize(
    ("channels", "held", "windows", "slices", "words"),
    [
        (1, Volumes(1, 9), (), 1, None),
        (3, Volumes(1, 9), (), 1, None),  # a single plane is repeated
        (3, Volumes(1, 9), ("lung", "bone", "brain"), 1, None),
        (9, Volumes(1, 9), ("lung", "bone", "brain"), 3, None),
        (1, Volumes(1, 9), ("lung", "bone"), 1, r"in_chans is 1, but an image becomes 2 windows; set .*in_chans=2"),
        (3, Volumes(1, 9), ("lung", "bone"), 3, r"an image becomes 3 slices x 2 windows; set backbone\.in_chans=6"),
        (1, Volumes(1, 9), (), 5, r"an image becomes 5 slices; set backbone\.in_chans=5"),
        (1, Volumes(3, 1), (), 1, r"the store holds 3 channels; set backbone\.in_chans=3"),
        (3, Volumes(1, 1), (), 3, r"data\.slices is 3, but the store holds single images only"),
        (9, Volumes(3, 4), (), 3, r"data\.slices is 3, but the store holds images in colour"),
    ],
)
def test_the_planes_of_an_image_must_be_the_channels_of_the_network(
    channels: int, held: Any, windows: tuple[str, ...], slices: int, words: str | None
) -> None:
    policy = with_windows(MODALITIES["ct"], windows)
    if words is None:
        check_channels(channels, held, policy, slices)
        return
    with pytest.raises(UsageError, match=words):
        check_channels(channels, held, policy, slices)


def test_windows_and_slices_are_planes_of_the_input() -> None:
    stack = np.random.default_rng(0).integers(-1024, 1024, (20, 24, 3)).astype(np.int16)
    policy = with_windows(MODALITIES["ct"], ("lung", "bone"))
    intensity = policy.intensity(stack)
    found = network_input(stack, intensity, policy, 32, 6)
    assert found.shape == (6, 32, 32)
    for number, name in enumerate(("lung", "bone")):
        for place in range(3):
            alone = with_windows(MODALITIES["ct"], (name,))
            expected = network_input(stack[..., place], intensity, alone, 32, 1)
            assert torch.equal(found[3 * number + place], expected[0])
    assert (found[:, 0, 0] == -2).all()  # what the letterbox adds is air
    with pytest.raises(UsageError, match=r"in_chans is 3.*6-channel"):
        network_input(stack, intensity, policy, 32, 3)


def test_a_store_of_another_policy_is_not_opened(phantom_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(phantom_store.path).fingerprint == phantom_store.fingerprint
    other = replace(XRAY, record={"percentiles": [2, 98], "of": "image"})
    monkeypatch.setitem(MODALITIES, "xray", other)
    with pytest.raises(DataError, match=r"made by another policy for xray.*percentiles \[0.5, 99.5\] there, \[2, 98\]"):
        open_store(phantom_store.path)


# Settings.


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 0), (3, 1), (6, 4), (64, MOST_WORKERS)])
def test_auto_leaves_two_cores_to_the_trainer(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert DataConfig().worker_count() == workers
    assert DataConfig(workers=5).worker_count() == 5


@pytest.mark.parametrize(
    "settings",
    [
        *({"size": 8}, {"size": (32,)}, {"size": (32, 8)}, {"size": (32, 32, 32)}, {"sizes": 96}),
        *({"windows": ["lungs"]}, {"windows": [[40, 0]]}, {"slices": 2}, {"slices": 0}, {"slices": 33}),
        *({"workers": -1}, {"workers": "many"}, {"positives": "twin"}, {"neighbour_mm": 0}),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DataConfig(**settings)
