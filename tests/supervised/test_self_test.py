"""What a head answers to the self-test: it has to show a change in any part of it."""

from typing import Any

import pytest
import torch

from sslmed.heads import HEADS
from sslmed.heads.head import Head
from sslmed.models.backbones import BackboneConfig, build
from sslmed.supervised.self_test import MOST, answers

SIZE = 64
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "classification": ("classification", {}, "class"),
    "hidden": ("classification", {"hidden": 8}, "findings"),
    "segmentation": ("segmentation", {}, "mask"),
    "localization": ("localization", {"width": 8, "depth": 1}, "boxes"),
    "reducer": ("localization", {"width": 8, "depth": 1, "reducer": True}, "boxes"),
    "weak": ("weak_localization", {}, "findings"),
}
IMAGES = torch.randn(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def head_of(case: str) -> Head:
    name, config, kind = CASES[case]
    torch.manual_seed(0)
    head = HEADS[name](HEADS[name].Config(**config), build(BackboneConfig(name="test_resnet"), SIZE, 1), 3, kind)
    head.named(("a", "b", "c"))
    for parameter in head.head.parameters():  # some begin at zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return head


@pytest.mark.parametrize("case", CASES)
def test_every_part_of_a_head_shows(case: str) -> None:
    head = head_of(case)
    before = answers(head, IMAGES)
    assert before.dtype == torch.float32
    assert before.shape[0] == 2
    assert before.shape[1] <= MOST
    assert torch.isfinite(before).all()
    assert torch.equal(answers(head, IMAGES), before)
    blind = []
    for name, parameter in head.head.named_parameters():
        kept = parameter.data.clone()
        parameter.data += 0.5 * torch.randn_like(parameter)
        if torch.allclose(answers(head, IMAGES), before, rtol=0, atol=1e-4 * float(before.abs().max())):
            blind.append(name)
        parameter.data = kept
    assert blind == []


def test_a_head_is_left_as_it_was() -> None:
    head = head_of("segmentation").train()
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    assert not answers(head, IMAGES).requires_grad
    assert head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
    head.loss(head.features(IMAGES), torch.zeros(2, SIZE, SIZE, dtype=torch.int64)).backward()  # still trainable


def test_classes_are_answered_by_their_logits() -> None:
    head = head_of("classification").eval()
    with torch.inference_mode():
        assert torch.equal(answers(head, IMAGES), head.logits(head.features(IMAGES)))
