"""How much memory a training takes, against batch and image size: plain, with checkpointed gradients, accumulated.

    python benchmarks/memory.py

SimCLR on resnet18 and MAE on vit_tiny (decoder 256 wide, 4 blocks), fp32, one channel. Each cell is a process of its
own that takes two optimizer steps by ``fit``, with AdamW, on views that are there already. What counts is its greatest
resident memory until the end of the second step, beyond what it has with the network loaded and before the first batch:
the batch, activations, gradients, moments, what the kernels take, and what malloc keeps of memory that was freed. How
much the last is a few cells tell in which malloc gives large pieces back at once (``given back``; sslmed has no such
setting). On a GPU it is what torch has allocated there.

A cell that is expected to take more than 60 % of the memory that is free is left out, and that is said. Finished cells
are kept, so that a second call goes on. It draws docs/images/memory.png.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hardware
import pytorch_lightning as pl
import torch
from cells import Cells, device
from fits import ReadyViews, fit_here

from sslmed.durable import write_atomically
from sslmed.methods.mae import MAE, MAEConfig
from sslmed.methods.method import Method
from sslmed.methods.simclr import SimCLR, SimCLRConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.training.trainer import TrainConfig

if TYPE_CHECKING:
    from curves import Panel

HERE = Path(__file__).parent
RESULTS, IMAGE = HERE / "results" / "memory", HERE.parent / "docs" / "images" / "memory.png"
SHARE, STEPS, MB = 0.6, 2, 1e6
VIEWS = {"simclr": 2, "mae": 1}
TITLES = {"simclr": "SimCLR, resnet18", "mae": "MAE, vit_tiny"}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpoint_gradients": {"checkpoint_gradients": True},
    "accumulate 4": {"accumulate": 4},
}
BATCHES, SIZES = (32, 64, 128, 256), (64, 96, 128, 224)
AT_SIZE, AT_BATCH = {"simclr": 96, "mae": 128}, 64  # where batches, and where sizes, are compared
M_MMAP_THRESHOLD = -3  # malloc.h; left alone it grows to 32 MiB as large pieces are freed
PRELOAD = ["sslmed.methods", "sslmed.training.fit"]  # in this order: timm wants a torchvision that imports


@dataclass(frozen=True)
class Cell:
    """One training."""

    method: str
    mode: str
    size: int
    batch: int
    given_back: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.mode}-{self.size}-{self.batch}{'-given back' if self.given_back else ''}"

    @property
    def load(self) -> int:
        """What its memory grows with, nearly in proportion."""
        return self.batch * self.size**2


def main() -> None:
    """Measure what is missing, print the table, draw the curves."""
    from curves import lines  # matplotlib; the processes of the cells import this module too

    given = _arguments()
    results, image = (given.results, given.results / "memory.png") if given.results else (RESULTS, IMAGE)
    cells, place = Cells(results, "python benchmarks/memory.py"), "gpu" if torch.cuda.is_available() else "cpu"
    found: dict[Cell, dict[str, Any]] = {}
    for cell in _grid(given.most):
        settings = {"steps": STEPS, "precision": 32, "channels": 1, "on": place}
        expected, free = _expected(cell, found), hardware.available_bytes()
        if cells.finished(cell.name, **settings) is None and expected > SHARE * free:
            print(f"{cell.name}: skipped, about {expected / 1e9:.1f} GB expected of {free / 1e9:.1f} GB that are free")
            continue
        found[cell] = cells.run(cell.name, lambda: in_own_process(cell), **settings)  # noqa: B023
        print(f"{cell.name}: {found[cell]['bytes'] / MB:.0f} MB", flush=True)
    print(_table(found))
    with write_atomically(image) as partial:
        partial.write_bytes(lines(_panels(found), f"Memory beyond the loaded network, fp32, {device()}"))


def in_own_process(cell: Cell) -> dict[str, Any]:
    """Bytes and seconds of a training in a process that has done nothing else.

    Raises:
        RuntimeError: the process died, most likely for want of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(cell, its))
    process.start()
    its.close()
    try:
        result: dict[str, Any] = mine.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{cell.name}: its process ended with {process.exitcode}") from None
    process.join()
    return result


def _send(cell: Cell, answer: Connection) -> None:
    answer.send(measure(cell))


def measure(cell: Cell) -> dict[str, Any]:
    """What the training takes in this process, which should have trained nothing before."""
    if cell.given_back:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    torch.manual_seed(0)
    method, gauge = _method(cell), Gauge()
    train = TrainConfig(max_steps=STEPS, batch_size=cell.batch, precision=32, **MODES[cell.mode])
    fit_here(method, ReadyViews(VIEWS[cell.method], 1, cell.size), cell.batch * STEPS, train, [gauge])
    weights = sum(parameter.nbytes for parameter in method.parameters())
    return {"bytes": gauge.peak - gauge.before, "before": gauge.before, "weights": weights} | {
        "seconds of the last step": round(gauge.seconds, 3),
        "flags": hardware.flags(),
    }


