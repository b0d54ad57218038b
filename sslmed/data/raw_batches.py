"""From the store to batches of pixels as they are stored, of which a device makes the views (`DeviceViews`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from sslmed.config import SslmedError, UsageError
from sslmed.data.device_views import DeviceViews, Images
from sslmed.data.intensity import Intensity
from sslmed.data.loading import Batch, first_error
from sslmed.data.modality import Modality
from sslmed.data.positives import Positives
from sslmed.data.store import Store
from sslmed.data.targets import UNKNOWN, Target
from sslmed.data.views import Pixels, ViewConfig
from sslmed.image_size import ImageSize
from sslmed.keyed_rng import rng


@dataclass(frozen=True)
class RawSample:
    """What the views of one row are made of, before it is stacked.

    Attributes:
        images: the row's own as it is stored, (H, W) or (H, W, n), with its intensity, and that of its partner.
        drawn: (views, numbers), what happens to each view.
        target: int64, a row of a batch's.
        views: what renders them.
    """

    images: list[tuple[Pixels, Intensity]]
    drawn: npt.NDArray[np.float64]
    row: int
    target: torch.Tensor
    group: int
    epoch: int
    views: DeviceViews


@dataclass
class RawBatch:
    """What becomes a `Batch` on the device that it was moved to.

    Attributes:
        images: of the rows; where positives come from other images a second one, of which all views but the first are
            made.
        drawn: (views, N, numbers) float64; stays on the CPU, where the numbers decide what is computed.
        target, ids, groups, seed, epoch: as in `Batch`.
        views: what renders them.
    """

    images: list[Images]
    drawn: torch.Tensor
    target: torch.Tensor
    ids: torch.Tensor
    groups: torch.Tensor
    seed: int
    epoch: int
    views: DeviceViews

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> "RawBatch":
        """The batch on ``device``. By default the program goes on while a GPU fetches what lies in pinned memory."""
        if non_blocking is None:
            non_blocking = self.ids.is_pinned()
        target, ids, groups = (
            each.to(device, non_blocking=non_blocking) for each in (self.target, self.ids, self.groups)
        )
        images = [each.to(device, non_blocking) for each in self.images]
        return replace(self, images=images, target=target, ids=ids, groups=groups)

    def pin_memory(self) -> "RawBatch":
        """The batch where a GPU can fetch it by itself; a DataLoader calls this."""
        target, ids, groups = (each.pin_memory() for each in (self.target, self.ids, self.groups))
        images = [each.pin_memory() for each in self.images]
        return replace(self, images=images, target=target, ids=ids, groups=groups)

    def render(self) -> Batch:
        """The views, made where the batch is; a pure function of it."""
        sources = [self.images[0], *[self.images[-1]] * (len(self.drawn) - 1)]
        views = [
            self.views.render(number, images, drawn)
            for number, (images, drawn) in enumerate(zip(sources, self.drawn, strict=True))
        ]
        return Batch(views, self.target, self.ids, self.groups, self.seed, self.epoch)


class RawDataset(Dataset["RawSample | SslmedError"]):
    """What `ViewDataset` makes views of, and the numbers that it would draw for them; addressed by (epoch, row).

    Args:
        positives: where the views but the first come from; by default from the row itself.

    Raises:
        UsageError: masks or boxes for a target, which do not move along here, or a modality whose normalisation is
            not known on the device.
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
    ) -> None:
        if target is not None and target.kind in ("mask", "boxes"):
            raise UsageError(
                "views that a device makes take no masks or boxes along; allowed targets: a class, findings, or none. "
                "Augment on the CPU to learn masks or boxes: data.augment_on=cpu"
            )
        self.store = store
        self.views = DeviceViews(views, size, modality, channels)
        self.seed = seed
        self.target = target
        self.positives = positives
        self.slices = slices

    def __getitem__(self, address: tuple[int, int]) -> "RawSample | SslmedError":
        epoch, row = address
        try:
            return self._read(int(epoch), int(row))
        except SslmedError as error:
            return error

    def _read(self, epoch: int, row: int) -> RawSample:
        target = np.array(UNKNOWN) if self.target is None else self.target.of(row, self.store)
        sources, group = [row], row
        if self.positives is not None:
            group = int(self.positives.groups[row])
            sources.append(self.positives.partner(row, rng(self.seed, epoch, row, "partner")))
        images = [self._image(source) for source in dict.fromkeys(sources)]
        others = [images[-1][0].shape] * (len(self.views.configs) - 1)
        drawn = self.views.draw([images[0][0].shape, *others], seed=self.seed, epoch=epoch, sample=row)
        images += images[: len(sources) - len(images)]  # a row without a partner is its own
        return RawSample(images, drawn, row, torch.from_numpy(target.astype(np.int64)), group, epoch, self.views)

    def _image(self, row: int) -> tuple[Pixels, Intensity]:
        return self.store.pixels(row, self.slices), self.store.intensity(row)


class RawCollate:
    """Stacks raw samples into a RawBatch. An error among them is handed on, as `Collate` does."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, samples: "list[RawSample | SslmedError]") -> "RawBatch | SslmedError":
        return first_error(samples) or self.stack([sample for sample in samples if isinstance(sample, RawSample)])

    def stack(self, samples: list[RawSample]) -> RawBatch:
        """The batch of good samples."""
        return RawBatch(
            images=[Images.of(images) for images in zip(*(sample.images for sample in samples), strict=True)],
            drawn=torch.from_numpy(np.stack([sample.drawn for sample in samples], axis=1)),
            target=torch.stack([sample.target for sample in samples]),
            ids=torch.tensor([sample.row for sample in samples], dtype=torch.int64),
            groups=torch.tensor([sample.group for sample in samples], dtype=torch.int64),
            seed=self.seed,
            epoch=samples[0].epoch,
            views=samples[0].views,
        )
