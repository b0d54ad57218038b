"""The page that methods.py writes: which method for which images, every score, and what pretraining took."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import xrays
from method_sets import AVERAGES, BUDGET, MOMENTUM, PCA, REPLICATES, SEEDS, SIZE, STEPS, TUNE_SEEDS, TUNED

from sslmed.evaluation import comparison
from sslmed.methods import METHODS

if TYPE_CHECKING:
    from methods import Bench

SHOWN_PROBE, SHOWN_BUDGET = "linear", "10%"  # of the table of choice
BETTER, WORSE = "better than random", "worse than random"


def page(benches: "Mapping[str, Bench]", command: str) -> str:
    """All of it, from finished cells; what is missing is computed."""
    probed = [bench for bench in benches.values() if bench.about.target]
    dice, segmented = "", ""
    if len(probed) < len(benches):
        dice = f", and Dice after fine-tuning on {_few()} ultrasound images"
        segmented = ", and in segmentation timm's first ones of the network"
    sections = "\n".join(_probed(bench) if bench.about.target else _segmented(bench) for bench in benches.values())
    return f"""# Pretext tasks side by side

Written by `{command}`; do not edit.

{_protocol(benches)}

## Which method for my data

Frozen features, a {SHOWN_PROBE} probe from {SHOWN_BUDGET} of the labels{dice}; mean [95 %].
In brackets behind: the difference to random weights. "=" is no difference shown, "−" worse than random. Random weights
are those that a method began with; beside `imagenet` and `continued` those of their network, beside `pca` those of
SimCLR's{segmented}. `time` and `memory` are those of a training step beside SimCLR's (`method_costs.py`).

{_choice(benches)}

{_words(benches)}

{sections}
## What pretraining took

{_took(benches)}
"""


def _probed(bench: "Bench") -> str:
    return f"## {bench.name.capitalize()}\n\n{_scores(bench)}"


def _segmented(bench: "Bench") -> str:
    changed = ", ".join(f"`{each}`" for each in TUNED)
    return f"""## Segmentation of {bench.name} from {_few()} images

{bench.about.title}: {_sizes(bench)}. Pretrained on the train images, then fine-tuned on {_few()} of them,
{len(TUNE_SEEDS)} seeds of draw, head and order; the masks of as many val images choose the step. One setting for all
networks, that of `{bench.store.modality}/segmentation` with {changed}.
Dice on test images, mean over structures [95 %, {REPLICATES} bootstraps of images, which cover neither another seed of
pretraining nor other draws], each beside its network with timm's first weights. A restorative method hands over its
decoder too, so that only the last layer is drawn; with `backbone` behind its name it hands over the backbone alone, as
the masked methods do.

{_dice(bench)}
"""


def captioned(recipe: str, bench: "Bench", arm: str, page: str) -> str:
    """The recipe's text with steps, minutes and score in its first line, if that cites the page."""
    first, rest = recipe.split("\n", 1)
    if page not in first:
        return recipe
    title, found = first.partition(": ")[0], bench.probe(arm)
    own, random = (_row(found, each, SHOWN_PROBE, SHOWN_BUDGET) for each in (arm, "random"))
    if own is None or random is None:
        return f"{title}: stopped by a monitor (docs/{page})\n{rest}"
    made = bench.cells.made(f"{bench.name}-pretrain-{arm}")
    took = f"{bench.steps(arm)} steps" + (f" with momentum {MOMENTUM[arm]}" if arm in MOMENTUM else "")
    took += f", {made['cpu_seconds'] / 60:.0f} CPU minutes" if "CPU" in made["device"] else ""
    scores = [xrays.number(row["value"]["mean"]) for row in (own, random)]
    budget = SHOWN_BUDGET.replace("%", " %")
    return f"{title}: {took}, AUROC {scores[0]} from {budget} of labels, random {scores[1]} (docs/{page})\n{rest}"


