"""What a step of every pretext task takes beside one of SimCLR: time, and memory.

    python benchmarks/method_costs.py --source ../shared/data/xray_pneumonia

Each method as its X-ray recipe has it: its network, 64 images of 96 pixels, fp32, one thread. Steps of a method and of
SimCLR take turns, and a ratio is that of one turn, in CPU time. ``step`` is the loss, its gradient and the update;
``with views`` also makes the views from the store.

Memory is counted, not sampled, so that it is the same everywhere: weights, buffers, gradients, two moments of whatever
is trained, and what is kept from the loss for its gradient. The peak of a real process is a little higher.

Fills benchmarks/results/methods/, and the columns ``time`` (with views) and ``memory`` of docs/methods.md.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xrays
from cells import Cells
from method_sets import with_rows

from sslmed.data.loading import Batch, ViewDataset, stream_loader
from sslmed.data.modality import named, with_views
from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.methods import METHODS
from sslmed.methods.method import Method, Progress
from sslmed.models.backbones import build
from sslmed.optim import build_optimizer
from sslmed.recipe import PretrainRecipe, load_pretrain
from sslmed.shipped import shipped

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "methods", HERE.parent / "docs" / "methods.md"
COMMAND = "python benchmarks/method_costs.py --source ../shared/data/xray_pneumonia"
ROUNDS, WARM = 5, 1
MOMENTS = 2  # of AdamW, which all recipes use here
REFERENCE = "simclr"
TIME = 3  # the column of the page's table; that of memory follows


def main() -> None:
    """Measure what is missing, print all, and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the folder of xray_pneumonia")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "methods", help="the store; not committed")
    given = parser.parse_args()
    torch.set_num_threads(1)
    store, cells = xrays.open_store(given.source, given.work), Cells(RESULTS, COMMAND)
    found = {}
    for name in METHODS:
        found[name] = cost(cells, name, store)
        print(f"{name:20}", found[name], flush=True)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(page: str, costs: dict[str, dict[str, Any]]) -> str:
    """The page with time and memory in the row of each method."""

    def fill(name: str, columns: list[str]) -> None:
        columns[TIME : TIME + 2] = [f"{costs[name]['with views']:.2f}", f"{costs[name]['memory']:.2f}"]

    return with_rows(page, fill)


def cost(cells: Cells, name: str, store: Store) -> dict[str, Any]:
    """Ratios to SimCLR, ``step``, ``with views`` and ``memory``, and the bytes."""
    recipe = recipe_of(name)
    return cells.run(f"cost-{name}", lambda: _measured(name, store), recipe=xrays.recipe_text(recipe), rounds=ROUNDS)


def recipe_of(name: str) -> str:
    """The method's shipped recipe for X-rays with a network that others have too."""
    known = [each.name for each in shipped()]
    return next(
        recipe for recipe in (f"xray/{name}_{network}" for network in ("resnet18", "vit_tiny")) if recipe in known
    )


def _measured(name: str, store: Store) -> dict[str, Any]:
    own, other = Turn(recipe_of(name), store), Turn(recipe_of(REFERENCE), store)
    ratios: list[tuple[float, float]] = []
    for turn in range(WARM + ROUNDS):
        (step, whole), (other_step, other_whole) = own.take(turn), other.take(turn)
        if turn >= WARM:
            ratios.append((step / other_step, whole / other_whole))
    median = np.median(np.array(ratios), axis=0)
    kept, reference = own.bytes(), other.bytes()
    return {
        "step": round(float(median[0]), 3),
        "with views": round(float(median[1]), 3),
        "memory": round(kept / reference, 3),
        "bytes": kept,
    }


class Turn:
    """A training of which single steps are taken."""

    def __init__(self, recipe: str, store: Store) -> None:
        torch.manual_seed(0)
        self.settings: PretrainRecipe = load_pretrain(recipe)
        settings, policy = self.settings, with_views(named(store.modality), self.settings.views)
        size, self.images = settings.data.size, settings.train.batch_size
        kind = METHODS[settings.method.name]  # type: ignore[attr-defined]
        self.method: Method = kind(settings.method, build(settings.backbone, size, 0))
        self.method.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        groups = self.method.parameter_groups(settings.optim.weight_decay)
        self.optimizer = build_optimizer(settings.optim, groups, self.images)
        channels = settings.backbone.in_chans
        dataset = ViewDataset(store, policy, self.method.views(policy), size, channels, 0, None)
        rows = store.rows("train", "unlabelled")
        sampler = StreamSampler(rows, self.images, steps=2 * (ROUNDS + WARM), seed=0)
        self.batches = iter(stream_loader(dataset, sampler, workers=0))

    def take(self, turn: int) -> tuple[float, float]:
        """CPU seconds of a step, and of one with its views."""
        batch, views = timed(lambda: next(self.batches))
        _, step = timed(lambda: self._step(batch, turn))
        return step, step + views

    def _step(self, batch: Batch, turn: int) -> None:
        self.optimizer.zero_grad()
        self.method.loss(batch)["loss"].backward()
        self.method.before_step(Progress(turn, 1000, 0, self.images))
        self.optimizer.step()
        self.method.after_step(Progress(turn + 1, 1000, 0, self.images))

    def bytes(self) -> int:
        """Of a training step, counted."""
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        parameters = list(self.method.parameters())
        held = sum(each.nbytes for each in [*parameters, *self.method.buffers()])
        held += sum((1 + MOMENTS) * each.nbytes for each in parameters if each.requires_grad)
        own = {each.untyped_storage().data_ptr() for each in parameters}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = self.method.loss(next(self.batches))
        found = sum(size for place, size in kept.items() if place not in own)
        outputs["loss"].backward()  # the graph, and with it the storages, had to live until here
        return held + found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and its CPU seconds."""
    started = time.process_time()
    result = work()
    return result, time.process_time() - started


if __name__ == "__main__":
    main()
