"""Curves drawn for the eye, as PNG."""

from collections.abc import Mapping
from io import BytesIO

from sslmed.evaluation.detected_boxes import Floats

DPI = 120
TICKS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def free_response(by_class: Mapping[str, tuple[Floats, Floats]], mean: tuple[Floats, Floats, Floats, Floats]) -> bytes:
    """Sensitivity over false positives an image (FROC), as bytes of a PNG file.

    Args:
        by_class: of each class rates and sensitivities, a step at each rate.
        mean: over classes: rates, sensitivities, lower and upper ends of the 95 % band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: it takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=DPI, layout="constrained")
    axis = figure.add_subplot()
    rates, sensitivity, low, high = mean
    axis.fill_between(rates, low, high, color="0.85", step="post", label="95 % band of the mean")
    if len(by_class) > 1:
        for name, (at, found) in by_class.items():  # the last sensitivity holds, however many more are false
            axis.step([*at, max(at[-1], TICKS[-1])], [*found, found[-1]], where="post", linewidth=1.2, label=name)
    axis.step(rates, sensitivity, where="post", color="black", linewidth=2, label="mean" if len(by_class) > 1 else "")
    axis.set_xscale("log", base=2)
    axis.set(xlim=(TICKS[0], TICKS[-1]), ylim=(0, 1.02), xlabel="false positives an image", ylabel="sensitivity")
    axis.set_xticks(TICKS, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    buffer = BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
