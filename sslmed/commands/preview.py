"""``sslmed preview``: look at a store before a week of training, so that a wrong window is seen."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sslmed.config import OutputExistsError, UsageError
from sslmed.console import command, progress
from sslmed.data import modality
from sslmed.data.annotations.mask_values import VOID
from sslmed.data.input import check_channels, network_input, open_store
from sslmed.data.intensity import Intensity, Windowed
from sslmed.data.loading import DataConfig, ViewDataset
from sslmed.data.modality import Modality
from sslmed.data.previews import panels
from sslmed.data.previews.spread import choose
from sslmed.data.shards.format import KINDS
from sslmed.data.splits import SPLITS
from sslmed.data.store import Store
from sslmed.data.views import ViewConfig, placed
from sslmed.durable import write_atomically
from sslmed.methods import METHODS
from sslmed.models import backbones
from sslmed.recipe import PretrainRecipe, Recipe, load

MOST = 50  # images
VIEWS = 3
PLANES = 4  # network planes that are drawn of an image
CLIPPED = 0.2  # share of an image's pixels beyond its background
BACKGROUND = 0.1  # of the way from the least value to nearly the greatest: below it is air, or the ground
FLAT = 0.1  # standard deviation of what the network is given

Pixels = npt.NDArray[Any]


@dataclass(frozen=True)
class PreviewResult:
    """The pictures that `preview` drew, of which rows, and what looks wrong."""

    store: str
    modality: str
    pictures: tuple[str, ...]
    rows: tuple[int, ...]
    warnings: tuple[str, ...]
    next: str

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{len(self.rows)} {self.modality} images of {self.store}", *self.pictures]
        return lines + [f"warning: {warning}" for warning in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class _Look:
    """How images become network input: the modality with its windows and views, and the settings of the data."""

    policy: Modality
    views: tuple[ViewConfig, ...]
    data: DataConfig

    @property
    def windows(self) -> int:
        return modality.planes_of(self.policy)

    def ranges(self, intensity: Intensity) -> tuple[tuple[float, float], ...]:
        """(low, high) in stored units of each window."""
        if not isinstance(self.policy.normalise, Windowed):
            return ((intensity.low, intensity.high),)
        return tuple((level - width / 2, level + width / 2) for level, width in self.policy.normalise.windows)

    def names(self, colour: bool) -> dict[int, str]:
        """The planes that are drawn: of every window the middle slice, and its neighbours while there is room."""
        middle = self.data.slices // 2
        if colour:
            return {0: "network input"}
        near = sorted(range(self.data.slices), key=lambda number: abs(number - middle))
        chosen = [(window, number) for number in near for window in range(self.windows)][:PLANES]
        names = {}
        for window, number in sorted(chosen):
            parts = [_window_name(self.data.windows[window])] if self.windows > 1 else []
            if self.data.slices > 1:
                parts.append(f"slice {number - middle:+d}" if number != middle else "this slice")
            names[window * self.data.slices + number] = ", ".join(parts) or "network input"
        return names


def preview(
    store: Path | str, *, recipe: Path | str | None = None, out: Path | str | None = None, count: int = 6, seed: int = 0
) -> PreviewResult:
    """Draw images of a store: as stored, as the network is given them, augmented, with their histograms, masks, boxes.

    ``images.png`` has a row an image, ``volumes.png`` three planes through each of the volumes among them. Nothing in
    them says whose they are, unless pixels or class names do.

    Args:
        store: the store.
        recipe: whose size, windows, slices and views are shown; by default those of the modality.
        out: folder for the pictures; by default STORE-preview beside the store.
        count: how many images, from all splits and shapes.
        seed: which ones, and which views.

    Raises:
        UsageError: a wrong recipe, or one that does not go with the store.
        MissingInputError, DataError: no store, or one that is damaged.
        OutputExistsError: there is something in ``out``.
        DiskError: the pictures cannot be written.
    """
    if not 1 <= count <= MOST:
        raise UsageError(f"--count is {count}; allowed: 1 to {MOST}")
    opened = open_store(store)
    settings = load(recipe) if recipe is not None else None
    look = _look(opened, settings)
    folder = _folder(opened, out)
    rows = choose(opened, count, seed)
    classes = panels.Classes(opened.mask_classes, opened.box_classes)
    samples, warnings = [], []
    for row, sample in zip(rows, progress(_samples(opened, look, rows, seed), len(rows), "preview"), strict=True):
        samples.append(sample)
        warnings += [f"row {row}: {line}" for line in oddities(sample)]
    pictures = {"images.png": panels.images(samples, classes)}
    volumes = _volumes(opened, look, rows)
    if volumes:
        pictures["volumes.png"] = panels.cuts(volumes, classes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        with write_atomically(folder / name) as partial:
            partial.write_bytes(content)
    return PreviewResult(
        store=str(opened.path),
        modality=opened.modality,
        pictures=tuple(str(folder / name) for name in pictures),
        rows=tuple(rows),
        warnings=tuple(warnings),
        next=_next(opened, recipe, settings),
    )


def oddities(sample: panels.Shown) -> list[str]:
    """What looks wrong in an image: much of it beyond the window, or hardly anything left of it."""
    found = []
    values = sample.pixels.astype(np.float32)
    least, most = float(values.min()), float(np.percentile(values, 99.5))
    inside = values[values > least + BACKGROUND * (most - least)]
    for low, high in sample.ranges:
        for side, share in (("below", _share(inside < low)), ("above", _share(inside > high))):
            if share > CLIPPED:
                found.append(f"{share:.0%} of what is not background lies {side} the window from {low:g} to {high:g}")
    for number, plane in enumerate(sample.planes):
        if plane.std() < FLAT:
            where = f"plane {number} of its" if len(sample.planes) > 1 else "its"
            found.append(f"{where} network input is nearly flat: standard deviation {plane.std():.3f}")
    return found


# The steps.


def _look(store: Store, settings: Recipe | None) -> _Look:
    policy = modality.named(store.modality)
    if settings is None:
        return _Look(policy, (policy.view,), DataConfig(size=_usual_size(store)))
    policy = modality.with_views(modality.with_windows(policy, settings.data.windows), settings.views)
    views: tuple[ViewConfig, ...] = (policy.view,)
    if settings.backbone is not None:
        check_channels(settings.backbone.in_chans, store, policy, settings.data.slices)
    if isinstance(settings, PretrainRecipe):
        backbone = backbones.build(settings.backbone, settings.data.size, settings.train.seed)
        views = METHODS[settings.method.name](settings.method, backbone).views(policy)  # type: ignore[attr-defined]
    return _Look(policy, views, settings.data)


def _usual_size(store: Store) -> int:
    """Of a panel without a recipe: large enough to see, no larger than the images."""
    smaller = np.minimum(store.index.height, store.index.width)
    return int(np.clip(np.median(smaller), 64, 224))


def _folder(store: Store, out: Path | str | None) -> Path:
    folder = Path(out) if out is not None else store.path.with_name(f"{store.path.name}-preview")
    if folder.resolve().is_relative_to(store.path.resolve()):
        raise UsageError(f"--out {folder} lies inside the store; give another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is there already and not empty; remove it, or give another --out")
    return folder


def _samples(store: Store, look: _Look, rows: list[int], seed: int) -> Iterator[panels.Shown]:
    data = look.data
    for row in rows:
        pixels, intensity = store.pixels(row), store.intensity(row)
        stack = store.pixels(row, data.slices) if data.slices > 1 else pixels
        colour = pixels.ndim == 3
        channels = 3 if colour else data.slices * look.windows
        dataset = ViewDataset(store, look.policy, look.views, data.size, channels, seed, None, slices=data.slices)
        yield panels.Shown(
            title=_title(store, row),
            pixels=pixels,
            ranges=look.ranges(intensity),
            planes=network_input(stack, intensity, look.policy, data.size, channels).numpy(),
            names=look.names(colour),
            views=tuple(_views(dataset, row, len(look.views))),
            main=0 if colour else data.slices // 2,
            place=placed(pixels.shape[:2], data.size),
            aspect=_ratio(*store.scans.spacing[store.index.scan[row]][1:]),
            spacing=_spacing(store, row),
            mask=store.mask(row),
            boxes=store.boxes(row),
        )


def _views(dataset: ViewDataset, row: int, many: int) -> Iterator[Pixels]:
    """The views of the first epochs, until there are enough."""
    for number in range(VIEWS):
        sample = dataset[number // many, row]
        if isinstance(sample, Exception):
            raise sample
        yield sample.views[number % many].numpy()


def _title(store: Store, row: int) -> str:
    """Row, split and slice: never a name."""
    depth = int(store.scans.depth[store.index.scan[row]])
    part = f", slice {int(store.index.slice[row]) + 1} of {depth}" if depth > 1 else ""
    return f"row {row} ({SPLITS[store.index.split[row]]}){part}"


def _spacing(store: Store, row: int) -> str:
    known = [f"{side:.3g}" for side in store.scans.spacing[store.index.scan[row]] if np.isfinite(side)]
    return f"{' x '.join(known)} mm" if known else ""


def _volumes(store: Store, look: _Look, rows: list[int]) -> list[list[panels.Cut]]:
    """Three planes through each volume that has one of ``rows``."""
    scans = dict.fromkeys(int(store.index.scan[row]) for row in rows)
    return [_cuts(store, look, scan) for scan in scans if KINDS[store.scans.kind[scan]] == "volume"]


def _cuts(store: Store, look: _Look, scan: int) -> list[panels.Cut]:
    volume, first = store.volume(scan), int(store.scans.first[scan])
    depth = volume.shape[0]
    masks = [store.mask(row) for row in range(first, first + depth)] if store.mask_classes else [None] * depth
    held = [mask for mask in masks if mask is not None]
    whole = np.stack(held) if len(held) == depth else None
    middle = _middle(volume.shape[:3], whole)
    cuts = []
    for axis, (name, place) in enumerate(zip(("slice", "row", "column"), middle, strict=True)):
        down, across = (volume.spacing[other] for other in range(3) if other != axis)
        pixels = volume.slice(axis, place)
        # Slices that go up to the head are drawn with the head above.
        climbs = axis > 0 and volume.affine is not None and volume.affine[2, 0] > 0
        cuts.append(
            panels.Cut(
                title=f"rows from {first}, {name} {place + 1} of {volume.shape[axis]}",
                pixels=pixels,
                window=look.ranges(store.intensity(first))[0],
                aspect=_ratio(down, across),
                upside_down=climbs,
                mask=None if whole is None else np.take(whole, place, axis),
            )
        )
    return cuts


def _middle(shape: tuple[int, ...], mask: Pixels | None) -> list[int]:
    """The middle of the volume, or of what its mask marks."""
    places = [side // 2 for side in shape]
    if mask is not None and (marked := (mask > 0) & (mask < VOID)).any():
        for axis in range(3):
            others = tuple(other for other in range(3) if other != axis)
            places[axis] = int(marked.sum(axis=others).argmax())
    return places


def _share(where: Pixels) -> float:
    return float(where.mean()) if where.size else 0.0


def _ratio(down: float, across: float) -> float:
    return float(down / across) if np.isfinite([down, across]).all() else 1.0


def _window_name(window: str | tuple[float, float]) -> str:
    return window if isinstance(window, str) else f"{window[0]:g}/{window[1]:g}"


def _next(store: Store, recipe: Path | str | None, settings: Recipe | None) -> str:
    """The training that would see these images."""
    if settings is not None and not isinstance(settings, PretrainRecipe):
        return command("sslmed", "finetune", recipe, "--data", store.path, "--from", "RUN", "--out", "TUNED")
    if recipe is None:
        recipe = f"{store.modality}/simclr_resnet18"
    return command("sslmed", "pretrain", recipe, "--data", store.path, "--out", store.path.parent / "run")
