"""The self-test of an artifact: an input, and what the weights made of it where they were written."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from sslmed import image_size
from sslmed.artifact.card import Card
from sslmed.config import DataError
from sslmed.keyed_rng import rng

TOLERANCE = 1e-4  # relative to the largest number: other CPUs add in another order
Answers = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class SelfTest:
    """The outcome of running the stored input through the loaded weights.

    Attributes:
        difference: the largest, of features and of what a head answers, relative to the largest number of each.
    """

    passed: bool
    difference: float


def recorded(card: Card, network: nn.Module, answers: Answers | None) -> dict[str, torch.Tensor]:
    """What an artifact keeps: ``input``, ``features``, and ``answers`` where there is a head.

    Args:
        answers: the head's, of images.
    """
    stream = rng(0, 0, 0, "self-test")
    images = torch.from_numpy(stream.standard_normal(_shape(card), dtype=np.float32))
    kept = {"input": images, "features": features(network, images)}
    return kept if answers is None else kept | {"answers": answers(images)}


def compared(card: Card, kept: dict[str, torch.Tensor], network: nn.Module, answers: Answers | None) -> SelfTest:
    """Run the kept input through loaded weights; ``answers`` count where both sides have some.

    Raises:
        DataError: what was kept is no self-test of this card.
    """
    images = kept.get("input")
    if images is None or images.dtype != torch.float32 or tuple(images.shape) != _shape(card):
        raise DataError("selftest.safetensors does not hold this card's self-test: its input has another shape")
    differences = [_difference(kept.get("features"), features(network, images))]
    if answers is not None and "answers" in kept:
        differences.append(_difference(kept["answers"], answers(images)))
    worst = float(np.max(differences))  # nan where one is
    return SelfTest(worst <= TOLERANCE, worst)


def features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features, as ``at_rest`` has them."""
    with at_rest(network):
        found: torch.Tensor = network(images)
        return found.float().contiguous()


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode on the CPU, without gradients and not compiled; afterwards it is as it was.

    On the CPU, for a GPU may multiply in TF32, which is off by more than the tolerance. Not compiled, for that takes a
    minute and a compiler.
    """
    training, device = module.training, next(module.parameters()).device
    module.eval().cpu()
    try:
        # what is compiled has brought this part of torch, which takes a second to import
        stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        with stance, torch.inference_mode():
            yield
    finally:
        module.train(training).to(device)


def _shape(card: Card) -> tuple[int, ...]:
    return (2, card.backbone.in_chans, *image_size.sides(card.size))


def _difference(kept: torch.Tensor | None, now: torch.Tensor) -> float:
    if kept is None or kept.shape != now.shape:
        raise DataError("selftest.safetensors does not hold this card's self-test: its output has another shape")
    return float((now - kept).abs().max() / kept.abs().max().clamp_min(1e-12))
