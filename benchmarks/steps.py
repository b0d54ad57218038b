"""How long a training step takes beside a plain loop of lightly's parts: ratios of one interleaved run.

    python benchmarks/steps.py

SimCLR and BYOL: resnet18 at 96 pixels, 64 images a step. MAE: vit_tiny at 224 pixels, 32 images. Data are left out.
Absolute times mean nothing on a shared machine; ratios are of the same round. bf16 rows are goals only where the
hardware multiplies it (AMX or a GPU); elsewhere they are printed for what they are.
"""

import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from torch import nn
from torch.utils.data import DataLoader

from sslmed.data.loading import Batch
from sslmed.methods.byol import BYOL, BYOLConfig
from sslmed.methods.mae import MAE, MAEConfig
from sslmed.methods.method import Method, Progress
from sslmed.methods.simclr import SimCLR, SimCLRConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.optim import OptimConfig, build_optimizer
from sslmed.training.trainer import TrainConfig, build_trainer

ROUNDS, STEPS = 8, 4  # STEPS of the Lightning row, whose start-up would otherwise be all of it
RESULTS = Path(__file__).parent / "results" / "steps"
RESNET, VIT = BackboneConfig(name="resnet18", in_chans=1), BackboneConfig(name="vit_tiny_patch16_224", in_chans=3)
DECODER = {"width": 256, "depth": 4, "heads": 8}
Step = Callable[[], None]
# (row, what, over what, goal)
ROWS = [
    ("SimCLR, fp32", "simclr", "lightly simclr", "at most 1.0"),
    ("SimCLR, bf16", "simclr bf16", "lightly simclr", "at most 0.5 with AMX"),
    ("SimCLR step over bare backbone", "simclr", "bare resnet18", "at most 1.08"),
    ("SimCLR in Lightning over its plain loop", "simclr in lightning", "simclr times steps", "at most 1.03"),
    ("BYOL per view, fp32", "byol", "lightly byol", ""),
    ("BYOL per view, bf16", "byol bf16", "lightly byol", "at most 0.59 with AMX"),
    ("BYOL pooled, fp32", "byol pooled", "lightly byol", ""),
    ("BYOL pooled, bf16", "byol pooled bf16", "lightly byol", "at most 0.45 with AMX"),
    ("MAE, fp32", "mae", "lightly mae", ""),
    ("MAE, bf16", "mae bf16", "lightly mae", "at most 0.77 with AMX"),
]


def main() -> None:
    """Measure, keep the cell, print the ratios."""
    cells = Cells(RESULTS, "python benchmarks/steps.py")
    result = cells.run("steps", measure, rounds=ROUNDS, decoder=DECODER)
    for row, *_, goal in ROWS:
        low, ratio, high = (result[row][name] for name in ("low", "ratio", "high"))
        print(f"{row:42} {ratio:.2f} [{low:.2f}, {high:.2f}]  {goal and 'goal: ' + goal}")


def measure() -> dict[str, Any]:
    """Median and quartiles of the ratios over rounds."""
    torch.manual_seed(0)
    steps = _steps()
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    taken = {name: np.array(each) for name, each in times.items()}
    taken["simclr times steps"] = taken["simclr"] * STEPS
    found = {}
    for row, what, over, _ in ROWS:
        low, ratio, high = np.percentile(taken[what] / taken[over], [25, 50, 75])
        found[row] = {name: round(float(each), 3) for name, each in (("low", low), ("ratio", ratio), ("high", high))}
    return found


def _steps() -> dict[str, Step]:
    grey, colour = _views(2, 64, 1, 96), _views(1, 32, 3, 224)
    pooled = BYOLConfig(pool_batchnorm=True)
    mae = MAEConfig(decoder_width=DECODER["width"], decoder_depth=DECODER["depth"], decoder_heads=DECODER["heads"])
    return {
        "bare resnet18": _bare(grey),
        "lightly simclr": _lightly_simclr(grey),
        "simclr": _ours(SimCLR(SimCLRConfig(), build(RESNET, 96, 0)), grey),
        "simclr bf16": _ours(SimCLR(SimCLRConfig(), build(RESNET, 96, 0)), grey, bf16=True),
        "simclr in lightning": _in_lightning(SimCLR(SimCLRConfig(), build(RESNET, 96, 0)), grey),
        "lightly byol": _lightly_byol(grey),
        "byol": _ours(BYOL(BYOLConfig(), build(RESNET, 96, 0)), grey),
        "byol bf16": _ours(BYOL(BYOLConfig(), build(RESNET, 96, 0)), grey, bf16=True),
        "byol pooled": _ours(BYOL(pooled, build(RESNET, 96, 0)), grey),
        "byol pooled bf16": _ours(BYOL(pooled, build(RESNET, 96, 0)), grey, bf16=True),
        "lightly mae": _lightly_mae(colour),
        "mae": _ours(MAE(mae, build(VIT, 224, 0)), colour),
        "mae bf16": _ours(MAE(mae, build(VIT, 224, 0)), colour, bf16=True),
    }