def _protocol(benches: "Mapping[str, Bench]") -> str:
    probed = [bench for bench in benches.values() if bench.about.target]
    parts = "\n".join(f"- **{bench.name}**: {bench.about.title}; {_sizes(bench)}." for bench in probed)
    return f"""{parts}

Every method gets as many steps as cost what {STEPS} of SimCLR do on X-rays, in fp32; {_spent(benches)} {SIZE}
pixels, and the settings of the method's X-ray recipe, chosen for trainings of 100 epochs. Only what is in the way of so
few steps was changed: where a moving average leaves the run, {_momenta()} (constant). Of its random start such an
average keeps {_kept(benches)}. Two methods had a second try: I-JEPA with a lower rate, now its recipe's, after its
tokens had collapsed; and DINO, whose average had kept a third of the start, without gain.

AUROC on test images, mean over {len(SEEDS)} draws of labels [95 %, {REPLICATES} bootstraps of test patients; where no
patients are known, of images], ± the standard deviation over draws. Random weights are drawn anew for every draw;
differences are paired by test patient. Intervals hold for these draws and for one seed of pretraining: they cover the
choice of test patients alone. Many arms stand beside each other, and nothing is corrected for that. Minutes are
little, and methods differ in how soon they begin to learn; what wins after days is another question (the papers'
numbers: each method's page).

`imagenet` is the frozen ImageNet network, `continued` goes on from it with SimCLR, `pca` are principal components of
the pixels of all train images."""


