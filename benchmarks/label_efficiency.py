"""Does pretraining on X-rays help when labels are few? By patient, with intervals.

    python benchmarks/label_efficiency.py --source ../shared/data/xray_pneumonia

Arms: SimCLR by the shipped recipe, a plain loop with lightly's NT-Xent for the same epochs, and random weights, all
resnet18 at 96 pixels; frozen with a logistic regression, and fine-tuned. Fills benchmarks/results/label_efficiency/
cell by cell and writes docs/label_efficiency.md; a stopped table goes on where it was.
"""

import argparse
import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import plain_loop
import torch
import xrays
from cells import Cells
from torch import nn

import sslmed
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.evaluation import metrics, predictions, probes, protocol
from sslmed.models.backbones import BackboneConfig, build

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results" / "label_efficiency", HERE.parent / "docs" / "label_efficiency.md"
COMMAND = "python benchmarks/label_efficiency.py --source ../shared/data/xray_pneumonia"
RECIPE, FINETUNE_RECIPE = "xray/simclr_resnet18", "xray/classification"
SIZE, TARGET = plain_loop.SIZE, "label"
BUDGETS, SEEDS, REPLICATES = "1%,10%,100%", tuple(range(5)), 2000
EPOCHS = 6  # of both pretrained arms; the recipe's own default is more
FINETUNE_STEPS = {"1%": 40, "10%": 80, "100%": 160}  # the same for every start
ARMS = ("random", "plain", "sslmed")
_PAIRS = tuple((budget, reference) for budget in FINETUNE_STEPS for reference in ("random", "plain"))
Scores = dict[str, dict[str, list[npt.NDArray[np.float64]]]]  # budget -> arm -> one (N, K) a draw


def main() -> None:
    """Compute what is missing, then write the table."""
    arguments = _arguments()
    bench = Benchmark(arguments.source, arguments.work)
    for stage in arguments.only or ("plain", "sslmed", "linear", "finetune-random", "finetune-sslmed", "table"):
        bench.run(stage)


