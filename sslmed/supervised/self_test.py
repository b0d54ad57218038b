"""The self-test of any artifact, the head of a fine-tuned model included."""

import math
from pathlib import Path
from typing import Any

import torch

from sslmed import artifact
from sslmed.artifact import SelfTest
from sslmed.artifact.selftest import at_rest
from sslmed.config import DataError
from sslmed.heads.head import Head
from sslmed.supervised.model import load

MOST = 4096  # numbers an image that are kept of what a head answers


def answers(head: Head, images: torch.Tensor) -> torch.Tensor:
    """What every part of a head makes of images (N, C, H, W), before anything is cut or sorted: (N, at most 4096).

    Of masks the logits of some pixels; of boxes the logits, the boxes and the centrality of some places, and what the
    second stage says of these places' boxes. As `selftest.at_rest` has them.
    """
    with at_rest(head):
        features = head.features(images)
        found = _of_boxes(head, features, images) if head.kind == "boxes" else [head.logits(features)]
        return torch.cat([_some(each.flatten(1), MOST // len(found)) for each in found], dim=1).float().contiguous()


def check(path: str | Path) -> SelfTest:
    """Run the self-test of an artifact or run on this machine.

    Raises:
        MissingInputError: nothing is there.
        DataError: it is damaged, or answers otherwise than where it was written.
    """
    artifact.read_fingerprint(path)  # whether it can be read
    head = None if artifact.read_card(path).head is None else load(path).applied.head
    outcome = artifact.self_test(path, None if head is None else lambda images: answers(head, images))
    if not outcome.passed:
        raise DataError(
            f"{path}: the self-test differs by {outcome.difference:.1e}, allowed {artifact.SELF_TEST_TOLERANCE:.0e}: "
            "these weights or this machine's arithmetic are not what was published"
        )
    return outcome


def _of_boxes(head: Any, features: Any, images: torch.Tensor) -> list[torch.Tensor]:
    places = head.head.detector(features[1:])
    parts = [places.classes, places.boxes / max(images.shape[-2:]), places.central]
    if head.config.reducer:
        some = places.boxes[:, :: math.ceil(places.boxes.shape[1] / 64)]
        parts.append(head.head.reducer(places.finest, some, head.head.detector.pyramid.strides[0]))
    return parts


def _some(numbers: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many of each row, evenly spread."""
    return numbers[:, :: math.ceil(numbers.shape[1] / most)]
