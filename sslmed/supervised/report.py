"""The test scores of a fine-tuned model as a page: every metric, every class, every subgroup, and what they rest on."""

import math
from collections.abc import Iterable, Mapping

from sslmed.evaluation.comparison import title
from sslmed.supervised.scoring import REPLICATES, Settled, Tested, Triple
from sslmed.supervised.task import Task


def markdown(task: Task, tested: Tested, settled: Settled) -> str:
    """The page as Markdown."""
    parts = [
        f"# Test scores of '{task.target.name}'",
        f"{len(task.test)} test images of {task.patients(task.test)} patients; 95 % intervals by {REPLICATES} "
        "bootstrap replicates of test patients. They cover the choice of test patients, not that of train patients, "
        "nor the randomness of training.",
        _table("metric", {_title(name, tested.unit): [text(value)] for name, value in tested.overall.items()}, ["all"]),
    ]
    if tested.by_class:
        parts += ["## By class", _by(tested.by_class, tested.unit)]
    for name, scores in tested.others.items():
        parts += [f"## {name[:1].upper() + name[1:]}", _by({"all": scores}, tested.unit)]
    for column in dict.fromkeys(group.column for group in tested.subgroups):
        groups = {
            f"{group.name} ({group.images} of {group.patients} patients)": group.scores
            for group in tested.subgroups
            if group.column == column
        }
        parts += [f"## By {column}", _by(groups, tested.unit)]
    if tested.subgroups:
        parts.append("Of many groups one looks worse by chance: take these as questions, not as answers.")
    parts += [*_settled(task, settled), *(f"- {note}" for note in (*task.skipped, *tested.notes))]
    return "\n\n".join(parts) + "\n"


def text(value: Triple) -> str:
    """``0.912 [0.880, 0.941]``, or ``undefined``."""
    if math.isnan(value[0]):
        return "undefined"
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _settled(task: Task, settled: Settled) -> list[str]:
    parts = []
    if settled.about:
        figures = ", ".join(
            f"{name.removeprefix('val_').replace('_', ' ')} {v:.3f}" for name, v in settled.about.items()
        )
        parts.append(f"Calibration on val ({task.patients(task.val)} patients): {figures}.")
    if settled.thresholds is not None:
        cuts = zip(task.target.classes, settled.thresholds, strict=True)
        parts.append(f"Called from a probability of: {', '.join(f'{name} {cut:.3f}' for name, cut in cuts)}.")
    return parts


def _by(scores: Mapping[str, Mapping[str, Triple]], unit: str) -> str:
    metrics = dict.fromkeys(metric for each in scores.values() for metric in each)
    rows = {name: [text(each[metric]) for metric in metrics] for name, each in scores.items()}
    return _table("", rows, [_title(metric, unit) for metric in metrics])


def _table(corner: str, rows: Mapping[str, Iterable[str]], columns: Iterable[str]) -> str:
    header = [corner, *columns]
    lines = [header, ["---"] * len(header), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _title(metric: str, unit: str) -> str:
    return title(metric).replace("(", f"({unit}, ") if metric in ("hd95", "asd") else title(metric)
