"""Every pretext task on the same images for the same compute, beside random, frozen ImageNet and raw pixels.

    python benchmarks/methods.py --data ../shared/data --imagenet efficientnet_lite0.pth

Two sets of images, chest X-rays and histology. Every method gets the steps that cost what 166 of SimCLR do, some
minutes of one CPU core; what a step costs is in the cells of `method_costs.py`. Then frozen features, nearest
neighbours and a logistic regression, by label budget, with intervals, each method against the random weights that it
began with. Masked and restorative methods are also pretrained on ultrasound, and fine-tuned for segmentation on
20 images. A GPU, where there is one, takes the same steps sooner.

``--imagenet`` is a state dict of tf_efficientnet_lite0 (see README). Fills benchmarks/results/methods/ cell by cell and
writes docs/method_comparison.md and the first lines of the recipes that cite it.
``--only xray-simclr nerves-mae table`` does a part, ``--sets xray`` one set; processes may share the work.
``--results`` and ``--commit`` are for a machine where the code lies without its history.
"""

import argparse
import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import methods_page
import numpy as np
import torch
import xrays
from cells import Cells
from method_costs import REFERENCE, RESULTS, recipe_of
from method_sets import (
    ALONE,
    BUDGET,
    COMPONENTS,
    CONTINUED,
    IMAGENET,
    LITE,
    MOMENTUM,
    PCA,
    RANDOM,
    REPLICATES,
    RESTORATIVE,
    SEEDS,
    SEGMENTING,
    SETS,
    SIZE,
    STEPS,
    THREADS,
    TUNE_SEEDS,
    TUNED,
)

import sslmed
from sslmed import artifact
from sslmed.config import TrainingAborted
from sslmed.data.input import network_input
from sslmed.data.loading import plain_loader
from sslmed.data.modality import named
from sslmed.data.store import Store
from sslmed.durable import sha256
from sslmed.evaluation import comparison, probes, protocol
from sslmed.evaluation.comparison import Features
from sslmed.methods import METHODS
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.momentum import cosine_momentum, momentum_at
from sslmed.recipe import FinetuneRecipe, load_finetune, load_pretrain
from sslmed.supervised import study
from sslmed.supervised.arms import Arm as Start
from sslmed.training.starts import start

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "method_comparison.md"
COMMAND = "python benchmarks/methods.py --data ../shared/data --imagenet efficientnet_lite0.pth"


def main() -> None:
    """Compute what is missing, then write the page."""
    arguments = _arguments()
    torch.set_num_threads(THREADS)
    benches = {name: Bench(name, arguments) for name in arguments.sets}
    stages = [f"{name}-{arm}" for name, bench in benches.items() for arm in bench.arms]
    for stage in arguments.only or (*stages, "table"):
        if stage == "table":
            command = COMMAND if list(benches) == list(SETS) else f"{COMMAND} --sets {' '.join(benches)}"
            PAGE.write_text(methods_page.page(benches, command), encoding="utf-8")
            if "xray" in benches:
                caption(benches["xray"])
        else:
            name, _, arm = stage.partition("-")
            benches[name].run(arm)


def caption(bench: "Bench") -> None:
    """Say in the first line of every recipe that cites the page what came out of it."""
    for arm in METHODS:
        path = HERE.parent / "recipes" / f"{recipe_of(arm)}.yaml"
        text = path.read_text(encoding="utf-8")
        path.write_text(methods_page.captioned(text, bench, arm, PAGE.name), encoding="utf-8")


