"""From the store to batches: the views of samples as tensors. `sslmed.data.sampling` says which a step gets."""

import atexit
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sslmed.config import Config, SslmedError, TemporaryError
from sslmed.data.input import as_tensor, network_input
from sslmed.data.intensity import window
from sslmed.data.modality import Modality
from sslmed.data.positives import Positives
from sslmed.data.sampling import Rows, StreamSampler
from sslmed.data.store import Store
from sslmed.data.targets import PADDING, UNKNOWN, Target, packed
from sslmed.data.views import ALL, Augment, Pixels, ViewConfig
from sslmed.data.workers import follow
from sslmed.image_size import ImageSize
from sslmed.keyed_rng import rng

MOST_WORKERS = 8
PREFETCH = 2
# What torch says of a worker that was killed, and of one that finds no room in /dev/shm. An error that a worker raised
# is a bug, and stays one.
DEATHS = ("DataLoader worker (pid", "shared memory")
FIRST, OTHERS = slice(0, 1), slice(1, None)


class DataConfig(Config):
    """What is read from the store.

    Attributes:
        size: of the network input, pixels: the side of a square, or height and width.
        workers: processes that prepare batches; ``auto`` is as many as keep up with training, 0 does the work in the
            trainer's process.
        augment_on: where views are made: by the ``cpu``, in the workers; or on the training's own ``device``, from
            images that workers only read (`sslmed.data.device_views`). Both make the same views, but for their noise.
        target: the label column that a head, or the kNN monitor, uses; by default the store's first, for a head all 0/1
            columns where that is one of several. For a head also a list of 0/1 columns, its findings.
        positives: where the views of a sample but the first come from: its own ``image``, or another one of the same
            patient, study or series (``sslmed.data.positives``).
        neighbour_mm: how far apart in their series two neighbours may lie.
        windows: of CT: the windows that are the network's channels, each a name of ``intensity.WINDOWS`` or (level,
            width) in HU; by default one, from -1024 to 1024 HU.
        slices: how many neighbouring slices of a volume, or frames of a clip, are the network's channels, an odd
            number; the scan's first and last are repeated beyond its ends.
    """

    size: ImageSize = 96
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    augment_on: Literal["cpu", "device"] = "cpu"
    target: str | tuple[str, ...] | None = None
    positives: Literal["image", "patient", "study", "neighbour"] = "image"
    neighbour_mm: Annotated[float, Field(gt=0)] = 5.0
    windows: Annotated[tuple[str | tuple[float, float], ...], Field(max_length=8)] = ()
    slices: Annotated[int, Field(ge=1, le=31)] = 1

    @field_validator("windows")
    @classmethod
    def _windows_exist(cls, windows: tuple[str | tuple[float, float], ...]) -> tuple[str | tuple[float, float], ...]:
        for each in windows:
            window(each)
        return windows

    @field_validator("slices")
    @classmethod
    def _slices_have_a_middle(cls, slices: int) -> int:
        if slices % 2 == 0:
            raise ValueError("allowed: an odd number, as many on either side")
        return slices


@dataclass
class Batch:
    """What a Method or a Head sees.

    Attributes:
        views: one tensor (N, C, H, W) a view, float32; sizes may differ between views.
        target: int64: class numbers (N,) or findings (N, K), -1 where nothing is known; or the masks (N, H, W) of the
            first views, 255 where a pixel counts for nothing. Of boxes float32 (N, M, 5): left, top, right and bottom
            in pixels of the first views, and the class number; M is the most of any image, at least 1, and images of
            fewer boxes end in rows of zeros whose class is `targets.PADDING`, -1.
        ids: store rows (N,), int64, which key every random choice together with ``seed`` and ``epoch``.
        groups: (N,), int64; samples of one number must not repel each other. All differ, unless positives come from
            other images: then there is a number for each patient.
    """

    views: list[torch.Tensor]
    target: torch.Tensor
    ids: torch.Tensor
    groups: torch.Tensor
    seed: int
    epoch: int

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "Batch":
        """The batch on ``device``. By default the program goes on while a GPU fetches what lies in pinned memory."""
        return self._each(
            lambda tensor: tensor.to(
                device=device, non_blocking=tensor.is_pinned() if non_blocking is None else non_blocking
            )
        )

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU fetches from by itself; a DataLoader calls this."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        target, ids, groups = map(change, (self.target, self.ids, self.groups))
        return replace(self, views=[change(view) for view in self.views], target=target, ids=ids, groups=groups)


