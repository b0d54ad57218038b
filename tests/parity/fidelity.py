"""Writes docs/fidelity.md from the same measurements that test_parity.py holds to their bars.

PYTHONPATH=tests:tests/parity python tests/parity/fidelity.py
"""

import math
from collections.abc import Sequence
from pathlib import Path

import measure
import torch
from case import Case
from cases import CASES

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
FLAT = (0.0, -2.0, 1.5)
LOSS_COLUMNS = (
    "method", "loss", "formula", "formula: value", "gradient", "lightly: value", "gradient",
    "two processes: value", "gradient",
)  # fmt: skip
METHOD_COLUMNS = ("method", "parameter gradients: 1 − cosine", "norm ratio − 1", "bf16, relative", "flat images")
COMMAND = "PYTHONPATH=tests:tests/parity python tests/parity/fidelity.py"
TEXT = f"""# Fidelity

Written by `{COMMAND}`; do not edit.
`tests/parity` holds every number to its bar.

Each loss against the paper's formula, written independently as loops in float64 (`tests/parity/*_formulas.py`), and
against lightly where that computes the same. "value" is the absolute difference; "gradient" is the largest difference
over the largest gradient, taken by projections, predictions or logits. "two processes" are two gloo ranks with half of
the rows each, gradients averaged as DDP does, against one process. No loss is excused: where a reference looks within a
process, as DINOv2's for KoLeo, this package looks at all. Figures are rounded up to a power of ten; the bar is 1e-6. A
gather without gradient, the usual mistake, leaves the value right and misses the gradient's bar by five orders of
magnitude: a test shows it.

{{losses}}

The whole method on a small network: gradients of all parameters by two processes against one (float64, GroupNorm in
place of BatchNorm; bars 1e-6 and 1e-5), the loss under bf16 autocast, relative (bar 1e-2; SimSiam's, which runs from -1
to 1, over 1), and images of one grey level ({", ".join(f"{level:g}" for level in FLAT)} in normalised units), whose
loss and gradients must be finite.

{{methods}}
"""


def page() -> str:
    """The whole page, measured now."""
    torch.set_num_threads(1)
    losses = [_loss_row(case) for case in CASES]
    methods = [_method_row(name) for name in dict.fromkeys(case.method for case in CASES)]
    return TEXT.format(losses=_table(LOSS_COLUMNS, losses), methods=_table(METHOD_COLUMNS, methods))


def _loss_row(case: Case) -> list[str]:
    oracles = [measure.against(case, case.formula)]
    oracles.append(measure.against(case, case.lightly) if case.lightly else (math.nan, math.nan))
    oracles.append(measure.two_processes(case))
    return [case.method, case.name, case.source, *(bound(number) for pair in oracles for number in pair)]


def _method_row(name: str) -> list[str]:
    cosine, ratio = measure.parameter_gradients(name)
    flat = "finite" if all(measure.flat_is_finite(name, level) for level in FLAT) else "not finite"
    return [name, bound(abs(1 - cosine)), bound(abs(ratio - 1)), bound(measure.bf16(name)), flat]


def bound(number: float) -> str:
    """The power of ten that a difference stays below: rounding differs between machines."""
    if math.isnan(number):
        return ""
    return "0" if number == 0 else f"1e{max(-12, math.ceil(math.log10(number)))}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
