"""Fine-tuning from several starts on few labels: one study a set of images, every cell a run of the cell runner.

    python benchmarks/studies.py --data ../shared/data --imagenet efficientnet_lite0.pth

Writes docs/few_labels.md with a table and a curve a study, from benchmarks/results/few_labels/. A stopped table goes on
where it was; ``--only ultrasound`` does one study. What a study does, one command does too, for one set of seeds:

    sslmed evaluate PRETRAINED --data STORE --recipe mri/segmentation --budgets k=5,100% --seeds 1 train.max_steps=500

``--imagenet`` is a state dict of tf_efficientnet_lite0 (see docs/methods.md).
"""

import argparse
import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xrays
from cells import Cells
from curves import curves

import sslmed
from sslmed import artifact
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.evaluation.protocol import parse
from sslmed.recipe import load_finetune
from sslmed.supervised import study
from sslmed.supervised.arms import Arm, arms
from sslmed.supervised.study import Cell

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "few_labels", HERE.parent / "docs" / "few_labels.md"
COMMAND = "python benchmarks/studies.py --data ../shared/data --imagenet efficientnet_lite0.pth"
REPLICATES, THREADS = 1000, 1


@dataclass(frozen=True)
class Study:
    """A set of images and what is learnt from how many of them.

    Attributes:
        title: of its section.
        folder: below ``--data``.
        ingest: keyword arguments of ``sslmed.ingest``; paths are relative to ``folder``.
        pretrain: recipe and overrides of the self-supervised start.
        recipe: of fine-tuning, and ``overrides``.
        budgets: of labels.
        seeds: of label draw, head and training.
        imagenet: whether ImageNet's weights are an arm, and where pretraining begins.
        remark: how its settings were found, where a reader should know.
        headline: the measure of the curve.
        shown: the measures of the table.
    """

    title: str
    folder: str
    ingest: dict[str, Any]
    pretrain: tuple[str, tuple[str, ...]]
    recipe: str
    overrides: tuple[str, ...]
    budgets: str
    seeds: int
    headline: str
    shown: tuple[str, ...]
    imagenet: bool = False
    source: str = "."
    store: str = field(default="")
    remark: str = ""


_LITE = ("backbone.name=tf_efficientnet_lite0", "data.size=64")
_XRAY = {"modality": "xray", "labels": "labels.csv", "label_columns": ("label", "subtype")}
_XRAY_PRETRAIN = ("xray/simclr_resnet18", (*_LITE, "train.max_steps=250", "train.precision=32"))
_XRAY_TUNE = ("train.max_steps=100", "train.precision=32", "data.size=64")
_CLASSES = (
    "auroc", "average_precision", "sensitivity_at_90_specificity", "balanced_accuracy", "f1", "mcc", "ece", "brier",
)  # fmt: skip
_MASKS = ("dice", "iou", "hd95", "asd")
_ULTRASOUND = (
    "Steps, rate and size were changed once, after a first attempt (120 steps at 128 pixels) whose test scores from 5 "
    "and 20 images were seen. "
)
STUDIES = {
    "xray-two": Study(
        "Chest X-rays, normal or pneumonia", "xray_pneumonia", _XRAY, _XRAY_PRETRAIN, "xray/classification",
        ("data.target=label", *_XRAY_TUNE), "1%,10%,100%", 3, "auroc", _CLASSES, True, store="xray",
    ),
    "xray-three": Study(
        "Chest X-rays, normal, bacteria or virus", "xray_pneumonia", _XRAY, _XRAY_PRETRAIN, "xray/classification",
        ("data.target=subtype", *_XRAY_TUNE), "10%,100%", 3, "auroc", _CLASSES, True, store="xray",
    ),
    "ultrasound": Study(
        "Nerves and vessels in ultrasound", "ultrasound_nerve",
        {"modality": "ultrasound", "masks": "masks", "mask_classes": ("background", "structure 1", "structure 2")},
        ("ultrasound/simclr_resnet18", ("data.size=96", "train.max_steps=200")), "ultrasound/segmentation",
        ("train.max_steps=250", "train.batch_size=8", "optim.lr=2e-3"), "k=5,k=20,100%", 3, "dice", _MASKS,
        source="images", store="ultrasound", remark=_ULTRASOUND,
    ),
    "ultrasound-long": Study(
        "Nerves and vessels in ultrasound, all labels, three times the steps", "ultrasound_nerve",
        {"modality": "ultrasound", "masks": "masks", "mask_classes": ("background", "structure 1", "structure 2")},
        ("ultrasound/simclr_resnet18", ("data.size=96", "train.max_steps=200")), "ultrasound/segmentation",
        ("train.max_steps=750", "train.batch_size=8", "optim.lr=2e-3"), "100%", 1, "dice", _MASKS,
        source="images", store="ultrasound", remark=_ULTRASOUND,
    ),
    "hippocampus": Study(
        "Hippocampus in MRI", "mri_hippocampus",
        {"modality": "mri", "masks": "labels", "mask_classes": ("background", "anterior", "posterior")},
        ("mri/simclr_resnet18", ("data.size=64", "data.slices=3", "backbone.in_chans=3", "train.max_steps=200")),
        "mri/segmentation", ("train.max_steps=500", "stop.check_every=100"), "k=5,100%", 1, "dice", _MASKS,
        source="images", store="hippocampus",
    ),
}  # fmt: skip