class Benchmark:
    """The stages of the table, each a set of cells."""

    def __init__(self, source: Path, work: Path) -> None:
        self.work, self.store = work, xrays.open_store(source, work)
        self.cells = Cells(RESULTS, COMMAND)

    def run(self, stage: str) -> None:
        """Compute one stage."""
        if stage == "plain":
            self._cell("pretrain-plain", lambda: plain_loop.pretrain(self.store, EPOCHS, 0, self.work / "plain.pt"))
        elif stage == "sslmed":
            self._cell("pretrain-sslmed", self._pretrain, recipe=xrays.recipe_text(RECIPE))
        elif stage == "linear":
            self._linear()
        elif stage.startswith("finetune-"):
            self._finetune(stage.removeprefix("finetune-"))
        elif stage == "table":
            self._table()

    def _cell(self, name: str, compute: Callable[[], dict[str, Any]], **settings: Any) -> dict[str, Any]:
        return self.cells.run(name, compute, epochs=EPOCHS, split=self.store.split_digest, **settings)

    def _pretrain(self) -> dict[str, Any]:
        shutil.rmtree(self.work / "sslmed", ignore_errors=True)  # whole in one sitting, or its CPU time would not count
        overrides = [f"train.epochs={EPOCHS}", "monitor.knn_every=0", "data.workers=0"]
        result = sslmed.pretrain(RECIPE, self.store.path, self.work / "sslmed", overrides=overrides)
        return {"steps": result.steps, "loss": round(result.metrics["loss"], 4)}

    def _weights(self, arm: str) -> str:
        """What a later cell depends on."""
        if arm == "random":
            return "random"
        return sha256(
            self.work / "plain.pt" if arm == "plain" else self.work / "sslmed" / "artifact" / "model.safetensors"
        )

    def _network(self, arm: str, seed: int) -> nn.Module:
        """The frozen network of an arm; random weights are drawn anew for each label draw."""
        if arm == "sslmed":
            return sslmed.load_backbone(self.work / "sslmed")
        network = build(BackboneConfig(name="resnet18", in_chans=1), SIZE, seed).network
        if arm == "plain":
            network.load_state_dict(torch.load(self.work / "plain.pt", weights_only=True))
        return network

    def _linear(self) -> None:
        """Logistic regression on frozen features: scores of each arm and draw, and their table by budget."""
        if all(self._known(f"linear-{budget}-against-{reference}") for budget, reference in _PAIRS):
            return
        target, test, train = (
            self.store.target(TARGET),
            xrays.labelled(self.store, "test", TARGET),
            xrays.labelled(self.store, "train", TARGET),
        )
        scores: Scores = {}
        for arm in ARMS:
            features: dict[int, tuple[Any, Any]] = {}
            for seed in SEEDS:
                if arm == "random" or not features:
                    features[seed] = (self._embed(arm, seed, train), self._embed(arm, seed, test))
                known = features.get(seed, next(iter(features.values())))
                for draw in self._draws(train, seed):
                    one = probes.linear_scores(
                        known[0][draw.rows], target[train][draw.rows], known[1], len(self.store.classes(TARGET))
                    )
                    scores.setdefault(draw.budget.text, {}).setdefault(arm, []).append(one)
        for budget, arms in scores.items():
            for reference in ("random", "plain"):
                name = f"linear-{budget}-against-{reference}"
                self._cell(
                    name,
                    lambda arms=arms, reference=reference: _summary(self.store, arms, target[test], test, reference),
                    **self._linear_settings(),
                )

    def _finetune(self, arm: str) -> None:
        for seed in SEEDS:
            for budget, steps in FINETUNE_STEPS.items():
                name = f"finetune-{arm}-{budget}-{seed}"
                self._cell(
                    name,
                    lambda budget=budget, seed=seed, steps=steps: self._finetune_one(arm, budget, seed, steps),
                    steps=steps,
                    start=self._weights(arm),
                    recipe=xrays.recipe_text(FINETUNE_RECIPE),
                )

    def _finetune_one(self, arm: str, budget: str, seed: int, steps: int) -> dict[str, Any]:
        out = self._finetuned(arm, budget, seed)
        overrides = [
            f"data.target={TARGET}", f"labels.budget={budget}", f"labels.seed={seed}", f"train.seed={seed}",
            f"train.max_steps={steps}", "stop.check_every=40", "data.workers=0",
        ]  # fmt: skip
        start: Path | str = self.work / "sslmed"
        if arm == "random":
            start, overrides = "random", [*overrides, "backbone.name=resnet18", f"data.size={SIZE}"]
        result = sslmed.finetune(
            FINETUNE_RECIPE, self.store.path, out, start=start, overrides=overrides, resume=out.exists()
        )
        return {"auroc": result.test["auroc"][0], "images": result.train_images, "patients": result.train_patients}

    def _finetuned(self, arm: str, budget: str, seed: int) -> Path:
        return self.work / f"finetuned-{arm}-{budget}-{seed}"

    def _table(self) -> None:
        finetuned = {}
        for budget in FINETUNE_STEPS:
            runs = {arm: [self._finetuned(arm, budget, seed) for seed in SEEDS] for arm in ("random", "sslmed")}
            finetuned[budget] = self._cell(
                f"finetune-{budget}-against-random",
                lambda runs=runs: _as_json(predictions.compare(runs, "random", REPLICATES)),
                steps=FINETUNE_STEPS[budget],
                start=self._weights("sslmed"),
                recipe=xrays.recipe_text(FINETUNE_RECIPE),
            )
        linear = {
            (budget, reference): self._read(f"linear-{budget}-against-{reference}") for budget, reference in _PAIRS
        }
        TABLE.write_text(_markdown(self.store, self.cells, linear, finetuned), encoding="utf-8")

    def _known(self, name: str) -> dict[str, Any] | None:
        return self.cells.finished(name, epochs=EPOCHS, split=self.store.split_digest, **self._linear_settings())

    def _read(self, name: str) -> dict[str, Any]:
        known = self._known(name)
        if known is None:
            raise SystemExit(f"the cell {name} is missing; run the stage linear first")
        return known

    def _linear_settings(self) -> dict[str, Any]:
        return {"weights": {arm: self._weights(arm) for arm in ("plain", "sslmed")}}

    def _draws(self, train: npt.NDArray[np.int64], seed: int) -> list[protocol.Draw]:
        target = self.store.target(TARGET)[train]
        return protocol.draws(self.store.patients(train), target, protocol.parse(BUDGETS), [seed])[0]

    def _embed(self, arm: str, seed: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return xrays.embed(self._network(arm, seed), self.store, rows, SIZE)


def _summary(
    store: Store, arms: Mapping[str, Sequence[Any]], target: Any, test: npt.NDArray[np.int64], reference: str
) -> dict[str, Any]:
    weights = protocol.bootstrap_weights(store.patients(test), REPLICATES, seed=0)
    measures = {name: partial(metric, target) for name, metric in metrics.METRICS.items()}
    return _as_json(protocol.summarise(arms, measures, weights, reference=reference))


def _as_json(estimates: Sequence[protocol.Estimate]) -> dict[str, Any]:
    """metric -> arm -> value, interval, sd over draws and the difference to the reference; nan is null."""
    table: dict[str, Any] = {}
    for each in estimates:
        plain = dataclasses.asdict(each)
        table.setdefault(each.metric, {})[each.arm] = {
            name: _no_nan(plain[name]) for name in ("value", "draw_sd", "difference")
        }
    return table


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _no_nan(each) for name, each in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value


def _markdown(store: Store, cells: Cells, linear: Any, finetuned: Any) -> str:
    sizes = [
        f"{len(store.rows(split))} {split} images of {len(set(store.patients(store.rows(split))))} patients"
        for split in ("train", "val", "test")
    ]
    return f"""# Label efficiency on chest X-rays

Written by `{COMMAND}`; do not edit.

Paediatric chest X-rays, normal or pneumonia (Kermany et al. 2018), split by patient: {", ".join(sizes)}.
AUROC on test patients, mean over {len(SEEDS)} label draws by patient [95 %, {REPLICATES} patient bootstraps].
At 100 % all draws are the same patients: what differs is the random start, or the seed of fine-tuning.
Fine-tuning stops on all labelled val patients, which come on top of the budget, for every start alike.
Differences are paired by patient; they do not cover that another seed of pretraining would end elsewhere.
Both pretrained arms ran {EPOCHS} epochs; `plain` is `benchmarks/plain_loop.py`.

## Frozen features, logistic regression

{_frozen(linear)}

## Fine-tuned, the same steps from every start

{_fine(finetuned)}

## What pretraining took

{_cost(cells)}
"""


def _frozen(linear: Any) -> str:
    rows = []
    for budget in FINETUNE_STEPS:
        for arm in ARMS:
            row, other = (linear[budget, reference]["auroc"][arm] for reference in ("random", "plain"))
            differences = [xrays.interval(row["difference"], "+"), xrays.interval(other["difference"], "+")]
            rows.append([budget, arm, xrays.interval(row["value"]), xrays.number(row["draw_sd"]), *differences])
    return xrays.grid(["labels", "arm", "AUROC", "sd of draws", "less random", "less plain"], rows)


def _fine(finetuned: Any) -> str:
    rows = []
    for budget, steps in FINETUNE_STEPS.items():
        for arm in ("random", "sslmed"):
            row = finetuned[budget]["auroc"][arm]
            values = [
                xrays.interval(row["value"]),
                xrays.number(row["draw_sd"]),
                xrays.interval(row["difference"], "+"),
            ]
            rows.append([budget, str(steps), arm, *values])
    return xrays.grid(["labels", "steps", "start", "AUROC", "sd of draws", "less random"], rows)


def _cost(cells: Cells) -> str:
    rows = []
    for arm in ("plain", "sslmed"):
        made = cells.made(f"pretrain-{arm}")
        rows.append([arm, f"{made['cpu_seconds']:.0f}", str(made["threads"]), "fp32", made["device"], made["commit"]])
    return xrays.grid(["arm", "CPU seconds", "threads", "precision", "device", "commit"], rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of xray_pneumonia")
    parser.add_argument(
        "--work", type=Path, default=HERE / "work" / "label_efficiency", help="store and runs; not committed"
    )
    parser.add_argument("--only", nargs="*", help="only these stages")
    return parser.parse_args()


if __name__ == "__main__":
    main()
