"""How fast two views of 224 pixels are made of an image of 512 x 512 on one core: ratios of one interleaved run.

    python benchmarks/views.py

``RGB``: the photo views of sslmed beside lightly's SimCLR transform and torchvision's v2 transforms, all with the same
crops, mirrors, blurs and share of grey views, from pixels in memory (lightly: a PIL image) to a float32 tensor,
normalised with ImageNet's mean and deviation. Crops are shrunk as each does it: by areas, or bilinearly with
antialiasing. So are colours changed: sslmed changes brightness, contrast and each channel in every view, lightly and
torchvision brightness, contrast, saturation and hue in four of five. The hue is a third of lightly's time.
``grey``: the views of a 16-bit radiograph beside torchvision's, which take it as float32. ``device``: the views in
torch, with drawing and stacking, beside those of the CPU; on a GPU where there is one, which the rows then say.
"""

import functools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from cells import Cells, device
from PIL import Image

from sslmed import torchvision_ops
from sslmed.data.device_views import DeviceViews, Images
from sslmed.data.input import as_tensor
from sslmed.data.modality import MODALITIES
from sslmed.data.views import Augment, Pixels

ROUNDS, IMAGES, SOURCE, SIZE = 15, 16, 512, 224
RESULTS = Path(__file__).parent / "results" / "views"
GPU = torch.cuda.is_available()
Arm = Callable[[int], Any]  # of the round
# (row, what, over, goal): how many times as fast as
ROWS = [
    ("RGB: sslmed over lightly's SimCLR transform", "rgb", "rgb lightly", "at least 3"),
    ("RGB: sslmed over torchvision v2", "rgb", "rgb torchvision", ""),
    ("16-bit grey: sslmed over torchvision v2", "grey", "grey torchvision", "at least 3"),
    ("RGB: device views over those of the CPU", "rgb device", "rgb", ""),
    ("16-bit grey: device views over those of the CPU", "grey device", "grey", ""),
]


