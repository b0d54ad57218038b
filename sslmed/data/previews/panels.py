"""Images of a store beside what a network is given of them, drawn for the eye. No picture says whose it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch, Rectangle

from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.mask_values import VOID

SHOWN = 2.5  # network input is drawn from -SHOWN to SHOWN, whatever its own values
LARGEST = 1024  # pixels a side of a raw panel; a larger image is drawn from every second, third, ... pixel
MOST_NAMES = 6  # boxes of an image whose class is written beside them; of more the colour tells
COLOURS = ("tab:orange", "cyan", "lime", "red", "yellow", "magenta", "dodgerblue", "white", "tab:brown", "black")
PANEL = 2.0, 2.3  # inches, width and height
DPI = 100

Pixels = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Shown:
    """One image and what becomes of it.

    Attributes:
        title: what to write above it.
        pixels: as stored, (H, W) or (H, W, 3).
        ranges: (low, high) in stored units of each window.
        planes: what the network is given, (C, h, w).
        names: of the planes that are drawn, by their number; of colour one for all three.
        views: (C, h, w) each, of which the plane ``main`` is drawn.
        place: top, left, height and width of the image inside (h, w).
        aspect: height of a stored pixel, in its widths; ``spacing`` in words.
        mask: class numbers (H, W).
        boxes: in stored pixels.
    """

    title: str
    pixels: Pixels
    ranges: tuple[tuple[float, float], ...]
    planes: Pixels
    names: dict[int, str]
    views: tuple[Pixels, ...]
    place: tuple[int, int, int, int]
    main: int = 0
    aspect: float = 1.0
    spacing: str = ""
    mask: npt.NDArray[np.uint8] | None = None
    boxes: Boxes | None = None

    @property
    def colour(self) -> bool:
        """Whether the planes are red, green and blue."""
        return self.pixels.ndim == 3


@dataclass(frozen=True, eq=False)
class Cut:
    """A plane through a volume: pixels (a, b), mask of the same shape, and the height of a pixel in its widths."""

    title: str
    pixels: Pixels
    window: tuple[float, float]
    aspect: float
    upside_down: bool
    mask: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Classes:
    """Names of the classes of masks, whose first is the background, and of boxes."""

    masks: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()


def images(samples: Sequence[Shown], classes: Classes) -> bytes:
    """A PNG with a row for each image: raw, network input, views, histograms."""
    inputs = max(len(sample.names) for sample in samples)
    views = max(len(sample.views) for sample in samples)
    columns = 1 + inputs + views
    figure = _figure(columns + 1.4, len(samples))
    grid = figure.add_gridspec(len(samples), columns + 1, width_ratios=[1] * columns + [1.4])
    for row, sample in enumerate(samples):
        axes = [figure.add_subplot(grid[row, column]) for column in range(columns)]
        for axis in axes:
            axis.set_axis_off()
        _raw(axes[0], sample, classes)
        for axis, number in zip(axes[1:], sample.names, strict=False):
            _network(axis, sample, number, classes)
        for number, (axis, view) in enumerate(zip(axes[1 + inputs :], sample.views, strict=False), start=1):
            _planes(axis, view, sample, sample.main, f"view {number}")
        histograms = grid[row, columns].subgridspec(2, 1)
        _histograms(figure.add_subplot(histograms[0]), figure.add_subplot(histograms[1]), sample)
    _legend(figure, classes)
    return _png(figure)


def cuts(rows: Sequence[Sequence[Cut]], classes: Classes) -> bytes:
    """A PNG with a row for each volume: its planes side by side, pixels as wide and high as they are in the patient."""
    figure = _figure(1.5 * max(map(len, rows)), 1.5 * len(rows))
    grid = figure.add_gridspec(len(rows), max(map(len, rows)))
    for row, planes in enumerate(rows):
        for column, cut in enumerate(planes):
            axis = figure.add_subplot(grid[row, column])
            axis.set_axis_off()
            axis.imshow(cut.pixels, cmap="gray", vmin=cut.window[0], vmax=cut.window[1], aspect=cut.aspect)
            axis.set_title(cut.title, fontsize=7)
            if cut.mask is not None:
                height, width = cut.pixels.shape[:2]
                _overlay(axis, cut.mask, (-0.5, width - 0.5, height - 0.5, -0.5), classes, cut.aspect)
            if cut.upside_down:
                axis.invert_yaxis()
    _legend(figure, Classes(classes.masks))
    return _png(figure)


# The panels.


def _raw(axis: Axes, sample: Shown, classes: Classes) -> None:
    height, width = sample.pixels.shape[:2]
    step = -(-max(height, width) // LARGEST)
    low, high = float(sample.pixels.min()), float(sample.pixels.max())
    unit = (sample.pixels[::step, ::step].astype(np.float32) - low) / (high - low if high > low else 1)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(unit, cmap="gray", vmin=0, vmax=1, extent=extent, aspect=sample.aspect)
    shape = " x ".join(map(str, sample.pixels.shape))
    told = f"{sample.pixels.dtype.name} {shape}, {low:.4g} to {high:.4g}"
    axis.set_title("\n".join(line for line in (sample.title, told, sample.spacing) if line), fontsize=6)
    if sample.mask is not None:
        _overlay(axis, sample.mask[::step, ::step], extent, classes, sample.aspect)
    if sample.boxes is not None:
        _boxes(axis, sample.boxes, (0, 0), (1, 1), classes)


def _network(axis: Axes, sample: Shown, number: int, classes: Classes) -> None:
    _planes(axis, sample.planes, sample, number, sample.names[number])
    top, left, height, width = sample.place
    if sample.mask is not None:
        extent = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
        _overlay(axis, sample.mask, extent, classes, 1)
        axis.set(xlim=(-0.5, sample.planes.shape[2] - 0.5), ylim=(sample.planes.shape[1] - 0.5, -0.5))
    if sample.boxes is not None:
        scale = height / sample.pixels.shape[0], width / sample.pixels.shape[1]
        _boxes(axis, sample.boxes, (top, left), scale, classes)


def _planes(axis: Axes, planes: Pixels, sample: Shown, number: int, title: str) -> None:
    if sample.colour:
        axis.imshow(np.clip((np.moveaxis(planes, 0, -1) + SHOWN) / (2 * SHOWN), 0, 1))
    else:
        axis.imshow(planes[number], cmap="gray", vmin=-SHOWN, vmax=SHOWN)
    axis.set_title(title, fontsize=7)


def _overlay(
    axis: Axes, mask: Pixels, extent: tuple[float, float, float, float], classes: Classes, aspect: float
) -> None:
    """Every class but the first in its colour, its edge opaque; what is ignored in grey."""
    colours = np.zeros((256, 4))
    for number in range(1, len(classes.masks)):
        colours[number] = (*_colour(number - 1), 0.35)
    colours[VOID] = (0.6, 0.6, 0.6, 0.5)
    painted = colours[mask]
    around = np.pad(mask, 1, mode="edge")
    edge = np.zeros(mask.shape, bool)
    for down, across in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= mask != around[down : down + mask.shape[0], across : across + mask.shape[1]]
    painted[..., 3] = np.where(edge & (painted[..., 3] > 0), 0.9, painted[..., 3])
    axis.imshow(painted, extent=extent, interpolation="nearest", aspect=aspect)


def _boxes(axis: Axes, boxes: Boxes, corner: tuple[float, float], scale: tuple[float, float], classes: Classes) -> None:
    """Corners count from the outer edge of the first pixel, panels from its centre."""
    for (left, top, right, bottom), number in zip(boxes.xyxy.tolist(), boxes.classes.tolist(), strict=True):
        x, y = corner[1] + left * scale[1] - 0.5, corner[0] + top * scale[0] - 0.5
        size = (right - left) * scale[1], (bottom - top) * scale[0]
        colour = _colour(len(classes.masks) + number)
        axis.add_patch(Rectangle((x, y), *size, fill=False, edgecolor=colour, linewidth=0.8))
        if len(boxes) <= MOST_NAMES:
            axis.text(x, y, classes.boxes[number], color=colour, fontsize=5, va="bottom", clip_on=True)


def _histograms(stored: Axes, given: Axes, sample: Shown) -> None:
    """Stored intensities with the ends of the windows, and the values that the network is given."""
    values = sample.pixels.reshape(-1, sample.pixels.shape[2] if sample.colour else 1).astype(np.float32)
    for channel, line in enumerate(_lines(sample.colour)):
        if channel < values.shape[1]:
            stored.hist(values[:, channel], bins=128, histtype="step", color=line, linewidth=0.8, log=True)
    for number, (low, high) in enumerate(sample.ranges):
        style = ("-", "--", ":", "-.")[number % 4]
        for end in (low, high):
            stored.axvline(end, color="tab:red", linewidth=0.8, linestyle=style)
    first = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in sample.ranges)
    stored.set_title(f"stored; low and high red: {first}", fontsize=6, pad=2)
    numbers = range(len(sample.planes)) if sample.colour else list(sample.names)
    for number, line in zip(numbers, _lines(sample.colour), strict=False):
        inside = np.clip(sample.planes[number].ravel(), -SHOWN, SHOWN)
        given.hist(inside, bins=100, range=(-SHOWN, SHOWN), histtype="step", color=line, linewidth=0.8, log=True)
    spread = ", ".join(f"{sample.planes[number].mean():.2f} ± {sample.planes[number].std():.2f}" for number in numbers)
    given.set_title(f"network input: {spread}", fontsize=6, pad=2)
    for axis in (stored, given):
        axis.tick_params(labelsize=5, length=2, pad=1)
        axis.yaxis.set_visible(False)


def _lines(colour: bool) -> tuple[str, ...]:
    return ("tab:red", "tab:green", "tab:blue") if colour else ("black", "tab:blue", "tab:orange", "tab:green")


def _legend(figure: Figure, classes: Classes) -> None:
    patches = [
        Patch(facecolor=_colour(number), label=name)
        for number, name in [
            *((number, name) for number, name in enumerate(classes.masks[1:])),
            *((len(classes.masks) + number, name) for number, name in enumerate(classes.boxes)),
        ][:20]
    ]
    if patches:
        figure.legend(handles=patches, loc="outside lower left", ncols=10, fontsize=7, frameon=False)


def _colour(number: int) -> tuple[float, float, float]:
    """That of a class: they can be told apart on grey, pink and purple, and then begin again."""
    return to_rgb(COLOURS[number % len(COLOURS)])


def _figure(columns: float, rows: float) -> Figure:
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.3), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03)  # type: ignore[union-attr, call-arg]
    return figure


def _png(figure: Figure | SubFigure) -> bytes:
    file = BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})  # type: ignore[arg-type, no-untyped-call]
    return file.getvalue()
