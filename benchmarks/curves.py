"""Label-efficiency curves as PNG."""

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
