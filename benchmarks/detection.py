"""Boxes from few labels, from a self-supervised start and from random weights; weak boxes; lesions in slices.

    python benchmarks/detection.py --data ../shared/data

Fills benchmarks/results/detection/ cell by cell and writes docs/detection.md; a stopped table goes on where it was.
``--only blood-cells`` or ``phantoms`` does one part.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
import xrays
from cells import Cells
from studies import plain, result_of, table

import sslmed
from sslmed import artifact
from sslmed.data.phantom_scans import write_scans
from sslmed.data.phantoms import write_phantoms
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.recipe import FinetuneRecipe, load_finetune
from sslmed.supervised import study
from sslmed.supervised.arms import Arm, arms
from sslmed.supervised.study import Cell

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "detection", HERE.parent / "docs" / "detection.md"
COMMAND = "python benchmarks/detection.py --data ../shared/data"
# Public, as the images are, so that everyone gets the same split.
KEY = "b7861e83395771c8ea8712c6646b31957dfe8963fa3d07a480c497c34f86c654"
REPLICATES, THREADS = 1000, 1
PRETRAIN = (
    "histology/simclr_resnet18",
    ("data.size=96", "views.crop=[0.1,0.4]", "train.max_steps=500", "train.batch_size=64"),
)
RECIPE = "histology/localization"
OVERRIDES = ("data.size=[240,320]", "head.reducer=true", "data.workers=0", "stop.patience=0")
STEPS = {"k=10": 80, "k=50": 150, "100%": 400}
SEEDS = {"k=10": 3, "k=50": 3, "100%": 1}
PHANTOMS = {
    "weak boxes in X-ray phantoms": (
        "xray/weak_localization",
        ("backbone.name=resnet18", "data.size=96", "data.workers=0", "train.max_steps=600", "stop.patience=0"),
    ),
    "boxes in X-ray phantoms": (
        "xray/localization",
        ("backbone.name=resnet18", "data.size=96", "data.workers=0", "train.max_steps=300", "stop.patience=0"),
    ),
    "boxes in slices of CT phantoms": (
        "ct/localization",
        ("backbone.name=resnet18", "data.size=96", "data.workers=0", "train.max_steps=300", "stop.patience=0"),
    ),
}
SHOWN = ("map50", "map", "froc", "sensitivity_at_1")


def main() -> None:
    """Compute what is missing, then write the page."""
    arguments = _arguments()
    torch.set_num_threads(THREADS)
    cells = Cells(RESULTS, COMMAND)
    blood, phantoms = BloodCells(arguments.data, arguments.work, cells), Phantoms(arguments.work, cells)
    if arguments.only != "phantoms":
        blood.run(arguments.budgets or list(STEPS))
    if arguments.only != "blood-cells":
        phantoms.run()
    if arguments.only is None:
        PAGE.write_text(_page(blood.section(), phantoms.section()), encoding="utf-8")


class BloodCells:
    """Cells in blood smears, split by image."""

    def __init__(self, data: Path, work: Path, cells: Cells) -> None:
        self.work, self.cells = work, cells
        path = work / "blood_cells"
        if not path.exists():
            work.mkdir(parents=True, exist_ok=True)
            (work / "site.key").write_text(KEY + "\n", encoding="ascii")
            source = data / "blood_cells"
            sslmed.ingest(
                source / "images", path, modality="histology", boxes=source / "annotations",
                patient=r"(BloodImage_\d+)", key=work / "site.key",
            )  # fmt: skip
        self.store = Store(path)
        self.model = work / "pretrained"

    def run(self, budgets: list[str]) -> None:
        """Every cell that is missing."""
        self._pretrain()
        for budget in budgets:
            for arm in self._arms():
                for seed in range(SEEDS[budget]):
                    self._cell(arm, budget, seed)
            self._compare(budget)

    def section(self) -> str:
        """Tables of all budgets."""
        rows = [row for budget in STEPS for row in self._compare(budget)]
        sides = {side: len(self.store.rows(side)) for side in ("train", "val", "test")}
        reduced = [self._reduced(budget, arm) for budget in STEPS for arm in self._arms()]
        steps = ", ".join(f"{count} steps from {budget}" for budget, count in STEPS.items())
        header = ["labels", "start", "seed", "with", "without", "gained"]
        return f"""## Cells in blood smears

{", ".join(f"{count} {side} images" for side, count in sides.items())}, 640 x 480 pixels in colour; red cells (RBC),
white cells (WBC) and platelets (BCCD, MIT). `{RECIPE}` with {_quoted(OVERRIDES)}, {steps}. Pretraining:
`{PRETRAIN[0]}` with {_quoted(PRETRAIN[1])}, on the train images.

{table(rows, (*SHOWN, *(f"map50:{name}" for name in self.store.box_classes)))}

### What the reducer does

Sensitivity at one false positive an image, mean over classes, of the same detector with its second stage and without;
the difference is paired by image.

