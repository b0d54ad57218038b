"""Models Genesis: one network that undoes four kinds of damage (Zhou et al., arXiv 1908.06912 and 2004.07882)."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field

from sslmed import config
from sslmed.data.loading import Batch
from sslmed.methods.restorative import Restorative
from sslmed.models.corruptions import moved, shuffle_sources, tone_curve, toned, unit_range
from sslmed.models.masking import keyed_noise
from sslmed.models.occlusions import any_of, drawn_rectangles

Noise = Callable[[int, str], torch.Tensor]  # keyed numbers in [0, 1): how many an image, and what for
Step = Callable[[torch.Tensor, torch.Tensor, Noise], torch.Tensor]
Probability = Annotated[float, Field(ge=0, le=1)]
INVERTED = 0.5  # of the tone curves (reference, utils.py, as all numbers below)
BLOCKS = 5  # at most, hidden or kept
ONE_MORE = 0.95  # probability of going on to the next
MARGIN = 3  # pixels at the edges
DRAWS = 3 + 4 + 1 + 1 + BLOCKS * 5  # of an image: what is done, the curve, its kind, where noise is, the blocks


class ModelsGenesisConfig(config.Config):
    """The knobs of Models Genesis; all defaults are the reference's (pytorch/config.py).

    Attributes:
        curve: probability that grey values go through a random Bezier curve, half of them inverted.
        shuffle: probability that pixels are mixed within small windows.
        paint: probability that a part is replaced by noise.
        inner: share of those where the part lies within the image (in-painting); of the others it is all but some
            blocks (out-painting).
    """

    name: Literal["models_genesis"] = "models_genesis"
    curve: Probability = 0.9
    shuffle: Probability = 0.5
    paint: Probability = 0.9
    inner: Probability = 0.2


class ModelsGenesis(Restorative):
    """An image is damaged in up to four ways; the image as it was is predicted.

    Damage is done in [0, 1], to which each image is scaled by its own least and greatest value, and scaled back: the
    backbone then sees inputs as it will see them later, and the decoder predicts in the same units as any other
    restoration. Two more deviations: images instead of cubes; and windows of shuffled pixels tile the image, where the
    reference draws 10,000 that may overlap, so that a shuffle is one permutation and the histogram stays exactly.
    """

    Config = ModelsGenesisConfig
    config: ModelsGenesisConfig

    def corrupted(self, batch: Batch) -> torch.Tensor:
        """The images of the batch, damaged, keyed by seed, epoch and each image's id; within their own range.

        Shuffled, then with other grey values, which would be the same in the other order; then painted over, as in the
        reference.
        """
        images, config, ids = batch.views[0], self.config, batch.ids.cpu()
        unit, low, high = unit_range(images)
        draws = keyed_noise(batch.seed, batch.epoch, ids, DRAWS, "genesis")  # on the CPU, where it is decided
        painting = partial(painted_over, inner=config.inner)
        steps: list[tuple[Step, float]] = [
            (shuffled, config.shuffle),
            (recoloured, config.curve),
            (painting, config.paint),
        ]
        for number, (step, probability) in enumerate(steps):
            chosen = (draws[:, number] < probability).nonzero()[:, 0]
            if len(chosen):
                noise = partial(keyed_noise, batch.seed, batch.epoch, ids[chosen])
                rows = chosen.to(unit.device)
                unit = unit.index_copy(0, rows, step(unit[rows], draws[chosen, len(steps) :].to(unit.device), noise))
        return (low + unit * (high - low)).to(images.dtype)


def shuffled(unit: torch.Tensor, _: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Pixels of images (N, C, H, W) mixed within windows of up to a tenth of each side, at least one pixel."""
    height, width = unit.shape[-2:]
    lengths = (height, width, height * width)
    heights, widths, order = noise(sum(lengths), "windows").to(unit.device).split(lengths, dim=1)
    return moved(unit, shuffle_sources(heights, widths, order, (max(height // 10, 1), max(width // 10, 1))))


def recoloured(unit: torch.Tensor, draws: torch.Tensor, _: Noise) -> torch.Tensor:
    """Images (N, C, H, W) in [0, 1] after a random Bezier curve each."""
    return toned(unit, tone_curve(draws[:, :4], draws[:, 4] < INVERTED))


def painted_over(unit: torch.Tensor, draws: torch.Tensor, noise: Noise, inner: float) -> torch.Tensor:
    """Images (N, C, H, W) with uniform noise, the same in all channels, where ``painted`` says."""
    size = (unit.shape[-2], unit.shape[-1])
    where = painted(draws[:, 6:].view(-1, BLOCKS, 5), draws[:, 5] < inner, size)
    paint = noise(size[0] * size[1], "paint").to(unit).view(-1, 1, *size)
    return torch.where(where[:, None], paint, unit)


def painted(draws: torch.Tensor, inner: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Where noise stands (N, H, W): in up to 5 blocks, or everywhere but in 1 to 5 larger ones.

    Args:
        draws: (N, 5, 5), numbers in [0, 1): whether there is one more block, and its place.
        inner: (N,), whether noise is within blocks, of a sixth to a third of each side; else blocks, of 3/7 to 4/7 of
            each side, are kept.
    """
    height, width = size
    places, within = draws[..., 1:], inner[:, None, None]
    small = (max(height // 6, 1), max(width // 6, 1)), (max(height // 3, 1), max(width // 3, 1))
    large = (height - 4 * height // 7, width - 4 * width // 7), (height - 3 * height // 7, width - 3 * width // 7)
    hidden, kept = (drawn_rectangles(places, size, *limits, MARGIN) for limits in (small, large))
    rows, columns = (torch.where(within, *pair) for pair in zip(hidden, kept, strict=True))
    more = draws[..., 0] < ONE_MORE
    more[:, 0] |= ~inner
    drawn = more.to(torch.uint8).cumprod(dim=1).bool()
    return any_of(rows, columns, drawn) == within
