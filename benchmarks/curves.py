"""Curves as PNG: label efficiency, and lines in panels."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLES = {"auroc": "test AUROC", "dice": "test Dice"}
COLOURS = {"random": "tab:grey", "imagenet": "tab:orange", "pretrained": "tab:blue"}
NAMES = {"random": "random weights", "imagenet": "ImageNet", "pretrained": "self-supervised"}


def curves(rows: list[dict[str, Any]], metric: str, title: str) -> bytes:
    """One line a start: the measure by number of labelled train patients, with 95 % intervals.

    Args:
        rows: of ``study.compared``, as plain dictionaries.
    """
    figure = Figure(figsize=(5.2, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    chosen = [row for row in rows if row["metric"] == metric]
    counts = sorted({row["patients"] for row in chosen})
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in chosen)):
        own = sorted((row for row in chosen if row["arm"] == arm), key=lambda row: row["patients"])
        x = [row["patients"] * 1.04 ** (number - 1) for row in own]  # side by side, or one bar would hide another
        y = [row["value"]["mean"] for row in own]
        below = [row["value"]["mean"] - row["value"]["low"] for row in own]
        above = [row["value"]["high"] - row["value"]["mean"] for row in own]
        axis.errorbar(
            x, y, [below, above], marker="o", ms=4, capsize=3, color=COLOURS.get(arm), label=NAMES.get(arm, arm)
        )
    axis.set_xscale("log")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("labelled train patients")
    axis.set_ylabel(TITLES.get(metric, metric))
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@dataclass(frozen=True)
class Panel:
    """One pair of axes: points (x, y) by the name of their line."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


def lines(panels: list[Panel], title: str, columns: int = 2) -> bytes:
    """Panels in rows of ``columns``, both axes from 0; a line has the same colour in each of them."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, number)
        for name, points in panel.lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, label=name) if points else axis.plot([], label=name)
        axis.set_xticks(sorted({x for points in panel.lines.values() for x, _ in points}))
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(panel.x)
        axis.set_ylabel(panel.y)
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        if number == 1:
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