{xrays.grid(header, [line for lines in reduced for line in lines])}
"""

    def _pretrain(self) -> str:
        recipe, overrides = PRETRAIN
        settings = [*overrides, "data.workers=0", "monitor.knn_every=0"]

        def compute() -> dict[str, Any]:
            done = sslmed.pretrain(recipe, self.store.path, self.model, overrides=settings, resume=self.model.exists())
            return {"steps": done.steps, "weights": sha256(self.model / "artifact" / "model.safetensors")}

        text, split = xrays.recipe_text(recipe), self.store.split_digest
        made = self.cells.run("pretrain", compute, recipe=text, overrides=list(overrides), split=split)
        return str(made["weights"])

    def _arms(self) -> tuple[Arm, ...]:
        return arms(self.model, artifact.read_card(self.model), ())

    def _recipe(self, budget: str) -> FinetuneRecipe:
        steps = STEPS[budget]
        return load_finetune(RECIPE, [*OVERRIDES, f"train.max_steps={steps}", f"stop.check_every={steps // 4}"])

    def _settings(self, budget: str) -> dict[str, Any]:
        recipe = self._recipe(budget).model_dump(mode="json")
        return {"recipe": recipe, "weights": self._pretrain(), "split": self.store.split_digest}

    def _cell(self, arm: Arm, budget: str, seed: int) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            folder = study.fine_tune(self._recipe(budget), self.store, Cell(arm, budget, seed), self.work / "cells")
            return _kept(folder)

        return self.cells.run(f"{arm.name}-{budget}-{seed}", compute, **self._settings(budget))

    def _compare(self, budget: str) -> list[dict[str, Any]]:
        def compute() -> dict[str, Any]:
            folder = self.work / "cells" / study.RUNS
            runs = {
                arm.name: [folder / Cell(arm, budget, seed).name for seed in range(SEEDS[budget])]
                for arm in self._arms()
            }
            patients = artifact.read_card(next(iter(runs.values()))[0]).data.patients
            return {"rows": [plain(row) for row in study.compared(runs, budget, patients, REPLICATES)]}

        rows: list[dict[str, Any]] = self.cells.run(budget, compute, **self._settings(budget))["rows"]
        return rows

    def _reduced(self, budget: str, arm: Arm) -> list[list[str]]:
        lines = []
        for seed in range(SEEDS[budget]):
            kept = self._cell(arm, budget, seed)
            without, gained = kept["others"]["without the reducer"], kept["others"]["gained by the reducer"]
            values = (kept["test"], without), (gained,)
            texts = [_interval(each["sensitivity_at_1"]) for group in values for each in group]
            lines.append([budget, arm.name, str(seed), *texts])
        return lines


class Phantoms:
    """Lesions that are known to be there, because they were drawn."""

    def __init__(self, work: Path, cells: Cells) -> None:
        self.work, self.cells = work, cells

    def run(self) -> None:
        """Every cell that is missing."""
        for name in PHANTOMS:
            self._cell(name)

    def section(self) -> str:
        """One table."""
        lines = []
        for name, (recipe, overrides) in PHANTOMS.items():
            kept = self._cell(name)
            scores = kept["test"]
            if "map50" not in scores:
                (scores,) = kept["others"].values()
            values = [_interval(scores[metric]) for metric in SHOWN]
            lines.append([name, f"`{recipe}`, {_quoted(overrides)}", *values])
        return f"""## Phantoms

Drawn by code, so that every lesion is known. Random starts, one seed. Weak boxes have seen no box in training.

{xrays.grid(["what", "recipe", *SHOWN], lines)}
"""

    def _cell(self, name: str) -> dict[str, Any]:
        recipe, overrides = PHANTOMS[name]

        def compute() -> dict[str, Any]:
            out = self.work / "phantoms" / name.replace(" ", "-")
            shutil.rmtree(out, ignore_errors=True)
            sslmed.finetune(recipe, self._store(recipe.partition("/")[0]), out, overrides=overrides)
            return _kept(out)

        settings = load_finetune(recipe, overrides).model_dump(mode="json")
        return self.cells.run(name.replace(" ", "-"), compute, recipe=settings)

    def _store(self, modality: str) -> Path:
        path = self.work / "phantoms" / f"store-{modality}"
        if not path.exists():
            raw = path.with_name(f"raw-{modality}")
            shutil.rmtree(raw, ignore_errors=True)
            key = self.work / "site.key"
            key.parent.mkdir(parents=True, exist_ok=True)
            key.write_text(KEY + "\n", encoding="ascii")
            if modality == "xray":
                drawn = write_phantoms(raw, boxes=True)
                sslmed.ingest(drawn.folder, path, modality=modality, labels=drawn.labels, boxes=drawn.boxes, key=key)
            else:
                scans = write_scans(raw, modality, patients=60, masks=True)
                sslmed.ingest(scans.folder, path, modality=modality, labels=scans.labels, masks=scans.masks, key=key)
        return path


def _kept(run: Path) -> dict[str, Any]:
    """What a cell keeps of a run."""
    result = result_of(run)
    kept = ("test", "by_class", "others", "best_step", "calibration", "thresholds", "notes")
    return {**{name: result[name] for name in kept}, "images": result["train_images"]}


def _interval(values: list[float | None]) -> str:
    value, low, high = (float("nan") if each is None else each for each in values)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _quoted(settings: tuple[str, ...]) -> str:
    return ", ".join(f"`{each}`" for each in settings)


def _page(*sections: str) -> str:
    return f"""# Boxes from few labels

Written by `{COMMAND}`; do not edit.

Each cell is one `sslmed finetune`; the start is all that differs between arms. Values are means over seeds (label draw,
head and training) on test images, with 95 % intervals by {REPLICATES} bootstrap replicates of test patients;
differences are paired. `k=10` is ten train images. Early stopping and calibration read all val images, on top of the
budget, for every start alike. Intervals cover the choice of test patients, not that of
labels: the sd of seeds shows how far draws lie apart. Pretraining had one seed.
Measures: [boxes](evaluation.md#metrics-of-boxes).

{chr(10).join(sections)}"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the image sets")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "detection", help="stores and runs; not committed")
    parser.add_argument("--only", choices=("blood-cells", "phantoms"), help="one part; writes no page")
    parser.add_argument("--budgets", nargs="*", choices=STEPS, help="only these of the blood cells")
    return parser.parse_args()


if __name__ == "__main__":
    main()