class Gauge(pl.Callback):
    """The greatest memory between the start of training and the end of its last step, before the checkpoint."""

    before = peak = 0
    seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gc.collect()
        self.before = _reset(pl_module.device)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.peak = _peak(pl_module.device)  # synchronises a GPU
        self.seconds, self._since = time.perf_counter() - self._since, time.perf_counter()


def _reset(on: torch.device) -> int:
    """The memory now, of which greater values are remembered from here on."""
    if on.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # else a peak of the past would be the greatest
    return _resident("VmRSS")


def _peak(on: torch.device) -> int:
    if on.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM")  # not getrusage: a child begins there with what its parent once had


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.findall(rf"{name}:\s+(\d+)", status)[0])


def _method(cell: Cell) -> Method:
    if cell.method == "simclr":
        return SimCLR(SimCLRConfig(), build(BackboneConfig(name="resnet18"), cell.size, 0))
    config = MAEConfig(decoder_width=256, decoder_depth=4, decoder_heads=8)
    return MAE(config, build(BackboneConfig(name="vit_tiny_patch16_224"), cell.size, 0))


def _grid(most: int | None) -> list[Cell]:
    """Smaller ones first, so that they foretell the others."""
    cells = []
    for method, at in AT_SIZE.items():
        pairs = {(size, AT_BATCH) for size in SIZES} | {(at, batch) for batch in BATCHES}
        cells += [Cell(method, mode, *pair) for mode in MODES for pair in pairs]
        if not torch.cuda.is_available():
            cells += [Cell(method, mode, at, AT_BATCH, given_back=True) for mode in MODES]
    wanted = [cell for cell in cells if most is None or cell.load <= most]
    return sorted(wanted, key=lambda cell: (cell.load, cell.name))


def _expected(cell: Cell, found: dict[Cell, dict[str, Any]]) -> float:
    """Bytes, from the largest cell of the same kind so far; 0 where there is none."""
    alike = [each for each in found if (each.method, each.mode, each.given_back) == (cell.method, cell.mode, False)]
    if not alike:
        return 0
    largest = max(alike, key=lambda each: each.load)
    return float(found[largest]["bytes"]) * max(1, cell.load / largest.load)


def _table(found: dict[Cell, dict[str, Any]]) -> str:
    rows = [f"{'':12}{'pixels':>8}{'batch':>8}" + "".join(f"{mode:>30}" for mode in MODES)]
    kinds = dict.fromkeys((cell.method, cell.size, cell.batch, cell.given_back) for cell in _in_order(found))
    for method, size, batch, back in kinds:
        own = {mode: found.get(Cell(method, mode, size, batch, back)) for mode in MODES}
        label = "given back" if back else method
        rows.append(f"{label:12}{size:>8}{batch:>8}" + "".join(f"{_told(own[m], own['plain']):>30}" for m in MODES))
    return "\n".join(rows)


def _told(each: dict[str, Any] | None, plain: dict[str, Any] | None) -> str:
    if each is None:
        return "skipped"
    beside = f" {each['bytes'] / plain['bytes']:.2f}x" if plain else ""
    return f"{each['bytes'] / MB:.0f} MB{beside} {each['seconds of the last step']:.2f} s"


def _panels(found: dict[Cell, dict[str, Any]]) -> "list[Panel]":
    from curves import Panel

    panels = []
    for method, at in AT_SIZE.items():
        by_batch, by_size = {}, {}
        for mode in MODES:
            own = [
                each for each in _in_order(found) if (each.method, each.mode, each.given_back) == (method, mode, False)
            ]
            by_batch[mode] = [(cell.batch, found[cell]["bytes"] / MB) for cell in own if cell.size == at]
            by_size[mode] = [(cell.size, found[cell]["bytes"] / MB) for cell in own if cell.batch == AT_BATCH]
        panels.append(Panel(f"{TITLES[method]}, {at} pixels", "images a step", "MB", by_batch))
        panels.append(Panel(f"{TITLES[method]}, {AT_BATCH} images a step", "pixels a side", "MB", by_size))
    return panels


def _in_order(found: dict[Cell, dict[str, Any]]) -> list[Cell]:
    return sorted(found, key=lambda cell: (list(VIEWS).index(cell.method), cell.size, cell.batch, cell.given_back))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="where cells and picture go instead, to try the script")
    parser.add_argument("--most", type=int, help="only cells of at most so many pixels a step (images x side x side)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
