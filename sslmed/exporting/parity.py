"""Does an exported file say what the model says? Images of several sizes in, the greatest difference out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sslmed.data import intensity as of
from sslmed.data.input import network_input
from sslmed.exporting.deployed import Deployed
from sslmed.exporting.graphs import Tensors
from sslmed.keyed_rng import rng

TOLERANCE = 1e-4  # of the greatest number of an output; other runtimes add in another order
SHARE = 1e-3  # of whole numbers, which a rounding can tip over
PREPARED = 0.02  # of the greatest input: one grey level of a byte, where OpenCV rounds a half the other way
WHOLE = ("called", "mask")  # outputs of whole numbers
SIZES = ((2, 1.3, 0.8), (1, 0.6, 1.1), (3, 1.0, 1.0))  # images, and their sides in those of the input

Pixels = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from the model.

    Attributes:
        outputs: max |difference| / max |value| of each output; of whole numbers the share that differs.
        prepared: the same of the network's input beside what `predict` gives it.
        batches: (images, height, width) that were tried.
    """

    outputs: dict[str, float]
    prepared: float
    batches: tuple[tuple[int, int, int], ...]

    @property
    def passed(self) -> bool:
        """Within the tolerances."""
        within = all(value <= (SHARE if name in WHOLE else TOLERANCE) for name, value in self.outputs.items())
        return within and self.prepared <= PREPARED


def compare(module: Deployed, run: Callable[[Tensors], Tensors]) -> Parity:
    """``run`` beside the module itself, on drawn images."""
    found: dict[str, list[float]] = {name: [] for name in module.outputs}
    prepared, batches = [], []
    for number, batch in enumerate(batches_of(module)):
        with torch.no_grad():
            wanted = module(*batch)
            ready = module.prepare(*batch)
        given = run(batch)
        if "boxes" in module.outputs:
            given = _in_order_of(wanted[0], given)
        for name, ours, theirs in zip(module.outputs, wanted, given, strict=True):
            found[name].append(difference(ours, theirs))
        batches.append((len(batch[0]), *batch[0].shape[2:]))
        prepared.append(difference(_by_predict(module, number, len(ready)), ready))
    return Parity({name: max(values) for name, values in found.items()}, max(prepared), tuple(batches))


def _in_order_of(boxes: torch.Tensor, given: Tensors) -> Tensors:
    """Outputs (N, D, ...), boxes first, each image's rows as they go best with ``boxes``: of scores that are equal but
    for a rounding either may come first."""
    from scipy.optimize import linear_sum_assignment

    if given[0].shape != boxes.shape or not bool(torch.isfinite(given[0]).all()):
        return given
    apart = (boxes[:, :, None] - given[0][:, None]).detach().abs().amax(dim=-1)
    order = torch.stack([torch.from_numpy(linear_sum_assignment(each.numpy())[1]) for each in apart])
    return tuple(torch.stack([rows[own] for rows, own in zip(each, order, strict=True)]) for each in given)


def difference(wanted: torch.Tensor, given: torch.Tensor) -> float:
    """max |difference| / max |value|; of whole numbers the share that differs; infinite of another shape."""
    if wanted.shape != given.shape:
        return math.inf
    if not wanted.is_floating_point():
        return float((wanted != given).double().mean())
    wanted, given = wanted.detach().double(), given.detach().double()
    apart = float((wanted - given).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return math.inf if math.isnan(apart) else apart


def batches_of(module: Deployed) -> list[Tensors]:
    """The inputs that are tried: drawn images, and their intensities where the module is given them."""
    batches = []
    for number in range(len(SIZES)):
        images = drawn(module, number)
        batch: Tensors = (torch.from_numpy(np.stack([_planes(each) for each in images])),)
        if not module.prepare.measured:
            measured = [module.policy.intensity(each) for each in images]
            batch = (*batch, torch.tensor(measured, dtype=torch.float64))
        batches.append(batch)
    return batches


def drawn(module: Deployed, number: int) -> list[Pixels]:
    """Blots of the intensities and of the dtype that files of the modality have, as a store holds them."""
    count, down, across = SIZES[number]
    height, width = module.prepare.box
    if module.prepare.whole:
        height, width = max(1, round(height * down)), max(1, round(width * across))
    low, high, kind = _values(module)
    stream = rng(0, 0, number, "export parity")
    coarse = torch.from_numpy(stream.random((count, module.planes, 6, 6)))
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False).numpy()
    noisy = np.clip(smooth + stream.normal(scale=0.05, size=smooth.shape), 0, 1)
    images = np.round(low + (high - low) * noisy).astype(kind)
    return [each[0] if module.planes == 1 else np.ascontiguousarray(each.transpose(1, 2, 0)) for each in images]


def _values(module: Deployed) -> tuple[int, int, Any]:
    if module.policy.intensity is of.hounsfield:
        return -1000, 1500, np.int16
    if module.policy.intensity in (of.dtype_range, of.lit):
        return 0, 255, np.uint8
    return 0, 4095, np.uint16


def _planes(pixels: Pixels) -> Pixels:
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes, dtype=np.float32)


def _by_predict(module: Deployed, number: int, count: int) -> torch.Tensor:
    size, channels = module.prepare.box, module.prepare.channels
    images = drawn(module, number)[:count]
    made = [network_input(each, module.policy.intensity(each), module.policy, size, channels) for each in images]
    return torch.stack(made)