def _views(count: int, images: int, channels: int, size: int) -> Batch:
    ids = torch.arange(images)
    views = [torch.randn(images, channels, size, size) for _ in range(count)]
    return Batch(views=views, target=ids, ids=ids, groups=ids, seed=0, epoch=0)


def _ours(method: Method, batch: Batch, bf16: bool = False) -> Step:
    method.to(memory_format=torch.channels_last)  # as training.fit does
    optimizer = build_optimizer(OptimConfig(), method.parameter_groups(1e-4), len(batch.ids))

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = method.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        method.after_step(Progress(1, 100, 0, len(batch.ids)))

    return step


def _in_lightning(method: Method, batch: Batch) -> Step:
    """STEPS steps by the Trainer that sslmed builds, without what is done once a run."""
    method.to(memory_format=torch.channels_last)
    method.prepare(OptimConfig(), len(batch.ids), STEPS, STEPS)
    config = TrainConfig(max_steps=STEPS, batch_size=len(batch.ids), precision=32, devices="cpu")

    def step() -> None:
        loader = DataLoader([batch] * STEPS, batch_size=None)
        build_trainer(config, STEPS, []).fit(method.train(), loader)

    return step


def _bare(batch: Batch) -> Step:
    network = build(RESNET, 96, 0).to(memory_format=torch.channels_last)
    images = torch.cat(batch.views)

    def step() -> None:
        network.zero_grad()
        network(images).mean().backward()

    return step


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-4)


def _plain(optimizer: torch.optim.Optimizer, loss: Callable[[], torch.Tensor]) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def _lightly_simclr(batch: Batch) -> Step:
    import timm
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    backbone = timm.create_model("resnet18", in_chans=1, num_classes=0)
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 2048, 128))
    criterion, optimizer = NTXentLoss(temperature=0.2), _optimizer(model.parameters())
    return lambda: _plain(optimizer, lambda: criterion(*model(torch.cat(batch.views)).chunk(2)))


def _lightly_byol(batch: Batch) -> Step:
    import timm
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    online = nn.Sequential(timm.create_model("resnet18", in_chans=1, num_classes=0), BYOLProjectionHead(512, 4096, 256))
    target, predictor = copy.deepcopy(online), BYOLPredictionHead(256, 4096, 256)
    deactivate_requires_grad(target)
    criterion = NegativeCosineSimilarity()
    optimizer = _optimizer([*online.parameters(), *predictor.parameters()])
    first, second = batch.views

    def loss() -> torch.Tensor:
        p1, p2 = predictor(online(first)), predictor(online(second))
        with torch.no_grad():
            t1, t2 = target(first), target(second)
        both: torch.Tensor = criterion(p1, t2) + criterion(p2, t1)
        return both

    def step() -> None:
        update_momentum(online, target, 0.99)
        _plain(optimizer, loss)

    return step


def _lightly_mae(batch: Batch) -> Step:
    import timm
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

    vit = timm.create_model("vit_tiny_patch16_224", in_chans=3, num_classes=0)
    encoder, patch, width = MaskedVisionTransformerTIMM(vit=vit), 16, DECODER["width"]
    embed, predict = nn.Linear(vit.embed_dim, width), nn.Linear(width, 3 * patch**2)
    mask_token = nn.Parameter(torch.zeros(1, 1, width))
    decoder = MaskedVisionTransformerDecoderTIMM(
        vit.patch_embed.num_patches, width, DECODER["depth"], DECODER["heads"], mask_token=mask_token
    )
    model = nn.ModuleList([encoder, embed, decoder, predict])
    optimizer = _optimizer(model.parameters())
    (images,) = batch.views
    size = (len(images), encoder.sequence_length)

    def loss() -> torch.Tensor:
        keep, hidden = utils.random_token_mask(size=size, mask_ratio=0.75)
        encoded = embed(encoder.encode(images=images, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(mask_token, size), keep, encoded)
        predicted = predict(utils.get_at_index(decoder(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, patch), hidden - 1)  # no patch is the class token's
        return nn.functional.mse_loss(predicted, target)

    return lambda: _plain(optimizer, loss)


if __name__ == "__main__":
    main()