def main() -> None:
    """Compute what is missing, then write the page."""
    arguments = _arguments()
    torch.set_num_threads(THREADS)
    benches = {name: Bench(name, arguments) for name in arguments.only or STUDIES}
    for bench in benches.values():
        bench.run()
    if not arguments.only:
        PAGE.write_text(_page({name: bench.section() for name, bench in benches.items()}), encoding="utf-8")


class Bench:
    """One study."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.about = name, STUDIES[name]
        self.work, self.imagenet = arguments.work, arguments.imagenet
        self.cells = Cells(RESULTS, COMMAND)
        self.store = self._store(arguments.data / self.about.folder)
        self.recipe = load_finetune(self.about.recipe, self.about.overrides)

    def run(self) -> None:
        """Every cell that is missing."""
        self._pretrain()
        for budget in parse(self.about.budgets):
            for arm in self._arms():
                for seed in range(self.about.seeds):
                    self._cell(arm, budget.text, seed)
            self._compare(budget.text)

    def _store(self, source: Path) -> Store:
        """The store. Its site key is public, as the images are, so that everyone gets the same split."""
        path = self.work / "stores" / self.about.store
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            key = self.work / "site.key"
            key.write_text(hashlib.sha256(b"sslmed benchmark").hexdigest() + "\n", encoding="ascii")
            options = {
                name: source / each if name in ("labels", "masks") else each for name, each in self.about.ingest.items()
            }
            sslmed.ingest(source / self.about.source, path, key=key, **options)
        return Store(path)

    @property
    def _model(self) -> Path:
        return self.work / f"pretrained-{self.about.store}"

    def _pretrain(self) -> dict[str, Any]:
        recipe, overrides = self.about.pretrain
        settings = [*overrides, "data.workers=0", "monitor.knn_every=0"]
        start = "random"
        if self.about.imagenet:
            start = sha256(self.imagenet)
            settings.append(f"backbone.init={self.imagenet}")

        def compute() -> dict[str, Any]:
            result = sslmed.pretrain(
                recipe, self.store.path, self._model, overrides=settings, resume=self._model.exists()
            )
            return {"steps": result.steps, "weights": sha256(self._model / "artifact" / "model.safetensors")}

        text = xrays.recipe_text(recipe)
        return self.cells.run(
            f"pretrain-{self.about.store}",
            compute,
            recipe=text,
            overrides=list(overrides),
            start=start,
            split=self._split,
        )

    @property
    def _split(self) -> str:
        return self.store.split_digest

    def _arms(self) -> tuple[Arm, ...]:
        beside = [self.imagenet] if self.about.imagenet else []
        found = arms(self._model, artifact.read_card(self._model), beside)
        return tuple(
            dataclasses.replace(arm, name="imagenet") if arm.source == str(self.imagenet) else arm for arm in found
        )

    def _settings(self, **more: Any) -> dict[str, Any]:
        recipe = self.recipe.model_dump(mode="json")
        return {"recipe": recipe, "weights": self._pretrain()["weights"], "split": self._split, **more}

    def _cell(self, arm: Arm, budget: str, seed: int) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            run = study.fine_tune(self.recipe, self.store, Cell(arm, budget, seed), self.work / self.name)
            return _kept(run)

        return self.cells.run(f"{self.name}-{arm.name}-{budget}-{seed}", compute, **self._settings())

    def _compare(self, budget: str) -> list[dict[str, Any]]:
        def compute() -> dict[str, Any]:
            folder = self.work / self.name / study.RUNS
            runs = {
                arm.name: [folder / Cell(arm, budget, seed).name for seed in range(self.about.seeds)]
                for arm in self._arms()
            }
            patients = artifact.read_card(next(iter(runs.values()))[0]).data.patients
            return {"rows": [plain(row) for row in study.compared(runs, budget, patients, REPLICATES)]}

        rows: list[dict[str, Any]] = self.cells.run(f"{self.name}-{budget}", compute, **self._settings())["rows"]
        return rows

    def section(self) -> str:
        """The study's tables, and its curve as PNG beside the page."""
        rows = [row for budget in parse(self.about.budgets) for row in self._compare(budget.text)]
        picture = PAGE.parent / "images" / f"few_labels_{self.name}.png"
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(curves(rows, self.about.headline, self.about.title))
        return f"""## {self.about.title}

{self._sizes()} {self.about.remark}`{self.about.recipe}` with {_quoted(self.about.overrides)}; pretraining
`{self.about.pretrain[0]}` with {_quoted(self.about.pretrain[1])}{self._from()}.

![{self.about.headline} by budget](images/{picture.name})

{table(rows, self.about.shown)}

{self._details()}
"""

    def _from(self) -> str:
        return ", from ImageNet" if self.about.imagenet else ""

    def _sizes(self) -> str:
        sides = {side: self.store.rows(side) for side in ("train", "val", "test")}
        parts = [
            f"{len(rows)} {side} images of {len(set(self.store.patients(rows)))} patients"
            for side, rows in sides.items()
        ]
        return ", ".join(parts) + "."

    def _details(self) -> str:
        """By class from all labels, and for classes the calibration on val."""
        last = parse(self.about.budgets)[-1].text
        lines, rows = [], self._compare(last)
        named = [row for row in rows if ":" in row["metric"] and not row["metric"].startswith(("iou", "asd"))]
        if named:
            cells = [[row["metric"].replace(":", ", "), row["arm"], xrays.interval(row["value"])] for row in named]
            lines += [f"By class, from {last}:", "", xrays.grid(["measure", "start", "value"], cells)]
        calibrated = []
        for arm in self._arms():
            kept = [self._cell(arm, last, seed) for seed in range(self.about.seeds)]
            if all("val_ece_before" in each["calibration"] for each in kept):
                mean = {name: np.mean([each["calibration"][name] for each in kept]) for name in kept[0]["calibration"]}
                temperature = np.mean([each["temperature"] for each in kept])
                names = ("val_ece_before", "val_ece_after", "val_brier_before", "val_brier_after")
                calibrated.append([arm.name, f"{temperature:.2f}", *(f"{mean[name]:.3f}" for name in names)])
        if calibrated:
            header = ["start", "temperature", "ECE before", "after", "Brier before", "after"]
            lines += [f"Calibration on val, from {last}, mean over seeds:", "", xrays.grid(header, calibrated)]
        return "\n".join(lines)


