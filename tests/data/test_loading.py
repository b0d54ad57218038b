import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from stores import picture, write_store
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from sslmed.config import DataError, TemporaryError
from sslmed.data import loading, targets
from sslmed.data.annotations.writer import annotate
from sslmed.data.loading import (
    Batch,
    Collate,
    DataConfig,
    Sample,
    Shared,
    ViewDataset,
    plain_loader,
    stream_loader,
    tensors,
)
from sslmed.data.modality import MODALITIES
from sslmed.data.sampling import StreamSampler
from sslmed.data.shards.format import LabelColumn
from sslmed.data.store import Store
from sslmed.data.views import letterbox

SIZE = 32
XRAY = MODALITIES["xray"]


@pytest.fixture(scope="module")
def dataset(phantom_store: Store) -> ViewDataset:
    return ViewDataset(
        phantom_store, XRAY, (XRAY.view, XRAY.view), SIZE, 1, seed=0, target=targets.labels(phantom_store, "finding")
    )


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


def test_a_killed_worker_ends_the_stream(
    dataset: ViewDataset, phantom_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # how often torch looks whether its workers live, 5 s
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    ranks.context()
    before = set(multiprocessing.active_children())
    iterator = iter(stream_loader(dataset, StreamSampler(phantom_store.rows("train")[:8], 4, steps=500, seed=0), 2, 1))
    next(iterator)
    killed, _ = set(multiprocessing.active_children()) - before
    os.kill(killed.pid or 0, signal.SIGKILL)
    with pytest.raises(TemporaryError, match=r"for want of memory, of room in /dev/shm.*") as caught:
        list(iterator)
    assert "fewer data.workers" in str(caught.value)
    assert "--shm-size" in str(caught.value)
    assert set(multiprocessing.active_children()) == before, "the error that is kept keeps no worker"


def test_workers_that_are_left_end_with_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = list[Callable[[], None]]()
    monkeypatch.setattr("atexit.register", hooks.append)
    loading._end_workers_at_exit.cache_clear()
    for _ in range(2):
        loading._worker_options(1)
    (hook,) = hooks
    worker, other = (ranks.context().Process(target=time.sleep, args=(60,), daemon=ours) for ours in (True, False))
    for process in (worker, other):
        process.start()
    try:
        hook()
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL, "SIGTERM, which Python sends, they leave alone"
        assert other.is_alive()
    finally:
        other.kill()
        other.join()
        loading._end_workers_at_exit.cache_clear()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", TemporaryError),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", TemporaryError),
        ("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm)", TemporaryError),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nstack expects each tensor to be equal size",
            RuntimeError,
        ),
    ],
)
def test_a_worker_that_died_is_told_from_a_bug(
    message: str, error: type[Exception], dataset: ViewDataset, phantom_store: Store
) -> None:
    def fail(samples: list[Any]) -> Any:
        raise RuntimeError(message)

    sampler = StreamSampler(phantom_store.rows("train")[:8], 4, steps=5, seed=0)
    with pytest.raises(error) as caught:
        next(iter(stream_loader(dataset, sampler, 0, collate=fail)))
    assert type(caught.value) is error


def test_a_worker_shares_its_batch_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [Sample([torch.zeros(1, 8, 8)] * 2, row, torch.tensor(0), row, 0) for row in (5, 6)]
    assert not any(tensor.is_shared() for tensor in tensors(Shared(Collate(0))(samples)))
    monkeypatch.setattr(loading, "get_worker_info", lambda: "a worker")
    batch = Shared(Collate(0))(samples)
    assert len(list(tensors(batch))) == 5
    assert all(tensor.is_shared() for tensor in tensors(batch))
    error = DataError("a bad sample")
    assert Shared(Collate(0))([samples[0], error]) is error


def test_batches_are_made_ahead_and_pinned_as_asked(dataset: ViewDataset, phantom_store: Store) -> None:
    sampler = StreamSampler(phantom_store.rows("train")[:8], 4, steps=5, seed=0)
    loader = stream_loader(dataset, sampler, 1, prefetch=3, pin=True)
    assert (loader.num_workers, loader.prefetch_factor, loader.pin_memory) == (1, 3, True)
    loader = stream_loader(dataset, sampler, 0)
    assert (loader.num_workers, loader.prefetch_factor, loader.pin_memory) == (0, None, False)


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


def test_a_batch_is_fetched_while_the_program_goes_on_where_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = list[tuple[Any, Any]]()

    class Tensor(torch.Tensor):
        def is_pinned(self, device: Any = None) -> bool:
            return True

        def to(self, device: Any, non_blocking: bool) -> torch.Tensor:  # type: ignore[override]
            moves.append((device, non_blocking))
            return self

    plain = Batch([torch.zeros(2, 1, 4, 4)] * 2, *[torch.arange(2)] * 3, seed=3, epoch=4)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.as_subclass(Tensor))
    pinned = plain.pin_memory()
    assert (pinned.seed, pinned.epoch, len(pinned.views)) == (3, 4, 2)
    pinned.to("cuda")
    assert moves == [("cuda", True)] * 5
    pinned.to("cuda", non_blocking=False)
    assert moves[5:] == [("cuda", False)] * 5
    monkeypatch.setattr(Tensor, "is_pinned", torch.Tensor.is_pinned)  # from a GPU, or pageable memory: in order
    pinned.to("cuda")
    assert moves[10:] == [("cuda", False)] * 5


