"""Whether the settings that docs/methods.md has for one 24 GB GPU fit into it: memory and pace of each, on a GPU.

    python benchmarks/gpu_memory.py [--only ibot] [--results DIR] [--commit HASH]
    python benchmarks/gpu_memory.py --small --results DIR     the same code on the CPU, tiny images and batches
    python benchmarks/gpu_memory.py --table                   fill in the page from the finished cells

Networks and sizes are those of the column, batches the largest that were meant for it, the other settings each method's
defaults but where the column says otherwise; bf16, AdamW (two moments; SGD and LARS have one), channels-last as in
trainings. Views of phantoms lie on the GPU already, so that the pace is that of the step alone. ``GB`` is the most that
torch's allocator held, in 1e9 bytes; the driver's context, some half GB, comes on top.

Fills benchmarks/results/gpu/ and the column of docs/methods.md.
"""

import argparse
import re
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cells as kept
import torch
from gpu import MODALITY, RESULTS, make_store
from method_sets import with_rows

from sslmed.data.loading import Batch, ViewDataset, stream_loader
from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.methods import METHODS
from sslmed.methods.method import Method, Progress
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig, build_optimizer

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
CARD = "NVIDIA H200"  # whose cells the page has
COLUMN = 5  # of the page's table, whose rows begin with a method's linked name
IMAGES, SIDE = 8, 256  # phantoms; a batch repeats them
WARM, MEASURED = 3, 5


@dataclass(frozen=True)
class Setting:
    """A row of the column."""

    backbone: str
    size: int
    batch: int
    method: dict[str, Any] = field(default_factory=dict)


SMALL_NETWORK = Setting("resnet18", 128, 256)
TRANSFORMER = Setting("vit_small_patch16_224", 224, 256)
CLASSIC = Setting("resnet50", 224, 128)
RESTORING = replace(SMALL_NETWORK, batch=64)
SETTINGS = {
    "simclr": SMALL_NETWORK,
    "moco_v2": replace(SMALL_NETWORK, method={"queue": 4096, "temperature": 0.1}),
    "moco_v3": TRANSFORMER,
    "simsiam": SMALL_NETWORK,
    "byol": SMALL_NETWORK,
    "barlow_twins": replace(SMALL_NETWORK, method={"hidden": 2048, "out": 2048}),
    "vicreg": SMALL_NETWORK,
    "swav": SMALL_NETWORK,
    "dino": TRANSFORMER,
    "ibot": replace(TRANSFORMER, method={"koleo": 0}),
    "mae": TRANSFORMER,
    "simmim": TRANSFORMER,
    "ijepa": TRANSFORMER,
    "rotation": CLASSIC,
    "jigsaw": CLASSIC,
    "relative_position": CLASSIC,
    "denoising": RESTORING,
    "context_encoder": RESTORING,
    "context_restoration": RESTORING,
    "models_genesis": RESTORING,
}


def main() -> None:
    """Measure the methods that are missing and print them, or fill in the page."""
    given = _arguments()
    cells = kept.Cells(given.results, "python benchmarks/gpu_memory.py", given.commit)
    if given.table:
        found = {name: cells.result(f"{CARD} memory {name}") for name in SETTINGS}
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
        return
    if not (given.small or torch.cuda.is_available()):
        raise SystemExit("there is no GPU here; --small --results DIR runs the same code on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", IMAGES, SIDE)
        for name in given.only or SETTINGS:
            setting = replace(SETTINGS[name], size=96, batch=2) if given.small else SETTINGS[name]
            key = f"{'small' if given.small else kept.device()} memory {name}"
            print(name, cells.run(key, lambda: measured(name, setting, store), **asdict(setting)), flush=True)  # noqa: B023


def filled(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with the memory at the end of each row's settings."""

    def fill(name: str, columns: list[str]) -> None:
        told = f" → {found[name]['GB']:.1f} GB at B {SETTINGS[name].batch}"
        columns[COLUMN] = re.sub(r" → .*", "", columns[COLUMN]) + told

    return with_rows(page, fill)


def measured(name: str, setting: Setting, store: Store) -> dict[str, Any]:
    """GB and milliseconds of a step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    kind = METHODS[name]
    backbone = build(BackboneConfig(name=setting.backbone), setting.size, 0)
    method: Method = kind(kind.Config(name=name, **setting.method), backbone)
    method.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optim = OptimConfig()
    optimizer = build_optimizer(optim, method.parameter_groups(optim.weight_decay), setting.batch)
    batch = _batch(method, setting, store).to(device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for step in range(WARM + MEASURED):
        if step == WARM:
            started = _now(device)
        with torch.autocast(device, torch.bfloat16):
            loss = method.loss(batch)["loss"]
        loss.backward()
        method.before_step(Progress(step, 1000, 0, setting.batch))
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(Progress(step + 1, 1000, 0, setting.batch))
    taken = (_now(device) - started) / MEASURED
    held = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    return {"GB": round(held / 1e9, 2), "ms": round(1000 * taken, 1), "images a second": round(setting.batch / taken)}


def _batch(method: Method, setting: Setting, store: Store) -> Batch:
    dataset = ViewDataset(store, MODALITY, method.views(MODALITY), setting.size, 1, 0, None)
    sampler = StreamSampler(store.rows("train"), IMAGES, steps=1, seed=0)
    few = next(iter(stream_loader(dataset, sampler, workers=0)))
    rows = torch.arange(setting.batch) % IMAGES
    numbers = torch.arange(setting.batch)
    return replace(few, views=[view[rows] for view in few.views], target=few.target[rows], ids=numbers, groups=numbers)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on the CPU, 96 pixels, two images")
    parser.add_argument("--table", action="store_true", help="fill in the page; measure nothing")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="methods")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the finished cells")
    parser.add_argument("--commit", help="of this code, where it lies without its history")
    return parser.parse_args()


if __name__ == "__main__":
    main()
