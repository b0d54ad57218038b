"""Models Genesis's damage to a batch at once, and image by image as a plain NumPy loop does it.

    python benchmarks/genesis.py

The loop follows the reference (MrGiovanni/ModelsGenesis, pytorch/utils.py) in two dimensions: for each image windows
are shuffled one after another, a tone curve of 100,000 points is made and applied, blocks are painted over. Both sides
shuffle as many windows an image: those that tile it, in the mean. A third arm has the reference's own 10,000 windows.
Rounds take turns; a ratio is the median of those of the rounds, with quartiles; one core. Ours is also timed by
itself on a GPU where there is one, which the cell then says.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells, device

from sslmed import torchvision_ops
from sslmed.data.loading import Batch
from sslmed.methods.models_genesis import ModelsGenesis, ModelsGenesisConfig
from sslmed.models.backbones import BackboneConfig, build

ROUNDS, IMAGES, SIZES = 9, 16, (96, 224)
RESULTS = Path(__file__).parent / "results" / "genesis"
GPU = torch.cuda.is_available()
REFERENCE_WINDOWS = 10_000
CURVE = 100_000
ONE_MORE = 0.95


def main() -> None:
    """Measure, keep the cell, print the ratios."""
    torch.set_num_threads(1)
    torchvision_ops.mend()
    cells = Cells(RESULTS, "python benchmarks/genesis.py")
    name = "genesis gpu" if GPU else "genesis"
    result = cells.run(name, measure, rounds=ROUNDS, images=IMAGES, sizes=list(SIZES))
    print(f"on {device()}")
    for size, row in result.items():
        print(f"{size}: {row['images a second']} images a second, {row['windows']} windows an image")
        for over in ("plain loop", "plain loop, 10,000 windows"):
            low, ratio, high = (row[over][name] for name in ("low", "ratio", "high"))
            print(f"{size}: {ratio:.1f} [{low:.1f}, {high:.1f}] times as fast as a {over}")


def measure() -> dict[str, Any]:
    """For each size the ratios, images a second by arm, and how many windows an image has."""
    return {f"{size} x {size}": _measure(size) for size in SIZES}


def _measure(size: int) -> dict[str, Any]:
    images = torch.rand(IMAGES, 1, size, size, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(IMAGES)
    method = ModelsGenesis(ModelsGenesisConfig(), build(BackboneConfig(name="test_resnet"), size, 0))
    windows = tiles(size)
    place = "cuda" if GPU else "cpu"
    shown = images.to(place)

    def ours(number: int) -> None:
        method.corrupted(Batch([shown], ids, ids, ids, 0, number))
        if GPU:
            torch.cuda.synchronize()

    arms = {
        "sslmed": ours,
        "plain loop": lambda number: plain(images.numpy(), windows, number),
        "plain loop, 10,000 windows": lambda number: plain(images.numpy(), REFERENCE_WINDOWS, number),
    }
    clock = time.perf_counter if GPU else time.process_time  # of one core, whoever else uses it
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name, arm in arms.items():
            started = clock()
            arm(number)
            if number:  # the first is a warm-up
                taken[name].append(clock() - started)
    times = {name: np.array(each) for name, each in taken.items()}
    found: dict[str, Any] = {"windows": windows}
    for name in arms:
        if name != "sslmed":
            quartiles = np.percentile(times[name] / times["sslmed"], [25, 50, 75])
            found[name] = dict(
                zip(("low", "ratio", "high"), (round(float(each), 2) for each in quartiles), strict=True)
            )
    found["images a second"] = {name: round(float(IMAGES / np.median(each)), 1) for name, each in times.items()}
    return found


def tiles(size: int) -> int:
    """How many windows tile an image in the mean: sides are drawn from 1 to a tenth of the image's."""
    stream, longest = np.random.default_rng(0), size // 10
    strips = [int((np.cumsum(stream.integers(1, longest + 1, size)) < size).sum()) + 1 for _ in range(2000)]
    return round(float(np.mean(strips)) ** 2)


def plain(images: np.ndarray[Any, Any], windows: int, number: int) -> np.ndarray[Any, Any]:
    """Each image (H, W) of the batch by itself, in [0, 1]."""
    stream = np.random.default_rng(number)
    return np.stack([_damaged(image[0], windows, stream) for image in images])


def _damaged(image: np.ndarray[Any, Any], windows: int, stream: np.random.Generator) -> np.ndarray[Any, Any]:
    config = ModelsGenesisConfig()
    if stream.random() < config.shuffle:
        image = _shuffled(image, windows, stream)
    if stream.random() < config.curve:
        image = _recoloured(image, stream)
    if stream.random() < config.paint:
        image = _in_painted(image, stream) if stream.random() < config.inner else _out_painted(image, stream)
    return image


def _shuffled(image: np.ndarray[Any, Any], windows: int, stream: np.random.Generator) -> np.ndarray[Any, Any]:
    found = image.copy()
    for _ in range(windows):
        place = _window(image.shape, [(1, side // 10) for side in image.shape], 0, stream)
        window = image[place].flatten()
        stream.shuffle(window)
        found[place] = window.reshape(found[place].shape)
    return found


def _recoloured(image: np.ndarray[Any, Any], stream: np.random.Generator) -> np.ndarray[Any, Any]:
    t = np.linspace(0, 1, CURVE)
    basis = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    x, y = (np.array([0, *stream.random(2), 1]) @ basis for _ in range(2))
    y = y[::-1] if stream.random() < 0.5 else np.sort(y)
    return np.interp(image, np.sort(x), y)


def _in_painted(image: np.ndarray[Any, Any], stream: np.random.Generator) -> np.ndarray[Any, Any]:
    found, left = image.copy(), 5
    while left and stream.random() < ONE_MORE:
        place = _window(image.shape, [(side // 6, side // 3) for side in image.shape], 3, stream)
        found[place] = stream.random(found[place].shape)
        left -= 1
    return found


def _out_painted(image: np.ndarray[Any, Any], stream: np.random.Generator) -> np.ndarray[Any, Any]:
    found, left = stream.random(image.shape), 5
    while left == 5 or (left and stream.random() < ONE_MORE):
        limits = [(side - 4 * side // 7, side - 3 * side // 7) for side in image.shape]
        place = _window(image.shape, limits, 3, stream)
        found[place] = image[place]
        left -= 1
    return found


def _window(
    shape: tuple[int, ...], limits: list[tuple[int, int]], margin: int, stream: np.random.Generator
) -> tuple[slice, ...]:
    found = []
    for side, (shortest, longest) in zip(shape, limits, strict=True):
        length = int(stream.integers(shortest, longest + 1))
        start = int(stream.integers(margin, side - length - margin + 1))
        found.append(slice(start, start + length))
    return tuple(found)


if __name__ == "__main__":
    main()
