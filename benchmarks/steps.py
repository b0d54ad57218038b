"""How long a training step takes beside a plain loop of lightly's parts: ratios of one interleaved run.

    python benchmarks/steps.py

SimCLR and BYOL: resnet18 at 96 pixels, 64 images a step. MAE: vit_tiny at 224 pixels, 32 images. Data are left out.
Absolute times mean nothing on a shared machine; ratios are of the same round. bf16 rows are goals only where the
hardware multiplies it (AMX or a GPU); elsewhere they are printed for what they are.

``by fit`` is the whole of a pretraining: Lightning, batches stacked by the loader, guard, monitor, a line of metrics
every 10 steps, and the hundredth part of what a checkpoint takes, for one every 100 steps as the recipes have it. After
each of its steps one of the plain loop is taken, so that both see the same machine; a round is 10 steps of either. What
each callback takes of a step is told beside it.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hardware
import numpy as np
import torch
from cells import Cells
from fits import ReadyViews, Turns, fit_here
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
FIT_STEPS, SAVE_EVERY = 10, 100  # of a round by fit: one line of metrics; and the steps that a checkpoint is shared by
RESULTS = Path(__file__).parent / "results" / "steps"
RESNET, VIT = BackboneConfig(name="resnet18", in_chans=1), BackboneConfig(name="vit_tiny_patch16_224", in_chans=3)
LITE = BackboneConfig(name="tf_efficientnet_lite0", in_chans=1)
DECODER = {"width": 256, "depth": 4, "heads": 8}
Step = Callable[[], None]
# (row, what, over what, goal)
ROWS = [
    ("SimCLR, fp32", "simclr", "lightly simclr", "at most 1.0"),
    ("SimCLR, bf16", "simclr bf16", "lightly simclr", "at most 0.5 with AMX"),
    ("SimCLR step over bare backbone", "simclr", "bare resnet18", "at most 1.08"),
    ("SimCLR in Lightning over its plain loop", "simclr in lightning", "simclr times steps", "at most 1.03"),
    ("SimCLR by fit over its plain loop", "simclr by fit", "simclr beside it", "at most 1.05"),
    ("BYOL per view, fp32", "byol", "lightly byol", ""),
    ("BYOL per view, bf16", "byol bf16", "lightly byol", "at most 0.59 with AMX"),
    ("BYOL pooled, fp32", "byol pooled", "lightly byol", ""),
    ("BYOL pooled, bf16", "byol pooled bf16", "lightly byol", "at most 0.45 with AMX"),
    ("MAE, fp32", "mae", "lightly mae", ""),
    ("MAE, bf16", "mae bf16", "lightly mae", "at most 0.77 with AMX"),
    ("EfficientNet-lite0 SimCLR, bf16 over fp32", "lite0 bf16", "lite0", ""),
]


def main() -> None:
    """Measure, keep the cell, print the ratios."""
    given = _arguments()
    cells = Cells(given.results, "python benchmarks/steps.py")
    settings = {"steps": STEPS, "fit_steps": FIT_STEPS, "save_every": SAVE_EVERY, "decoder": DECODER}
    result = cells.run("steps", lambda: measure(given.rounds), rounds=given.rounds, **settings)
    for row, *_, goal in ROWS:
        low, ratio, high = (result[row][name] for name in ("low", "ratio", "high"))
        print(f"{row:42} {ratio:.2f} [{low:.2f}, {high:.2f}]  {goal and 'goal: ' + goal}")
    told = ", ".join(f"{name} {share:.2%}" for name, share in result["of a step by fit"].items())
    print(f"of a step by fit: {told}; a checkpoint takes {result['seconds of a checkpoint']:.2f} s")
    flags = result["flags"]
    amx = "AMX" if flags["amx_bf16"] else "no AMX"
    print(
        f"{flags['cpu']}, {amx}, {flags['threads']} threads of {flags['cores']} cores, torch {flags['torch']}, ", end=""
    )
    print(f"precision auto is {flags['precision auto']}, load at the start {flags['load']}")


def measure(rounds: int) -> dict[str, Any]:
    """Median and quartiles of the ratios over rounds, and the flags of the machine."""
    flags = hardware.flags()
    torch.manual_seed(0)
    steps = _steps()
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    taken = {name: np.array(each) for name, each in times.items()}
    taken["simclr times steps"] = taken["simclr"] * STEPS
    beside, shares, save = _by_fit(rounds)
    taken |= beside
    found: dict[str, Any] = {}
    for row, what, over, _ in ROWS:
        low, ratio, high = np.percentile(taken[what] / taken[over], [25, 50, 75])
        found[row] = {name: round(float(each), 3) for name, each in (("low", low), ("ratio", ratio), ("high", high))}
    seconds = {name: round(float(np.median(each)), 4) for name, each in taken.items()}
    return found | {
        "of a step by fit": shares,
        "seconds of a checkpoint": round(save, 3),
        "median seconds": seconds,
        "flags": flags,
    }


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
        "lite0": _ours(SimCLR(SimCLRConfig(), build(LITE, 96, 0)), grey),
        "lite0 bf16": _ours(SimCLR(SimCLRConfig(), build(LITE, 96, 0)), grey, bf16=True),
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


def _by_fit(rounds: int) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, float], float]:
    """Seconds of rounds by fit and of the plain loop's beside them, shares of callbacks, seconds of a checkpoint."""
    plain = _ours(SimCLR(SimCLRConfig(), build(RESNET, 96, 0)), _views(2, 64, 1, 96))
    turns = Turns(plain)
    steps = rounds * FIT_STEPS + 2  # the first is where all begins, and the last saves a checkpoint
    train = TrainConfig(max_steps=steps, batch_size=64, precision=32, devices="cpu", save_every_steps=steps)
    fit_here(SimCLR(SimCLRConfig(), build(RESNET, 96, 0)), ReadyViews(2, 1, 96), 64 * FIT_STEPS, train, [turns])
    counted = slice(0, rounds * FIT_STEPS)
    ours, loop = (np.reshape(each[counted], (rounds, FIT_STEPS)).sum(1) for each in (turns.fit, turns.loop))
    shares = {name: round(seconds / turns.whole, 5) for name, seconds in turns.inside.items()}
    taken = {"simclr by fit": ours + turns.save * FIT_STEPS / SAVE_EVERY, "simclr beside it": loop}
    return taken, shares, turns.save


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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the cell goes, to try the script")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
