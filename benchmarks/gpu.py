"""How much of a GPU a pretraining uses: images a second, share of the peak, share of the time spent waiting for data.

    python benchmarks/gpu.py [--only vit_small] [--results DIR] [--commit HASH]
    python benchmarks/gpu.py --small --results DIR      the same code on the CPU, tiny networks, 2 steps

SimCLR on ResNet-50 and on ViT-S/16 (two views), MAE on ViT-B/16; 224 pixels, 256 images a step, bf16, one channel.
``no data`` is the ceiling: Lightning alone, one batch that stays on the GPU. ``device views`` and ``CPU views`` are
trainings by ``fit`` from a store of 16-bit phantoms made on the spot, with workers, guard and monitor; where
albumentations is not installed there are none of the CPU. Where hdf5plugin is not, the store is not compressed.

FLOPs are those of the forward and backward passes of one image with all its views, counted by torch; the utilisation
is of the card's dense bf16 peak. Waiting is as `sslmed.training.wait_meter` has it, from the end of a step to the start
of the next, so that making views on the device is in it; what these take by themselves is told too. Steps until the
workers' first batches are used up do not count.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cells as kept
import hardware
import numpy as np
import pytorch_lightning as pl
import torch
from fits import fit_here
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sslmed.data import splits
from sslmed.data.loading import MOST_WORKERS, PREFETCH, Batch, ViewDataset
from sslmed.data.modality import named, policy_record
from sslmed.data.phantoms import phantom
from sslmed.data.raw_batches import RawCollate, RawDataset
from sslmed.data.shards.tables import NewScan
from sslmed.data.shards.writer import StoreWriter
from sslmed.data.store import Store
from sslmed.keyed_rng import rng
from sslmed.methods.mae import MAE, MAEConfig
from sslmed.methods.method import Method
from sslmed.methods.simclr import SimCLR, SimCLRConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig
from sslmed.training.input_speed import Chosen
from sslmed.training.trainer import TrainConfig, build_trainer
from sslmed.training.wait_meter import WaitMeter

RESULTS = Path(__file__).parent / "results" / "gpu"
MODALITY = named("xray")
DRAWN = 32  # pictures; the others are these with other noise
# Dense bf16 of the makers' data sheets, FLOP/s; the first name that the card's contains.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
PEER = "a public peer reports 871 images/s for ViT-S/16 with two views, 256 images a step, on an H200"
STAND_IN = "def Bitshuffle(**_):\n    return {}\n"  # no compression; Fletcher-32 stays


@dataclass(frozen=True)
class Case:
    """One network and its pretext task."""

    name: str
    method: str
    backbone: str
    patch: int | None = None
    decoder: tuple[int, int, int] = (512, 8, 16)  # the paper's: width, depth, heads


@dataclass(frozen=True)
class Scale:
    """How much is computed."""

    size: int
    batch: int
    images: int
    side: int  # of an image in the store
    measured: int
    settling: int  # steps before that, after those that the workers' first batches serve
    workers: Any
    precision: Any
    devices: Any


CASES = [
    Case("resnet50", "simclr", "resnet50"),
    Case("vit_small", "simclr", "vit_small_patch16_224"),
    Case("vit_base_mae", "mae", "vit_base_patch16_224"),
]
SMALL_CASES = [
    Case("resnet50", "simclr", "test_resnet"),
    Case("vit_small", "simclr", "test_vit", 8),
    Case("vit_base_mae", "mae", "test_vit", 8, (64, 2, 4)),
]


def main() -> None:
    """Measure the cases that are missing, keep each, print the table."""
    given = _arguments()
    on_gpu = not given.small
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --small --results DIR runs the same code on the CPU")
    cells = kept.Cells(given.results, f"python benchmarks/gpu.py{'' if on_gpu else ' --small'}", given.commit)
    scale = _scale(on_gpu, given.workers)
    with tempfile.TemporaryDirectory() as folder:
        compression = _stand_in(Path(folder) / "modules")
        store = make_store(Path(folder) / "store", scale.images, scale.side)
        for case in CASES if on_gpu else SMALL_CASES:
            if given.only and case.name not in given.only:
                continue
            settings = {"case": asdict(case), "scale": asdict(scale), "compression": compression}
            name = f"{kept.device() if on_gpu else 'small'} {case.name}"
            print(_table(case, cells.run(name, lambda: measure(case, scale, store), **settings)), flush=True)  # noqa: B023
    print(PEER)


def measure(case: Case, scale: Scale, store: Store) -> dict[str, Any]:
    """FLOPs of an image, and every arm."""
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "no data": lambda: _without_data(case, scale),
        "device views": lambda: _from_store(case, scale, store, RawDataset),
        "CPU views": lambda: _from_store(case, scale, store, ViewDataset),
    }
    flops = flops_of_an_image(_method(case, scale.size), _batch(case, scale.size, 4, "cpu"))
    found: dict[str, Any] = {"flags": hardware.flags(), "GFLOP of an image": round(flops / 1e9, 3)}
    peak = next((each for name, each in PEAKS.items() if name in kept.device()), None)
    for name, arm in arms.items():
        if name == "CPU views" and not _importable("albumentations"):
            found[name] = {"left out": "albumentations is not installed"}
            continue
        try:
            found[name] = arm()
        except Exception as error:  # device time is dear: the others still count
            found[name] = {"left out": f"{type(error).__name__}: {error}"[:500]}
            continue
        if peak:
            found[name]["utilisation"] = round(flops * found[name]["images a second"] / peak, 4)
    return found


def flops_of_an_image(method: Method, batch: Batch) -> float:
    """Of forward and backward passes, with attention as the matrix products that it is; no optimizer, no views."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method.loss(batch)["loss"].backward()
    return counter.get_total_flops() / len(batch.ids)