def main() -> None:
    """Measure, keep the cell, print the ratios."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    torchvision_ops.mend()
    cells = Cells(RESULTS, "python benchmarks/views.py")
    name = "views gpu" if GPU else "views"
    result = cells.run(name, measure, rounds=ROUNDS, images=IMAGES, source=SOURCE, size=SIZE)
    print(f"device views on {device()}")
    for row, *_, goal in ROWS:
        low, ratio, high = (result[row][name] for name in ("low", "ratio", "high"))
        print(f"{row:50} {ratio:.2f} [{low:.2f}, {high:.2f}]  {goal and 'goal: ' + goal}")
    print("images a second:", ", ".join(f"{arm} {speed}" for arm, speed in result["images a second"].items()))


def measure() -> dict[str, Any]:
    """Median and quartiles of the ratios over rounds; of the images a second the median."""
    arms = _arms()
    for arm in arms.values():
        arm(0)
    clock = time.perf_counter if GPU else time.process_time  # of one core, whoever else uses it
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(1, ROUNDS + 1):
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
        for name, arm in arms.items():
            started = clock()
            arm(number)
            if GPU and "device" in name:
                torch.cuda.synchronize()
            times[name].append(clock() - started)
    taken = {name: np.array(each) for name, each in times.items()}
    found: dict[str, Any] = {}
    for row, what, over, _ in ROWS:
        low, ratio, high = np.percentile(taken[over] / taken[what], [25, 50, 75])
        found[row] = {name: round(float(each), 3) for name, each in (("low", low), ("ratio", ratio), ("high", high))}
    found["images a second"] = {name: round(float(IMAGES / np.median(each))) for name, each in taken.items()}
    return found


def _arms() -> dict[str, Arm]:
    stream = np.random.default_rng(0)
    colour = [_picture(stream, 255, 3).astype(np.uint8) for _ in range(IMAGES)]
    grey = [_picture(stream, 4095, 1)[..., 0].astype(np.uint16) for _ in range(IMAGES)]
    return {
        "rgb": _ours("photo", colour, 3),
        "rgb lightly": _lightly(colour),
        "rgb torchvision": _torchvision(colour, _torchvision_colour()),
        "grey": _ours("xray", grey, 1),
        "grey torchvision": _torchvision(grey, _torchvision_grey()),
        "rgb device": _on_device("photo", colour, 3),
        "grey device": _on_device("xray", grey, 1),
    }


def _picture(stream: np.random.Generator, high: int, planes: int) -> np.ndarray:
    """Coarse shapes and fine noise, from 0 to ``high``."""
    coarse = stream.normal(size=(16, 16, planes)).astype(np.float32)
    whole = cv2.resize(coarse, (SOURCE, SOURCE), interpolation=cv2.INTER_CUBIC).reshape(SOURCE, SOURCE, planes)
    whole = whole + stream.normal(0, 0.1, whole.shape)
    return np.asarray(high * (whole - whole.min()) / (whole.max() - whole.min()))


def _ours(name: str, images: list[Pixels], channels: int) -> Arm:
    modality = MODALITIES[name]
    augment = Augment((modality.view, modality.view), SIZE, modality.normalise, seed=0)
    intensities = [modality.intensity(pixels) for pixels in images]

    def run(number: int) -> None:
        for sample, (pixels, intensity) in enumerate(zip(images, intensities, strict=True)):
            for view in augment(pixels, intensity, epoch=number, sample=sample):
                as_tensor(view, channels)

    return run


def _on_device(name: str, images: list[Pixels], channels: int) -> Arm:
    modality = MODALITIES[name]
    views = DeviceViews((modality.view, modality.view), SIZE, modality, channels)
    intensities = [modality.intensity(pixels) for pixels in images]

    def run(number: int) -> None:
        shapes = [[pixels.shape] * 2 for pixels in images]
        drawn = [views.draw(each, seed=0, epoch=number, sample=sample) for sample, each in enumerate(shapes)]
        numbers = torch.from_numpy(np.stack(drawn, axis=1))
        stacked = Images.of(list(zip(images, intensities, strict=True)))
        if GPU:
            stacked = stacked.to("cuda")
        for view in range(2):
            views.render(view, stacked, numbers[view])

    return run


def _lightly(images: list[Pixels]) -> Arm:
    from lightly.transforms import SimCLRTransform

    view = MODALITIES["photo"].view
    pictures = [Image.fromarray(pixels) for pixels in images]
    transform = SimCLRTransform(
        input_size=SIZE,
        min_scale=view.crop[0],
        cj_strength=0.5,
        random_gray_scale=view.grey,
        gaussian_blur=view.blur,
        sigmas=view.blur_sigma,
    )

    def run(_: int) -> None:
        for picture in pictures:
            transform(picture)

    return run


def _torchvision(images: list[Pixels], transform: Callable[[torch.Tensor], torch.Tensor]) -> Arm:
    planes = [np.ascontiguousarray(np.moveaxis(pixels.reshape(SOURCE, SOURCE, -1), 2, 0)) for pixels in images]
    tensors = [torch.from_numpy(each) for each in planes]

    def run(_: int) -> None:
        for tensor in tensors:
            for _ in range(2):
                transform(tensor)

    return run


def _torchvision_colour() -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.transforms import v2

    view = MODALITIES["photo"].view
    steps = [
        v2.RandomResizedCrop(SIZE, scale=view.crop, antialias=True),
        v2.RandomHorizontalFlip(view.hflip),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(view.grey),
        v2.RandomApply([v2.GaussianBlur(_kernel(view.blur_sigma), view.blur_sigma)], view.blur),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return v2.Compose(steps)


def _torchvision_grey() -> Callable[[torch.Tensor], torch.Tensor]:
    from torchvision.transforms import v2

    view = MODALITIES["xray"].view

    def bent(image: torch.Tensor) -> torch.Tensor:
        return v2.functional.adjust_gamma(image, math.exp(random.uniform(-view.gamma, view.gamma)))

    steps = [
        v2.Lambda(lambda image: image.to(torch.float32).div_(4095)),  # it crops no 16-bit integers
        v2.RandomResizedCrop(SIZE, scale=view.crop, antialias=True),
        v2.RandomRotation(view.rotate, v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(view.brightness, view.contrast),
        v2.Lambda(bent),
        v2.RandomApply([v2.GaussianBlur(_kernel(view.blur_sigma), view.blur_sigma)], view.blur),
        v2.Normalize((0.5,), (0.25,)),
    ]
    return v2.Compose(steps)


@functools.cache
def _kernel(sigmas: tuple[float, float]) -> int:
    """Of the greatest sigma, as far as OpenCV's: 4 sigma either way."""
    return 2 * math.ceil(4 * sigmas[1]) + 1


if __name__ == "__main__":
    main()
