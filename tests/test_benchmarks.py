"""What the benchmarks measure with: memory of a known array, FLOPs counted by hand, whose step is whose."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from sslmed.methods import METHODS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ABSENT = ("albumentations", "lightly", "hdf5plugin", "pydicom", "nibabel")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name; they import each other by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_memory_that_was_freed_counts_until_it_is_forgotten(benchmark: Any) -> None:
    memory, cpu = benchmark("memory"), torch.device("cpu")
    before = memory._reset(cpu)
    array = np.ones(25_000_000)
    del array
    assert 195e6 < memory._peak(cpu) - before < 220e6
    again = memory._reset(cpu)
    assert memory._peak(cpu) - again < 10e6


def test_a_large_cell_is_expected_to_take_its_share(benchmark: Any) -> None:
    memory = benchmark("memory")
    small, large = (memory.Cell("mae", "plain", 96, batch) for batch in (32, 128))
    assert memory._expected(large, {}) == 0
    assert memory._expected(large, {small: {"bytes": 100}}) == 400
    assert memory._expected(memory.Cell("mae", "accumulate 4", 96, 128), {small: {"bytes": 100}}) == 0
    loads = [cell.load for cell in memory._grid(None)]
    assert loads == sorted(loads)


def test_the_flops_of_a_transformer_are_those_of_its_products(benchmark: Any) -> None:
    gpu = benchmark("gpu")
    case = gpu.SMALL_CASES[1]
    method = gpu._method(case, 64)
    network = method.backbone.network
    width, depth, tokens = network.embed_dim, len(network.blocks), (64 // case.patch) ** 2 + network.num_prefix_tokens
    hidden = network.blocks[0].mlp.fc1.out_features
    embedding = (64 // case.patch) ** 2 * case.patch**2 * width
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    head = width * 2048 + 2048 * 128
    a_view = 2 * (3 * depth * block + 2 * embedding + 3 * head)  # the image needs no gradient
    loss = 2 * 3 * 8 * 8 * 128 / 4  # similarities of 8 views with each other, for 4 images
    counted = gpu.flops_of_an_image(method, gpu._batch(case, 64, 4, "cpu"))
    assert counted == pytest.approx(2 * a_view + loss, rel=1e-3)


def test_turns_give_each_loop_its_own_steps(benchmark: Any) -> None:
    fits, gpu = benchmark("fits"), benchmark("gpu")
    taken: list[int] = []
    turns = fits.Turns(lambda: taken.append(1))
    method = gpu._method(gpu.SMALL_CASES[0], 32)
    train = fits.TrainConfig(max_steps=4, batch_size=4, precision=32, devices="cpu", save_every_steps=4)
    fits.fit_here(method, fits.ReadyViews(2, 1, 32), 8, train, [turns])
    assert len(turns.fit) == len(turns.loop) == len(taken) == 3, "all steps but the first"
    assert {"Guard", "Monitor", "Checkpointer", "Watchdog"} <= turns.inside.keys()
    assert turns.save > 0
    assert sum(turns.inside.values()) < turns.whole + turns.save


@pytest.mark.slow
def test_the_gpu_benchmark_needs_no_albumentations_and_no_codec(tmp_path: Path) -> None:
    """On the CPU, in small: its imports stay lazy, in the worker too."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ABSENT:
        (stubs / f"{name}.py").write_text(f"raise ModuleNotFoundError(name='{name}')\n")
    results = tmp_path / "results"
    words = ["--small", "--only", "vit_small", "--workers", "1", "--results", str(results), "--commit", "0123abc"]
    environment = {**os.environ, "PYTHONPATH": str(stubs)}
    subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py"), *words], check=True, env=environment, timeout=240)
    cell = json.loads(next(results.glob("*.json")).read_text(encoding="utf-8"))
    assert (cell["settings"]["compression"], cell["made"]["commit"]) == ("none", "0123abc")
    assert "albumentations" in cell["result"]["CPU views"]["left out"]
    for arm in ("no data", "device views"):
        assert cell["result"][arm]["images a second"] > 0
    assert cell["result"]["device views"]["workers"] == 1


def test_settings_of_every_method_have_a_memory_and_a_place_on_the_page(benchmark: Any) -> None:
    memory = benchmark("gpu_memory")
    assert memory.SETTINGS.keys() == METHODS.keys()
    page = memory.PAGE.read_text(encoding="utf-8")
    found = {name: {"GB": 1000 + number} for number, name in enumerate(METHODS)}
    filled = memory.filled(page, found)
    for name in METHODS:
        row = next(line for line in filled.splitlines() if line.startswith(f"| [`{name}`]"))
        assert f" → {found[name]['GB']:.1f} GB at B {memory.SETTINGS[name].batch} | " in row
    assert memory.filled(filled, {name: {"GB": 2.0} for name in METHODS}).count("→ 2.0 GB") == len(METHODS)


