"""How long a SimCLR step takes beside a plain loop with lightly's parts, as a ratio of interleaved runs.

    python benchmarks/simclr_step.py

resnet18 at 96 pixels, 64 images a step, fp32, data left out. Absolute times mean nothing on a shared machine.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from torch import nn

from sslmed.data.loading import Batch
from sslmed.methods.simclr import SimCLR, SimCLRConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig, build_optimizer

ROUNDS, IMAGES, SIZE = 12, 64, 96
RESULTS = Path(__file__).parent / "results" / "simclr_step"


def main() -> None:
    """Measure, keep the cell, print the ratio."""
    cells = Cells(RESULTS, "python benchmarks/simclr_step.py")
    result = cells.run("fp32", measure, rounds=ROUNDS, images=IMAGES, size=SIZE)
    print(f"sslmed / lightly: {result['ratio']:.2f} [{result['low']:.2f}, {result['high']:.2f}]")


def measure() -> dict[str, Any]:
    """The ratio of paired rounds: median and quartiles."""
    torch.manual_seed(0)
    views = [torch.randn(IMAGES, 1, SIZE, SIZE) for _ in range(2)]
    steps = {"sslmed": _sslmed(views), "lightly": _lightly(views)}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    low, ratio, high = np.percentile(np.array(times["sslmed"]) / np.array(times["lightly"]), [25, 50, 75])
    return {"ratio": round(float(ratio), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def _sslmed(views: list[torch.Tensor]) -> Callable[[], None]:
    method = SimCLR(SimCLRConfig(), build(BackboneConfig(name="resnet18"), SIZE, 0))
    method.to(memory_format=torch.channels_last)  # as training.fit does
    optimizer = build_optimizer(OptimConfig(), method.parameter_groups(1e-4), IMAGES)
    ids = torch.arange(IMAGES)
    batch = Batch(views, torch.full((IMAGES,), -1), ids, seed=0, epoch=0)
    return lambda: _step(optimizer, lambda: method.loss(batch)["loss"])


def _lightly(views: list[torch.Tensor]) -> Callable[[], None]:
    import timm
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    model = nn.Sequential(
        timm.create_model("resnet18", in_chans=1, num_classes=0), SimCLRProjectionHead(512, 2048, 128)
    )
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    return lambda: _step(optimizer, lambda: criterion(*model(torch.cat(views)).chunk(2)))


def _step(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