def test_views_of_several_sizes_stack_each_by_itself() -> None:
    samples = [
        Sample([torch.zeros(1, 8, 8), torch.zeros(1, 4, 4)], row, torch.tensor(0), row % 2, 2) for row in (5, 6, 7)
    ]
    batch = Collate(9)(samples)
    assert [view.shape for view in batch.views] == [(3, 1, 8, 8), (3, 1, 4, 4)]
    assert (batch.ids.tolist(), batch.seed, batch.epoch) == ([5, 6, 7], 9, 2)
    assert (batch.groups.tolist(), batch.groups.dtype) == ([1, 0, 1], torch.int64)


def test_it_can_be_sent_to_a_worker(dataset: ViewDataset, phantom_store: Store) -> None:
    row = int(phantom_store.rows("train")[0])
    before = dataset[0, row]
    after = pickle.loads(pickle.dumps(dataset))[0, row]  # noqa: S301
    assert torch.equal(before.views[0], after.views[0])


# Targets.

SEEN = (0, 1, 3)  # the rows that have a mask
EDEMA = (LabelColumn("edema", "binary", ("0", "1")), np.array([1, 0, -1, 1], np.int16))
MASS = (LabelColumn("mass", "binary", ("0", "1")), np.array([0, 1, -1, -1], np.int16))


def blob(row: int) -> np.ndarray:
    rows, columns = np.mgrid[:64, :80]
    return (255 * ((rows - 20 - 8 * row) ** 2 + (columns - 40) ** 2 < 300)).astype(np.uint8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four images, each of which shows its own mask."""
    path = tmp_path_factory.mktemp("masks") / "store"
    write_store(path, [picture(blob(row), f"{row:064x}") for row in range(4)], [f"{row:032x}" for row in range(4)])
    masks = [(row, blob(row) // 255) for row in SEEN]
    annotate(path, labels=[EDEMA, MASS], masks=masks, mask_classes=("background", "blob"))
    return Store(path)


def learnt(store: Store, target: targets.Target | None, tile: bool = False) -> Batch:
    dataset = ViewDataset(store, XRAY, (XRAY.view,), SIZE, 1, 0, target, tile=tile)
    samples = [dataset[0, row] for row in range(4)]
    batch = Collate(0)(samples)
    assert isinstance(batch, Batch)
    assert batch.target.dtype == torch.int64
    return batch


def test_classes_and_findings_of_a_batch(store: Store) -> None:
    assert learnt(store, targets.labels(store, "mass")).target.tolist() == [0, 1, -1, -1]
    findings = learnt(store, targets.labels(store, None)).target
    assert findings.tolist() == [[1, 0], [0, 1], [-1, -1], [1, -1]]


@pytest.mark.parametrize("tile", [False, True])
def test_masks_of_a_batch_lie_where_their_views_do(tile: bool, store: Store) -> None:
    batch = learnt(store, targets.masks(store), tile)
    assert batch.target.shape == (4, SIZE, SIZE)
    assert (batch.target[2] == 255).all()  # nobody has drawn one
    whole = learnt(store, None, tile).views[0]
    for row in SEEN:
        assert set(batch.target[row].unique().tolist()) <= {0, 1}
        bright = batch.views[0][row, 0] > batch.views[0][row].mean()
        assert ((batch.target[row] == 1) == bright).float().mean() > 0.95
        assert tile or torch.equal(batch.views[0][row], whole[row])  # the mask does not decide what is seen


def test_the_mask_of_a_stack_is_that_of_its_middle(store: Store) -> None:
    dataset = ViewDataset(store, XRAY, (XRAY.view,), SIZE, 3, 0, targets.masks(store), slices=3)
    sample = dataset[0, 1]
    assert isinstance(sample, Sample)
    assert sample.views[0].shape == (3, SIZE, SIZE)
    assert sample.target.shape == (SIZE, SIZE)


def test_a_tile_that_does_not_fit_is_an_error_of_the_batch(store: Store) -> None:
    error = ViewDataset(store, XRAY, (XRAY.view,), 72, 1, 0, None, tile=True)[0, 0]
    assert isinstance(error, DataError)
    assert "image of 64 x 80" in str(error)


def test_masks_are_sent_to_workers(store: Store) -> None:
    dataset = ViewDataset(store, XRAY, (XRAY.view,), SIZE, 1, 0, targets.masks(store), tile=True)
    before, after = dataset[2, 3], pickle.loads(pickle.dumps(dataset))[2, 3]  # noqa: S301
    assert isinstance(before, Sample)
    assert torch.equal(before.target, after.target)


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


# Settings.


@pytest.mark.parametrize(
    "settings",
    [
        *({"size": 8}, {"size": (32,)}, {"size": (32, 8)}, {"size": (32, 32, 32)}, {"sizes": 96}),
        *({"windows": ["lungs"]}, {"windows": [[40, 0]]}, {"slices": 2}, {"slices": 0}, {"slices": 33}),
        *(
            {"target": 5},
            {"target": [5]},
            {"workers": -1},
            {"workers": "many"},
            {"positives": "twin"},
            {"neighbour_mm": 0},
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DataConfig(**settings)


def test_a_target_is_one_name_or_several() -> None:
    for given, expected in (("a", "a"), (["a", "b"], ("a", "b")), (None, None)):
        read = DataConfig.model_validate_json(json.dumps({"target": given}), strict=True)  # as recipes are read
        assert read.target == expected
        assert DataConfig.model_validate_json(read.model_dump_json(), strict=True) == read