def _without_data(case: Case, scale: Scale) -> dict[str, Any]:
    pace = Pace(scale, ahead=0)
    train = _train(scale, pace.steps)
    method = _method(case, scale.size).to(memory_format=torch.channels_last)
    method.prepare(OptimConfig(), scale.batch, pace.steps, pace.steps)
    batch = _batch(case, scale.size, scale.batch, "cpu" if scale.devices == "cpu" else "cuda")
    loader = DataLoader([batch] * pace.steps, batch_size=None)
    build_trainer(train, pace.steps, [*pace.meters, pace]).fit(method.train(), loader)
    return pace.result()


def _from_store(case: Case, scale: Scale, store: Store, kind: Any) -> dict[str, Any]:
    most = MOST_WORKERS if scale.workers == "auto" else scale.workers
    pace = Pace(scale, ahead=PREFETCH * most)
    method = _method(case, scale.size)
    dataset = kind(store, MODALITY, method.views(MODALITY), scale.size, 1, 0, None)
    train = _train(scale, pace.steps)
    fit_here(method, dataset, len(store), train, [*pace.meters, pace], workers=scale.workers)
    views = {"seconds of the views": round(_rendering(dataset, scale), 5)} if kind is RawDataset else {}
    store.close()
    return pace.result() | views


def _rendering(dataset: RawDataset, scale: Scale) -> float:
    """Seconds that the device takes for the views of a batch that lies there."""
    samples = [dataset[0, row] for row in range(scale.batch)]
    batch, taken = RawCollate(0)(samples).to("cpu" if scale.devices == "cpu" else "cuda"), []
    for _ in range(4):
        started = _now()
        batch.render()
        taken.append(_now() - started)
    return min(taken)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Pace(pl.Callback):
    """Images a second, and the share of waiting, over the steps that count.

    Args:
        ahead: batches that are ready before they are asked for.
    """

    def __init__(self, scale: Scale, ahead: int) -> None:
        self.scale = scale
        self.first = ahead + scale.settling
        self.steps = self.first + scale.measured + 1  # the last one, which saves a checkpoint, is none of them
        self.meters = [WaitMeter(print, Chosen(0))]
        self.seconds, self.waiting, self.bytes, self.workers = 0.0, 0.0, 0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.workers = trainer.train_dataloader.num_workers
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 not in (self.first, self.first + self.scale.measured):
            return
        now = _now()
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
        self.waiting = self.meters[0].take() or 0.0
        self.meters[0].restart()  # the GPU has run dry for this
        self.seconds, self._since = now - getattr(self, "_since", now), now

    def result(self) -> dict[str, Any]:
        """What there is to tell of a finished training."""
        speed = self.scale.measured * self.scale.batch / self.seconds
        return {
            "images a second": round(speed, 2),
            "seconds of a step": round(self.seconds / self.scale.measured, 5),
            "waiting": round(self.waiting, 4),
            "GPU bytes": self.bytes,
            "workers": self.workers,
        }