@dataclass(frozen=True)
class Sample:
    """One scan's views before they are stacked; ``target`` is a row of a batch's, of boxes (n, 5) without padding."""

    views: list[torch.Tensor]
    row: int
    target: torch.Tensor
    group: int
    epoch: int


class ViewDataset(Dataset["Sample | SslmedError"]):
    """Augmented views of store rows, addressed by (epoch, row).

    With ``positives`` all views but the first are made of a partner of the row. With ``tile`` views are cut at the
    image's own resolution (`Augment`). A mask moves along with the first view, and so do boxes.
    """

    def __init__(
        self,
        store: Store,
        modality: Modality,
        views: Sequence[ViewConfig],
        size: ImageSize,
        channels: int,
        seed: int,
        target: Target | None,
        positives: Positives | None = None,
        slices: int = 1,
        tile: bool = False,
    ) -> None:
        self.store = store
        self.channels = channels
        self.slices = slices
        self.augment = Augment(views, size, modality.normalise, seed, tile=tile)
        self.target = target
        self.positives = positives

    def __getitem__(self, address: tuple[int, int]) -> "Sample | SslmedError":
        epoch, row = address
        try:
            views, target = self._views(epoch, row)
        except SslmedError as error:
            return error
        group = row if self.positives is None else int(self.positives.groups[row])
        return Sample([as_tensor(view, self.channels) for view in views], row, target, group, epoch)

    def _views(self, epoch: int, row: int) -> tuple[list[Pixels], torch.Tensor]:
        target: Any = np.array(UNKNOWN) if self.target is None else self.target.of(row, self.store)
        kind = "" if self.target is None else self.target.kind
        partner = row
        if self.positives is not None:
            partner = self.positives.partner(row, rng(self.augment.seed, epoch, row, "partner"))
        views: list[Pixels] = []
        for source, which in [(row, ALL)] if partner == row else [(row, FIRST), (partner, OTHERS)]:
            pixels, intensity = self.store.pixels(source, self.slices), self.store.intensity(source)
            if kind == "mask" and source == row:
                made, masks = self.augment.with_mask(pixels, target, intensity, epoch=epoch, sample=row, which=which)
                views, target = views + made, masks[0]
            elif kind == "boxes" and source == row:
                made, boxes = self.augment.with_boxes(pixels, target, intensity, epoch=epoch, sample=row, which=which)
                views, target = views + made, packed(boxes[0])
            else:
                views += self.augment(pixels, intensity, epoch=epoch, sample=row, which=which)
        return views, torch.from_numpy(target if kind == "boxes" else target.astype(np.int64))


class PlainDataset(Dataset["Sample | SslmedError"]):
    """The given rows as the network sees them outside training: whole image, no augmentation."""

    def __init__(
        self, store: Store, rows: Rows, modality: Modality, size: ImageSize, channels: int, slices: int = 1
    ) -> None:
        self.store, self.rows, self.modality, self.size = store, rows, modality, size
        self.channels, self.slices = channels, slices

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> "Sample | SslmedError":
        row = int(self.rows[position])
        try:
            pixels = self.store.pixels(row, self.slices)
        except SslmedError as error:
            return error
        view = network_input(pixels, self.store.intensity(row), self.modality, self.size, self.channels)
        return Sample([view], row, torch.tensor(UNKNOWN), row, 0)