class Bench:
    """The arms of one set of images, each a few cells."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name, self.about, self.imagenet = name, SETS[name], arguments.imagenet
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.cells = Cells(arguments.results, COMMAND, arguments.commit)
        source = arguments.data / self.about.folder
        self.store = xrays.open_store(source, self.work) if name == "xray" else self._store(source)
        if self.about.target:
            self.train, self.test = (xrays.labelled(self.store, side, self.about.target) for side in ("train", "test"))

    @property
    def arms(self) -> list[str]:
        """Methods, and what stands beside them."""
        if not self.about.target:
            random = (f"{RANDOM} {family}" for family in dict.fromkeys(map(self.family, SEGMENTING)))
            return [*SEGMENTING, *(method + ALONE for method in RESTORATIVE), *random]
        return [*METHODS, CONTINUED, IMAGENET, PCA]

    def family(self, arm: str) -> str:
        """The network of an arm, as a recipe has it."""
        if arm.startswith(f"{RANDOM} "):
            return arm.removeprefix(f"{RANDOM} ")
        if arm in (IMAGENET, CONTINUED):
            return LITE
        config = load_pretrain(recipe_of(REFERENCE if arm == PCA else arm.removesuffix(ALONE))).backbone
        return " ".join([config.name, *([f"patch {config.patch}"] if config.patch else ()), config.pool or ""]).strip()

    def run(self, arm: str) -> None:
        """Compute what is missing of an arm."""
        if self.about.target:
            self.probe(arm)
        else:
            for seed in TUNE_SEEDS:
                self.tuned(arm, seed)

    def steps(self, arm: str) -> int:
        """As many as take the compute of STEPS steps of SimCLR on X-rays."""
        if arm in (REFERENCE, CONTINUED):
            return STEPS
        ratio: float = self.cells.result(f"cost-{arm}")["with views"]
        return max(1, round(STEPS / ratio))

    def pretrained(self, arm: str) -> dict[str, Any]:
        """The cell of a pretraining: its ``weights``, or why it ``failed``."""
        arm = arm.removesuffix(ALONE)
        recipe = recipe_of(REFERENCE if arm == CONTINUED else arm)
        begin = sha256(self.imagenet) if arm == CONTINUED else "random"
        overrides = self._overrides(arm)
        settings = {"recipe": xrays.recipe_text(recipe), "split": self.store.split_digest, "overrides": overrides}
        return self.cells.run(
            f"{self.name}-pretrain-{arm}", lambda: self._pretrain(arm, recipe, overrides), **settings, start=begin
        )

    def _overrides(self, arm: str) -> list[str]:
        found = [f"train.max_steps={self.steps(arm)}", f"data.size={SIZE}", f"backbone.in_chans={self.about.channels}"]
        found += ["monitor.knn_every=0", "data.workers=0", "train.precision=32"]
        if arm in MOMENTUM:
            found += [f"method.momentum={MOMENTUM[arm]}", "method.momentum_rule=constant"]
        return [*found, f"backbone.name={LITE}"] if arm == CONTINUED else found

    def _pretrain(self, arm: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
        out = self.folder(arm)
        shutil.rmtree(out, ignore_errors=True)  # whole in one sitting, or its CPU time would not count
        if arm == CONTINUED:
            overrides = [*overrides, f"backbone.init={self.imagenet}"]
        try:
            result = sslmed.pretrain(recipe, self.store.path, out, overrides=overrides)
        except TrainingAborted as error:
            return {"failed": str(error)}
        weights = sha256(out / "artifact" / "model.safetensors")
        metrics = {key: round(each, 4) for key, each in result.metrics.items()}
        return {"steps": result.steps, "weights": weights, "metrics": metrics}

    def folder(self, arm: str) -> Path:
        """The run of a pretraining."""
        return self.work / f"{self.name}-{arm.removesuffix(ALONE)}"

    def momenta(self, arm: str) -> list[float]:
        """Of an average that leaves, step by step."""
        recipe, steps = load_pretrain(recipe_of(arm)), self.steps(arm)
        own: Any = recipe.method
        base = MOMENTUM.get(arm) or momentum_at(recipe.train.batch_size, own.momentum, own.momentum_rule)
        if arm == "ijepa":  # along a straight line
            return [base + (1 - base) * step / steps for step in range(steps)]
        return [cosine_momentum(base, step, steps) for step in range(steps)]

    def weights(self, arm: str) -> str:
        """What says which weights an arm has."""
        if arm == IMAGENET:
            return sha256(self.imagenet)
        if arm in (PCA, RANDOM):
            return arm
        return str(self.pretrained(arm).get("weights", "failed"))

    def probe(self, arm: str) -> list[dict[str, Any]]:
        """An arm beside as many random starts of its network as there are draws."""
        settings = {"weights": self.weights(arm), "split": self.store.split_digest, "size": SIZE}
        settings |= {"budgets": self.about.budgets, "draws": len(SEEDS), "replicates": REPLICATES}
        if settings["weights"] == "failed":
            return []
        found: list[dict[str, Any]] = self.cells.run(
            f"{self.name}-probe-{arm}", lambda: {"rows": self._probe(arm)}, **settings, network=self.family(arm)
        )["rows"]
        return found

    def _probe(self, arm: str) -> list[dict[str, Any]]:
        features = {arm: [self._features(arm)], RANDOM: [self._features(arm, seed) for seed in SEEDS]}
        target, patients = self.store.target(self.about.target), self.store.patients
        budgets = protocol.parse(self.about.budgets)
        drawn, _ = protocol.draws(patients(self.train), target[self.train], budgets, SEEDS)
        weights = protocol.bootstrap_weights(patients(self.test), REPLICATES, seed=0)
        classes = len(self.store.classes(self.about.target))
        rows = comparison.compare(
            features, target[self.train], target[self.test], classes, drawn, weights, reference=RANDOM
        )
        return [plain(row) for row in rows if row.metric == "auroc"]

    def _features(self, arm: str, seed: int | None = None) -> Features:
        """Of an arm, or of the random weights that it begins with; these are kept for the arms that share them."""
        if arm == PCA and seed is None:
            return self._pixels()
        if seed is None:
            return Features(*(self._embed(self._network(arm), rows) for rows in (self.train, self.test)))
        network = self._begin(arm, seed)
        kept = self.work / "features" / f"{self.name}-{self.store.split_digest[:8]}-{SIZE}-{digest(network)}.npz"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.npz")
            np.savez(partial, *(self._embed(network, rows) for rows in (self.train, self.test)))
            partial.replace(kept)
        with np.load(kept) as sides:
            return Features(*sides.values())

    def _begin(self, arm: str, seed: int) -> torch.nn.Module:
        """The network of an arm before its first step: some methods draw weights or fix positions in their own way."""
        torch.manual_seed(seed)
        backbone = build(self._config(arm), SIZE, seed)
        if arm not in METHODS:
            return backbone.network
        method = load_pretrain(recipe_of(arm)).method
        return METHODS[arm](method, backbone).exported

    def _config(self, arm: str) -> BackboneConfig:
        if arm in (IMAGENET, CONTINUED):
            return BackboneConfig(name=LITE, in_chans=self.about.channels)
        own = load_pretrain(recipe_of(REFERENCE if arm == PCA else arm)).backbone
        return own.model_copy(update={"in_chans": self.about.channels})

    def _network(self, arm: str) -> torch.nn.Module:
        if arm == IMAGENET:
            config = self._config(arm).model_copy(update={"init": str(self.imagenet)})
            return start(config, SIZE, named(self.store.modality), seed=0).backbone.network
        self._there(arm)
        return sslmed.load_backbone(self.folder(arm))

    def _there(self, arm: str) -> None:
        weights = self.folder(arm) / "artifact" / "model.safetensors"
        if not weights.exists() or sha256(weights) != self.weights(arm):
            cell = self.cells.path(f"{self.name}-pretrain-{arm.removesuffix(ALONE)}")
            raise SystemExit(f"the weights of {arm} are not in {self.work}; delete {cell} to make them")

    def _embed(self, network: torch.nn.Module, rows: Any) -> Any:
        policy, channels = named(self.store.modality), self.about.channels
        return probes.embed(network, plain_loader(self.store, rows, SIZE, policy, channels=channels))

    def _pixels(self) -> Features:
        """Principal components of the pixels, fitted on all train images, labelled or not.

        Turned at random: the probe gives every feature the same variance, which would make the last component, noise,
        as large as the first. Neighbours do not notice.
        """
        from sklearn import decomposition

        sides = [self._flat(rows) for rows in (self.store.rows("train", "unlabelled"), self.train, self.test)]
        count = min(COMPONENTS, *sides[0].shape)
        components = decomposition.PCA(count, svd_solver="randomized", random_state=0).fit(sides[0])
        turn = np.linalg.qr(np.random.default_rng(0).standard_normal((count, count)))[0]
        return Features(*(components.transform(side) @ turn for side in sides[1:]))

    def _flat(self, rows: Any) -> Any:
        policy, store, channels = named(self.store.modality), self.store, self.about.channels
        given = ((store.pixels(row), store.intensity(row)) for row in map(int, rows))
        return np.stack([network_input(*each, policy, SIZE, channels).numpy().ravel() for each in given])

    def tuned(self, arm: str, seed: int) -> dict[str, Any]:
        """The cell of a fine-tuning on few masks."""
        recipe = self._tuning(arm)
        random = arm.startswith(f"{RANDOM} ")
        weights = RANDOM if random else self.weights(arm)
        if weights == "failed":
            return {}
        settings = {"recipe": recipe.model_dump(mode="json"), "weights": weights, "split": self.store.split_digest}

        def compute() -> dict[str, Any]:
            source = RANDOM if random else str(self.folder(arm))
            if not random:
                self._there(arm)
            begin = Start(arm.replace(" ", "-"), source, self._card(arm), not random)
            cell, folder = study.Cell(begin, BUDGET, seed), self.work / self.name
            shutil.rmtree(folder / study.RUNS / cell.name, ignore_errors=True)  # of other weights or settings
            run = study.fine_tune(recipe, self.store, cell, folder)
            return {"steps": recipe.train.max_steps, "run": run.name}

        return self.cells.run(f"{self.name}-dice-{arm}-{seed}", compute, **settings)

    def _tuning(self, arm: str) -> FinetuneRecipe:
        decoder = "random" if arm.endswith(ALONE) else "auto"
        overrides = (*TUNED, "data.workers=0", f"head.decoder={decoder}")
        return load_finetune(f"{self.store.modality}/segmentation", overrides)

    def _card(self, arm: str) -> artifact.Card:
        """An arm's own; of random weights that of a method with this network, whose weights are here."""
        same = (each for each in SEGMENTING if self.family(each) == self.family(arm) and self.folder(each).exists())
        return artifact.read_card(self.folder(next(same) if arm.startswith(RANDOM) else arm))

    def dice(self, arm: str) -> list[dict[str, Any]]:
        """Test Dice of an arm and of random weights of its network, over all seeds, paired by image."""
        settings = {"weights": self.weights(arm), "split": self.store.split_digest, "seeds": len(TUNE_SEEDS)}
        settings |= {"recipe": self._tuning(arm).model_dump(mode="json"), "replicates": REPLICATES}
        if settings["weights"] == "failed":
            return []

        def compute() -> dict[str, Any]:
            folder = self.work / self.name / study.RUNS
            pair = {arm: arm, RANDOM: f"{RANDOM} {self.family(arm)}"}
            runs = {
                name: [folder / self.tuned(each, seed)["run"] for seed in TUNE_SEEDS] for name, each in pair.items()
            }
            patients = artifact.read_card(runs[arm][0]).data.patients
            rows = study.compared(runs, BUDGET, patients, REPLICATES)
            return {"rows": [plain(row) for row in rows if row.metric == "dice"]}

        found: list[dict[str, Any]] = self.cells.run(f"{self.name}-compared-{arm}", compute, **settings)["rows"]
        return found

    def _store(self, source: Path) -> Store:
        path, about = self.work / f"store-{self.name}", self.about
        if not path.exists():
            options = {n: source / v if n in ("labels", "masks") else v for n, v in about.ingest.items()}
            sslmed.ingest(source / about.source, path, key=xrays.public_key(self.work), **options)
        return Store(path)


def digest(network: torch.nn.Module) -> str:
    """Sixteen digits that say which weights a network has."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def plain(row: comparison.Row) -> dict[str, Any]:
    """A row as JSON holds it, four digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return None if value != value else round(value, 4) if isinstance(value, float) else value

    return {name: rounded(value) for name, value in dataclasses.asdict(row).items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the sets of images")
    parser.add_argument("--imagenet", type=Path, required=True, help="a state dict of tf_efficientnet_lite0")
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), help="which to compute and to show")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "methods", help="stores and runs; not committed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the finished cells")
    parser.add_argument("--commit", help="of this code")
    parser.add_argument("--only", nargs="*", help="SET-ARM, such as xray-simclr, and table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