@pytest.mark.slow
def test_the_memory_of_settings_is_measured_on_views_that_are_there(benchmark: Any, tmp_path: Path) -> None:
    memory = benchmark("gpu_memory")
    store = memory.make_store(tmp_path / "store", memory.IMAGES, 64)
    for name in ("moco_v2", "swav", "jigsaw"):
        setting = memory.Setting("test_resnet", 48, 16, memory.SETTINGS[name].method)
        assert memory.measured(name, setting, store)["images a second"] > 0


class FakeBench:
    """A set of three arms: one that is better than random, one that shows nothing, one that failed."""

    name = "xray"
    arms: ClassVar = ["simclr", "dino", "ibot", "ijepa", "pca"]
    about = SimpleNamespace(title="Images", target="label", budgets="10%")
    verdicts: ClassVar = {
        "simclr": "better than random (so)",
        "ijepa": "no difference shown",
        "pca": "worse than random",
    }

    def __init__(self, device: str = "x86_64 CPU") -> None:
        made = {"cpu_seconds": 300.0, "device": device, "commit": "0123abc"}
        costs = {"with views": 1.5, "memory": 2.0}
        self.cells = SimpleNamespace(made=lambda _: made, result=lambda _: costs)
        self.store = SimpleNamespace(rows=lambda side: range({"train": 30, "val": 2, "test": 5}[side]))

    def family(self, arm: str) -> str:
        return "resnet18"

    def steps(self, arm: str) -> int:
        return 74

    def momenta(self, arm: str) -> list[float]:
        return [0.5, 0.8]

    def pretrained(self, arm: str) -> dict[str, Any]:
        return {"failed": "stood still"} if arm == "ibot" else {"steps": 74, "metrics": {"loss": 1.0}}

    def probe(self, arm: str) -> list[dict[str, Any]]:
        if arm not in self.verdicts:
            return []
        mean = {"simclr": 0.9, "ijepa": 0.7, "pca": 0.3}[arm]
        rows = []
        for probe in ("knn", "linear"):
            common = {"probe": probe, "budget": "10%", "draw_sd": 0.02}
            value = {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}
            rows.append(common | {"arm": arm, "value": value, "difference": value, "verdict": self.verdicts[arm]})
            begin = {"mean": 0.6, "low": 0.5, "high": 0.7}
            rows.append(common | {"arm": "random", "value": begin, "difference": None, "verdict": None})
        return rows


def test_the_comparisons_page_tells_what_failed_and_what_shows_nothing(benchmark: Any) -> None:
    page = benchmark("methods_page").page({"xray": FakeBench()}, "the command")
    assert "| simclr | resnet18 | 0.900 [0.850, 0.950] (+0.900) | 1.50 | 2.00 |" in page
    assert "| ijepa | resnet18 | 0.700 [0.650, 0.750] (+0.700 =) | 1.50 | 2.00 |" in page
    assert "| dino | resnet18 | failed | 1.50 | 2.00 |" in page
    assert "| pca |  | 0.300 [0.250, 0.350] (+0.300 −) |  |  |" in page
    assert "the highest mean is that of `simclr`; no other mean lies in its interval" in page
    assert "shown: `ijepa`. Worse than random weights: `pca`." in page
    assert "| 10% | resnet18 | simclr | 0.900 [0.850, 0.950] ± 0.020 | +0.900 [+0.850, +0.950] | better" in page
    assert "| xray | ibot |  | stood still |" in page
    assert "300 to 300 CPU seconds" in page
    assert "40% (`dino`), 40% (`ibot`), 40% (`ijepa`)" in page


@pytest.mark.parametrize(("device", "minutes"), [("x86_64 CPU", ", 5 CPU minutes"), ("NVIDIA H200", "")])
def test_a_recipes_first_line_says_what_was_tried(device: str, minutes: str, benchmark: Any) -> None:
    pages, bench = benchmark("methods_page"), FakeBench(device)
    recipe = "# It on chest X-rays; tried on CC BY 4.0 images: something old (docs/page.md)\nmethod: {}\n"
    start, scores = (
        "# It on chest X-rays; tried on CC BY 4.0 images: 74 steps",
        "of labels, random 0.600 (docs/page.md)\nmethod: {}\n",
    )
    assert pages.captioned(recipe, bench, "simclr", "page.md") == f"{start}{minutes}, AUROC 0.900 from 10 % {scores}"
    stopped = pages.captioned(recipe, bench, "dino", "page.md")
    assert stopped.startswith("# It on chest X-rays; tried on CC BY 4.0 images: stopped by a monitor (docs/page.md)\n")
    assert pages.captioned("# Another\n", bench, "simclr", "page.md") == "# Another\n"