def _quoted(settings: tuple[str, ...]) -> str:
    return ", ".join(f"`{each}`" for each in settings)


def _kept(run: Path) -> dict[str, Any]:
    """What a cell keeps of a run."""
    result = result_of(run)
    head = artifact.read_card(run).head
    return {
        "test": {name: [None if v is None else round(v, 4) for v in values] for name, values in result["test"].items()},
        "by_class": result["by_class"],
        "images": result["train_images"],
        "patients": result["train_patients"],
        "best_step": result["best_step"],
        "calibration": result["calibration"],
        "temperature": None if head is None else head.temperature,
        "thresholds": result["thresholds"],
    }


def result_of(run: Path) -> dict[str, Any]:
    """The result that a finished run has kept."""
    from sslmed.run import read

    result: dict[str, Any] = read(run)["result"]
    return result


def table(rows: list[dict[str, Any]], shown: tuple[str, ...]) -> str:
    """The rows of a comparison whose measure is in ``shown``, in Markdown."""
    lines = []
    for row in rows:
        if row["metric"] in shown:
            values = [
                xrays.interval(row["value"]),
                xrays.number(row["draw_sd"]),
                xrays.interval(row["difference"], "+"),
            ]
            lines.append(
                [row["budget"], str(row["patients"]), row["metric"], row["arm"], *values, row["verdict"] or ""]
            )
    header = ["labels", "patients", "measure", "start", "value [95 %]", "sd of seeds", "less random", "verdict"]
    return xrays.grid(header, lines)


def plain(row: Any) -> dict[str, Any]:
    """A row of a comparison as JSON holds it, in four digits, nan as null."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return None if value != value else round(value, 4) if isinstance(value, float) else value

    return {name: rounded(value) for name, value in dataclasses.asdict(row).items()}


def _page(sections: dict[str, str]) -> str:
    return f"""# Few labels, fine-tuned

Written by `{COMMAND}`; do not edit.

Each cell is one `sslmed finetune`: the same recipe, steps and labels from every start; the start is all that differs.
Values are means over seeds (label draw, head and training) on test patients, with 95 % intervals by {REPLICATES}
bootstrap replicates of test patients; differences are paired by patient. Early stopping and calibration read all
labelled val patients, on top of the budget, for every start alike. Intervals do not cover another seed of pretraining:
there was one. A few hundred steps are little for random weights: what they lack here a longer training may give.

{chr(10).join(sections.values())}"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the image sets")
    parser.add_argument("--imagenet", type=Path, required=True, help="a state dict of tf_efficientnet_lite0")
    parser.add_argument(
        "--work", type=Path, default=HERE / "work" / "few_labels", help="stores and runs; not committed"
    )
    parser.add_argument("--only", nargs="*", help=f"only these of {', '.join(STUDIES)}; writes no page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