def make_store(path: Path, images: int, side: int) -> Store:
    """A store of 16-bit phantoms, ``side`` pixels each way, an image a patient, all of them to train on."""
    drawn = [phantom(rng(0, 0, number, "benchmark phantom"), (side, side)) for number in range(min(images, DRAWN))]
    with StoreWriter(path, modality=MODALITY.name, key_id="0" * 8, policy=policy_record(MODALITY)) as writer:
        for number in range(images):
            noise = np.random.default_rng(number).integers(0, 256, (side, side), np.uint16)
            pixels = np.minimum(drawn[number % len(drawn)], 65280) + noise
            writer.add(NewScan(pixels, MODALITY.intensity(pixels), f"{number:064x}"))
        patients = np.array([f"{number:032x}" for number in range(images)], "S32")
        sides = np.full(images, splits.TRAIN, np.uint8)
        with writer.finish(patients=patients, split=sides, split_digest=splits.digest(patients, sides)):
            pass
    return Store(path)


def _stand_in(folder: Path) -> str:
    """How the store is compressed; where hdf5plugin is missing a module in its place, for workers too, does nothing."""
    if _importable("hdf5plugin"):
        return "bitshuffle-lz4"
    folder.mkdir()
    (folder / "hdf5plugin.py").write_text(STAND_IN, encoding="utf-8")
    sys.path.insert(0, str(folder))  # workers are told the path
    importlib.invalidate_caches()
    return "none"


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _method(case: Case, size: int) -> Method:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name=case.backbone, patch=case.patch), size, 0)
    if case.method == "simclr":
        return SimCLR(SimCLRConfig(), backbone)
    width, depth, heads = case.decoder
    return MAE(MAEConfig(decoder_width=width, decoder_depth=depth, decoder_heads=heads), backbone)


def _batch(case: Case, size: int, images: int, device: str) -> Batch:
    views = [torch.randn(images, 1, size, size, device=device) for _ in range(2 if case.method == "simclr" else 1)]
    ids = torch.arange(images, device=device)
    return Batch(views, ids, ids, ids, seed=0, epoch=0)


def _train(scale: Scale, steps: int) -> TrainConfig:
    return TrainConfig(
        max_steps=steps,
        batch_size=scale.batch,
        precision=scale.precision,
        devices=scale.devices,
        save_every_steps=steps,
    )


def _scale(on_gpu: bool, workers: int | None) -> Scale:
    if not on_gpu:
        return Scale(64, 8, 16, 96, 2, 1, workers or 0, 32, "cpu")
    return Scale(224, 256, 1024, 256, 60, 10, workers or "auto", "bf16", "auto")


def _table(case: Case, result: dict[str, Any]) -> str:
    lines = [f"{case.name}: {case.method} on {case.backbone}, {result['GFLOP of an image']:.1f} GFLOP an image"]
    for arm in ("no data", "device views", "CPU views"):
        one: Sequence[Any] = result[arm].get("left out", "")
        if one:
            lines.append(f"  {arm:14} left out: {one}")
            continue
        told = {**{"utilisation": None}, **result[arm]}
        used = "" if told["utilisation"] is None else f"{told['utilisation']:.1%} of the peak, "
        speed = f"{told['images a second']:.0f} images/s, {1000 * told['seconds of a step']:.0f} ms a step, "
        views = f", views {1000 * told['seconds of the views']:.0f} ms" if "seconds of the views" in told else ""
        memory = f", {told['GPU bytes'] / 1e9:.1f} GB, {told['workers']} workers"
        lines.append(f"  {arm:14} {speed}{used}{told['waiting']:.1%} waiting{views}{memory}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, tiny networks, 64 pixels, 2 steps")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument(
        "--workers", type=int, help="processes that make batches; by default auto, as data.workers has it"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of this code, where it lies without its history")
    return parser.parse_args()


if __name__ == "__main__":
    main()