def _spent(benches: "Mapping[str, Bench]") -> str:
    """CPU seconds where a CPU computed, and where a GPU did."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for name, bench in benches.items():
        for arm in (arm for arm in bench.arms if arm in METHODS):
            made = bench.cells.made(f"{name}-pretrain-{arm}")
            found["CPU" in made["device"]].append(made["cpu_seconds"])
    told = f"{min(found[True]):.0f} to {max(found[True]):.0f} CPU seconds where a CPU took them" if found[True] else ""
    return f"that was {told}{', beside another process' if told else ''}; a GPU did where the last table says so."


def _momenta() -> str:
    return ", ".join(f"`{arm}` has momentum {momentum}" for arm, momentum in MOMENTUM.items())


def _kept(benches: "Mapping[str, Bench]") -> str:
    bench = next(iter(benches.values()))
    return ", ".join(f"{math.prod(bench.momenta(arm)):.0%} (`{arm}`)" for arm in AVERAGES)


def _few() -> str:
    return BUDGET.removeprefix("k=")


def _sizes(bench: "Bench") -> str:
    rows = {side: bench.store.rows(side) for side in ("train", "val", "test")}
    return ", ".join(f"{len(each)} {side} images" for side, each in rows.items())


def _row(rows: list[dict[str, Any]], arm: str, probe: str, budget: str) -> dict[str, Any] | None:
    wanted = {"arm": arm, "probe": probe, "budget": budget}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _shown(row: dict[str, Any] | None) -> str:
    if row is None:
        return "failed"
    if row["difference"]["mean"] is None:
        return f"{xrays.interval(row['value'])} (no difference computable)"
    sign = "" if row["verdict"].startswith(BETTER) else " −" if row["verdict"].startswith(WORSE) else " ="
    return f"{xrays.interval(row['value'])} ({row['difference']['mean']:+.3f}{sign})"


def _picked(bench: "Bench") -> dict[str, dict[str, Any] | None]:
    """The row of each arm that the table of choice shows."""
    if not bench.about.target:
        arms = [arm for arm in bench.arms if arm in METHODS]
        return {arm: next((row for row in bench.dice(arm) if row["arm"] == arm), None) for arm in arms}
    return {arm: _row(bench.probe(arm), arm, SHOWN_PROBE, SHOWN_BUDGET) for arm in bench.arms}


def _choice(benches: "Mapping[str, Bench]") -> str:
    picked = {name: _picked(bench) for name, bench in benches.items()}
    first, rows = next(iter(benches.values())), []
    for arm in first.arms:
        cells = [_shown(found[arm]) if arm in found else "" for found in picked.values()]
        rows.append([arm, "" if arm == PCA else first.family(arm), *cells, *_cost(first, arm)])
    return xrays.grid(["method", "network", *(f"{name}" for name in picked), "time", "memory"], rows)


def _cost(bench: "Bench", arm: str) -> list[str]:
    if arm not in METHODS:
        return ["", ""]
    found = bench.cells.result(f"cost-{arm}")
    return [f"{found['with views']:.2f}", f"{found['memory']:.2f}"]


def _words(benches: "Mapping[str, Bench]") -> str:
    """What the table says of each set: who leads, and who shows nothing."""
    lines = []
    for bench in benches.values():
        found = {arm: row for arm, row in _picked(bench).items() if row is not None}
        if not found:
            lines.append(f"- **{bench.name}**: every arm failed.")
            continue
        best = max(found, key=lambda arm: found[arm]["value"]["mean"])
        level = found[best]["value"]["low"]
        near = [arm for arm in found if arm != best and found[arm]["value"]["mean"] >= level]
        nulls = [arm for arm in found if "no difference" in found[arm]["verdict"]]
        worse = [arm for arm in found if found[arm]["verdict"].startswith(WORSE)]
        line = f"- **{bench.name}**: the highest mean is that of `{best}`"
        line += f"; in its interval lie the means of {_list(near)}" if near else "; no other mean lies in its interval"
        line += f". No difference to random weights shown: {_list(nulls)}."
        line += f" Worse than random weights: {_list(worse)}."
        lines.append(line)
    return "\n".join(lines)


def _list(arms: list[str]) -> str:
    return ", ".join(f"`{arm}`" for arm in arms) or "none"


def _scores(bench: "Bench") -> str:
    parts = []
    for probe in comparison.PROBES:
        rows = []
        for budget in bench.about.budgets.split(","):
            random: dict[str, tuple[dict[str, Any], list[str]]] = {}  # by what it scores: where arms begin alike
            for arm in bench.arms:
                found = bench.probe(arm)
                row = _row(found, arm, probe, budget)
                if row is None:
                    rows.append([budget, bench.family(arm), arm, "failed", "", ""])
                    continue
                rows.append(_line(row, budget, bench.family(arm)))
                begin = _row(found, "random", probe, budget) or {}
                random.setdefault(bench.family(arm) + str(begin["value"]), (begin, []))[1].append(arm)
            for begin, arms in random.values():
                name = f"random ({', '.join(arms)})"
                rows.append(_line(begin | {"arm": name}, budget, bench.family(arms[0])))
        parts.append(
            f"### {bench.name}, {probe}\n\n"
            + xrays.grid(["labels", "network", "arm", "AUROC ± sd over draws", "less random", "verdict"], rows)
            + "\n"
        )
    return "\n".join(parts)


def _line(row: dict[str, Any], budget: str, family: str) -> list[str]:
    difference = xrays.interval(row["difference"], "+")
    spread = "" if row["draw_sd"] is None else f" ± {row['draw_sd']:.3f}"
    network = "" if row["arm"] == PCA else family
    return [budget, network, row["arm"], xrays.interval(row["value"]) + spread, difference, row["verdict"] or ""]


def _dice(bench: "Bench") -> str:
    rows = []
    for arm in (arm for arm in bench.arms if not arm.startswith("random")):
        found = bench.dice(arm)
        own, random = (next((row for row in found if row["arm"] == each), None) for each in (arm, "random"))
        if own is None or random is None:
            rows.append([arm, bench.family(arm), "failed", "", "", ""])
            continue
        values = [xrays.interval(own["value"]), xrays.interval(random["value"]), xrays.interval(own["difference"], "+")]
        rows.append([arm, bench.family(arm), *values, own["verdict"]])
    return xrays.grid(["method", "network", "Dice", "random", "difference", "verdict"], rows)


def _took(benches: "Mapping[str, Bench]") -> str:
    rows = []
    for name, bench in benches.items():
        for arm in bench.arms:
            if arm not in METHODS and arm != "continued":
                continue
            result = bench.pretrained(arm)
            made = bench.cells.made(f"{name}-pretrain-{arm}")
            last = result.get("failed") or ", ".join(f"{key} {value}" for key, value in result["metrics"].items())
            about = [f"{made['cpu_seconds']:.0f}", made["device"], made["commit"]]
            rows.append([name, arm, str(result.get("steps", "")), last, *about])
    return xrays.grid(["images", "method", "steps", "at the end", "CPU seconds", "device", "commit"], rows)