class Loader(DataLoader[Any]):
    """A DataLoader that raises our own errors here, in the process that asked; ``arrived`` is called at each batch."""

    arrived: Callable[[], None] | None = None

    def __init__(self, dataset: Dataset[Any], **named: Any) -> None:
        """With a generator of its own, or each start would draw from the state that dropout-like layers use."""
        super().__init__(dataset, generator=torch.Generator(), **named)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        died = False
        try:
            for batch in super().__iter__():
                if isinstance(batch, SslmedError):
                    raise batch
                if self.arrived is not None:
                    self.arrived()
                yield batch
        except RuntimeError as error:
            if not any(sign in str(error) for sign in DEATHS):
                raise
            died = True
        if died:  # not where its traceback, which holds the other workers, would be kept
            raise TemporaryError(
                "a reading process died: for want of memory, of room in /dev/shm, or of "
                "`if __name__ == '__main__':` in your script.\n"
                "Try again with fewer data.workers; 0 needs no /dev/shm. A container gets more of it with --shm-size."
            )


def stream_loader(
    dataset: Dataset[Any],
    sampler: StreamSampler,
    workers: int,
    prefetch: int = PREFETCH,
    *,
    pin: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Loader:
    """Batches in stream order; the same with any number of workers.

    Args:
        prefetch: batches that each worker makes ahead.
        pin: put batches where a GPU fetches them by itself.
        collate: stacks the samples of ``dataset``; by default a `Collate`, for those of a `ViewDataset`.
    """
    stack = Shared(collate or Collate(sampler.seed))
    return Loader(
        dataset, batch_sampler=sampler, collate_fn=stack, pin_memory=pin, **_worker_options(workers, prefetch)
    )


def plain_loader(
    store: Store,
    rows: Rows,
    size: ImageSize,
    modality: Modality,
    *,
    channels: int,
    slices: int = 1,
    batch_size: int = 64,
    workers: int = 0,
) -> Loader:
    """Batches of one unaugmented view in the order of ``rows``."""
    dataset = PlainDataset(store, rows, modality, size, channels, slices)
    return Loader(dataset, batch_size=batch_size, collate_fn=Shared(Collate(0)), **_worker_options(workers))


class Shared:
    """Stacks samples with ``collate``; a worker puts the batch into shared memory at once.

    Left to the thread that sends it, a full /dev/shm would be printed there, and the trainer would wait for ever
    (measured with torch 2.13).
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        if get_worker_info() is not None:
            for tensor in tensors(batch):
                tensor.share_memory_()
        return batch


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Those that a batch carries, in dataclasses and lists."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, list | tuple):
        for each in batch:
            yield from tensors(each)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from tensors(getattr(batch, field.name))


class Collate:
    """Stacks samples into a Batch. An error among them is handed on: raised in a worker it would become a traceback."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, samples: "list[Sample | SslmedError]") -> "Batch | SslmedError":
        return first_error(samples) or self.stack([sample for sample in samples if isinstance(sample, Sample)])

    def stack(self, samples: list[Sample]) -> Batch:
        """The batch of good samples."""
        views = [torch.stack(parts) for parts in zip(*(sample.views for sample in samples), strict=True)]
        target = _stacked([sample.target for sample in samples])
        ids = torch.tensor([sample.row for sample in samples], dtype=torch.int64)
        groups = torch.tensor([sample.group for sample in samples], dtype=torch.int64)
        return Batch(views, target, ids, groups, self.seed, samples[0].epoch)


def _stacked(targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Those of a batch; boxes, which alone are float32, padded to the most of any image."""
    if not targets[0].is_floating_point():
        return torch.stack(list(targets))
    longest = max(1, *map(len, targets))
    padded = targets[0].new_zeros(len(targets), longest, 5)
    padded[..., 4] = PADDING
    for place, boxes in zip(padded, targets, strict=True):
        place[: len(boxes)] = boxes
    return padded


def first_error(samples: Sequence[Any]) -> SslmedError | None:
    """The first of the samples that could not be read."""
    return next((sample for sample in samples if isinstance(sample, SslmedError)), None)


def _worker_options(workers: int, prefetch: int = PREFETCH) -> dict[str, Any]:
    if not workers:
        return {"num_workers": 0}
    _end_workers_at_exit()
    # not fork: a child forked after torch or OpenCV started threads can hang
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # else each worker imports torch by itself, for seconds
    start = functools.partial(follow, os.getpid())
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "worker_init_fn": start,
        "prefetch_factor": prefetch,
    }


@functools.cache
def _end_workers_at_exit() -> None:
    """Python would send those that are left a SIGTERM, which they leave alone (`follow`), and wait for ever."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
