"""Every pretext task on the same chest X-rays for the same CPU time, beside random, frozen ImageNet and raw pixels.

    python benchmarks/methods.py --source ../shared/data/xray_pneumonia --imagenet efficientnet_lite0.pth

Frozen features, nearest neighbours and a logistic regression, by label budget, with patient-level intervals; each arm
against random weights of its own network. ``--imagenet`` is a state dict of tf_efficientnet_lite0 (see README). Fills
benchmarks/results/methods/ cell by cell and writes docs/method_comparison.md. ``--only byol table`` does a part.
"""

import argparse
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xrays
from cells import Cells

import sslmed
from sslmed.config import TrainingAborted
from sslmed.data.input import network_input
from sslmed.data.modality import named
from sslmed.durable import sha256
from sslmed.evaluation import comparison, protocol
from sslmed.evaluation.comparison import Features
from sslmed.models.backbones import BackboneConfig, build
from sslmed.recipe import load_pretrain
from sslmed.training.starts import start

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "methods", HERE.parent / "docs" / "method_comparison.md"
COMMAND = "python benchmarks/methods.py --source ../shared/data/xray_pneumonia --imagenet efficientnet_lite0.pth"
SIZE, TARGET, THREADS = 96, "label", 1
BUDGETS, SEEDS, REPLICATES = "1%,10%,100%", range(5), 2000
COMPONENTS = 256
IMAGENET = BackboneConfig(name="tf_efficientnet_lite0", in_chans=1)


@dataclass(frozen=True)
class Arm:
    """One pretraining. ``steps`` is what about ten minutes of one CPU core were enough for, measured beforehand."""

    recipe: str
    steps: int
    from_imagenet: bool = False


ARMS = {
    "simclr": Arm("xray/simclr_resnet18", 300),
    "byol": Arm("xray/byol_resnet18", 240),
    "mae": Arm("xray/mae_vit_tiny", 600),
    "rotation": Arm("xray/rotation_resnet18", 180),
    "continued": Arm("xray/simclr_resnet18", 350, from_imagenet=True),
}
# the arms that share a network, and so a random start
FAMILIES = {
    "resnet18": ("simclr", "byol", "rotation"),
    "vit_tiny_patch16_224": ("mae",),
    "tf_efficientnet_lite0": ("imagenet", "continued"),
}
RANDOM, PCA = "random", "pca"


def main() -> None:
    """Compute what is missing, then write the page."""
    arguments = _arguments()
    torch.set_num_threads(THREADS)
    bench = Benchmark(arguments.source, arguments.imagenet, arguments.work)
    for stage in arguments.only or (*ARMS, "probes", "table"):
        bench.run(stage)


class Benchmark:
    """The stages of the page, each a set of cells."""

    def __init__(self, source: Path, imagenet: Path, work: Path) -> None:
        self.work, self.imagenet = work, imagenet
        self.store = xrays.open_store(source, work)
        self.cells = Cells(RESULTS, COMMAND)
        self.train, self.test = (xrays.labelled(self.store, split, TARGET) for split in ("train", "test"))

    def run(self, stage: str) -> None:
        """Compute one stage: an arm, ``probes`` or ``table``."""
        if stage in ARMS:
            self._pretrain(stage)
        elif stage == "probes":
            for family in FAMILIES:
                self._probe(family)
        elif stage == "table":
            PAGE.write_text(self._page(), encoding="utf-8")

    def _settings(self, name: str) -> dict[str, Any]:
        arm = ARMS[name]
        weights = sha256(self.imagenet) if arm.from_imagenet else "random"
        return {"recipe": xrays.recipe_text(arm.recipe), "steps": arm.steps, "start": weights, "split": self._split}

    @property
    def _split(self) -> str:
        return self.store.split_digest

    def _pretrain(self, name: str) -> dict[str, Any]:
        return self.cells.run(f"pretrain-{name}", lambda: self._pretrained(name), **self._settings(name))

    def _pretrained(self, name: str) -> dict[str, Any]:
        arm, out = ARMS[name], self.work / name
        shutil.rmtree(out, ignore_errors=True)  # whole in one sitting, or its CPU time would not count
        overrides = [f"train.max_steps={arm.steps}", "monitor.knn_every=0", "data.workers=0", f"data.size={SIZE}"]
        if arm.from_imagenet:
            overrides += [f"backbone.name={IMAGENET.name}", f"backbone.init={self.imagenet}"]
        try:
            result = sslmed.pretrain(arm.recipe, self.store.path, out, overrides=overrides)
        except TrainingAborted as error:
            return {"failed": str(error)}
        weights = sha256(out / "artifact" / "model.safetensors")
        return {
            "steps": result.steps,
            "weights": weights,
            "metrics": {key: round(each, 4) for key, each in result.metrics.items()},
        }

    def _probe(self, family: str) -> dict[str, Any]:
        arms = [arm for arm in FAMILIES[family] if arm == "imagenet" or "failed" not in self._pretrain(arm)]
        settings = {"weights": {arm: self._weights(arm) for arm in arms}, "split": self._split, "size": SIZE}
        return self.cells.run(f"probes-{family}", lambda: self._compare(family, arms), **settings)

    def _weights(self, arm: str) -> str:
        if arm == "imagenet":
            return sha256(self.imagenet)
        weights: str = self._pretrain(arm)["weights"]
        return weights

    def _compare(self, family: str, arms: list[str]) -> dict[str, Any]:
        """Every arm of a family against as many random starts as there are draws."""
        features = {arm: [self._features(self._network(arm))] for arm in arms}
        config = self._config(family)
        features[RANDOM] = [self._features(build(config, SIZE, seed).network) for seed in SEEDS]
        if family == "resnet18":
            features[PCA] = [self._pixels()]
        target, patients = self.store.target(TARGET), self.store.patients
        drawn, _ = protocol.draws(patients(self.train), target[self.train], protocol.parse(BUDGETS), SEEDS)
        weights = protocol.bootstrap_weights(patients(self.test), REPLICATES, seed=0)
        classes = len(self.store.classes(TARGET))
        rows = comparison.compare(
            features, target[self.train], target[self.test], classes, drawn, weights, reference=RANDOM
        )
        return {"rows": [_plain(row) for row in rows if row.metric == "auroc"]}

    def _config(self, family: str) -> BackboneConfig:
        if family == IMAGENET.name:
            return IMAGENET
        return load_pretrain(ARMS[FAMILIES[family][0]].recipe).backbone

    def _network(self, arm: str) -> torch.nn.Module:
        if arm == "imagenet":
            config = IMAGENET.model_copy(update={"init": str(self.imagenet)})
            return start(config, SIZE, named(self.store.modality), seed=0).backbone.network
        if not (self.work / arm).exists():
            raise SystemExit(
                f"the weights of {arm} are not in {self.work}; delete the cell pretrain-{arm} to make them"
            )
        return sslmed.load_backbone(self.work / arm)

    def _features(self, network: torch.nn.Module) -> Features:
        return Features(*(xrays.embed(network, self.store, rows, SIZE) for rows in (self.train, self.test)))

    def _pixels(self) -> Features:
        """Principal components of the pixels, fitted on all train images, labelled or not."""
        from sklearn import decomposition

        sides = [self._flat(rows) for rows in (self.store.rows("train", "unlabelled"), self.train, self.test)]
        components = decomposition.PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(sides[0])
        return Features(*(components.transform(side) for side in sides[1:]))

    def _flat(self, rows: Any) -> Any:
        policy, store = named(self.store.modality), self.store
        images = (network_input(store.pixels(row), store.intensity(row), policy, SIZE, 1) for row in map(int, rows))
        return np.stack([image.numpy().ravel() for image in images])

    def _page(self) -> str:
        tables = {family: self._probe(family)["rows"] for family in FAMILIES}
        blocks = [f"## {probe}\n\n{_scores(tables, probe)}" for probe in comparison.PROBES]
        sizes = ", ".join(f"{len(rows)} {side} images" for side, rows in (("train", self.train), ("test", self.test)))
        return f"""# Pretext tasks side by side

Written by `{COMMAND}`; do not edit.

Paediatric chest X-rays, normal or pneumonia (Kermany et al. 2018), split by patient: {sizes}. Frozen features at
{SIZE} pixels, AUROC on test patients, mean over {len(SEEDS)} label draws by patient [95 %, {REPLICATES} patient
bootstraps]. Differences are to random weights of the same network, paired by patient; a random start is drawn anew
for every label draw. Intervals cover the choice of test patients, not another seed of pretraining: there was one.

`imagenet` is the frozen ImageNet network, `continued` goes on from it with SimCLR, `pca` are the first {COMPONENTS}
principal components of the pixels. What the numbers say is discussed in [methods](methods.md#side-by-side).

{chr(10).join(blocks)}
## What pretraining took

{self._cost()}
"""

    def _cost(self) -> str:
        rows = []
        for name, arm in ARMS.items():
            made, result = self.cells.made(f"pretrain-{name}"), self._pretrain(name)
            last = result.get("failed") or ", ".join(f"{key} {value}" for key, value in result["metrics"].items())
            took = [f"{made['cpu_seconds']:.0f}", str(made["threads"]), made["device"], made["commit"]]
            rows.append([name, arm.recipe, str(arm.steps), last, *took])
        header = ["arm", "recipe", "steps", "at the end", "CPU seconds", "threads", "device", "commit"]
        return xrays.grid(header, rows)


def _scores(tables: dict[str, list[dict[str, Any]]], probe: str) -> str:
    rows = []
    for budget in BUDGETS.split(","):
        for family, table in tables.items():
            for row in table:
                if (row["budget"], row["probe"]) == (budget, probe):
                    values = [
                        xrays.interval(row["value"]),
                        xrays.interval(row["difference"], "+"),
                        row["verdict"] or "",
                    ]
                    rows.append([budget, family, row["arm"], *values])
    return xrays.grid(["labels", "network", "arm", "AUROC", "less random", "verdict"], rows) + "\n"


def _plain(row: comparison.Row) -> dict[str, Any]:
    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return None if value != value else round(value, 4) if isinstance(value, float) else value

    return {name: rounded(value) for name, value in dataclasses.asdict(row).items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of xray_pneumonia")
    parser.add_argument("--imagenet", type=Path, required=True, help="a state dict of tf_efficientnet_lite0")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "methods", help="store and runs; not committed")
    parser.add_argument("--only", nargs="*", help=f"only these of {', '.join(ARMS)}, probes, table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
