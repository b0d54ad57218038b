"""Evidence, how it is pooled, and which classes it is learnt for."""

import math

import pytest
import torch

from sslmed.config import UsageError
from sslmed.heads.weak_localization import WeakLocalization, WeakLocalizationConfig, pooled
from sslmed.models.backbones import BackboneConfig, build

SIDE = 32


def head(classes: int = 2, kind: str = "class", network: str = "test_resnet", **settings: object) -> WeakLocalization:
    torch.manual_seed(0)
    made = WeakLocalization(
        WeakLocalizationConfig(**settings), build(BackboneConfig(name=network), SIDE, 0), classes, kind
    )
    with torch.no_grad():
        made.head.classifier.weight.normal_()
    return made.eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sharpness", [0.5, 10.0])
def test_pooling_by_value_and_gradient(sharpness: float) -> None:
    evidence = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    found = pooled(evidence, sharpness)
    slow = [
        [math.log(sum(math.exp(sharpness * e) for e in plane.flatten().tolist()) / 20) / sharpness for plane in image]
        for image in evidence
    ]
    torch.testing.assert_close(found, torch.tensor(slow, dtype=torch.float64))
    shares = torch.autograd.grad(found.sum(), evidence)[0]
    expected = (sharpness * evidence).flatten(2).softmax(dim=-1).view_as(evidence)
    torch.testing.assert_close(shares, expected)


def test_pooling_lies_between_the_mean_and_the_largest() -> None:
    evidence = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    assert pooled(evidence, 1e-4).item() == pytest.approx(evidence.mean().item(), abs=1e-3)
    assert pooled(evidence, 100.0).item() == pytest.approx(evidence.max().item(), abs=0.05)


def test_of_two_classes_the_first_is_nothing_and_has_no_evidence() -> None:
    made = head()
    made.named(("clear", "nodule"))
    assert made.located == (1,)
    evidence = made.evidence(made.features(images()))
    assert not evidence[:, 0].any()
    assert evidence[:, 1].any()
    logits = made.logits(made.features(images()))
    torch.testing.assert_close(logits[:, 0], torch.zeros(2))
    torch.testing.assert_close(logits[:, 1], pooled(evidence, 10.0)[:, 1])


@pytest.mark.parametrize(
    ("classes", "given", "located"),
    [
        (("edema", "mass", "normal"), None, (0, 1)),
        (("effusion", "Normal"), None, (0,)),
        (("0", "1"), None, (1,)),
        (("0", "1"), 1, (0,)),
        (("a", "b", "c"), "b", (0, 2)),
    ],
)
def test_the_class_that_is_nothing(classes: tuple[str, ...], given: str | int | None, located: tuple[int, ...]) -> None:
    made = head(len(classes), nothing=given)
    made.named(classes)
    assert made.located == located


@pytest.mark.parametrize(
    ("classes", "given", "message"),
    [
        (("benign", "malignant"), None, r"head.nothing is missing: .* Allowed: benign, malignant"),
        (("clear", "normal", "mass"), None, "head.nothing is missing"),
        (("a", "b"), "normal", "head.nothing is 'normal'"),
    ],
)
def test_a_class_that_is_nothing_must_be_known(classes: tuple[str, ...], given: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        head(len(classes), nothing=given).named(classes)


def test_findings_need_no_class_that_is_nothing() -> None:
    made = head(2, "findings")
    made.named(("a", "normal"))
    assert made.located == (0, 1)
    with pytest.raises(UsageError, match="findings need no such class"):
        head(2, "findings", nothing="a").named(("a", "b"))


@pytest.mark.parametrize(
    ("network", "stride", "expected"), [("test_resnet", 8, 8), ("test_resnet", 4, 4), ("test_vit", 8, 8)]
)
def test_evidence_is_read_at_the_stride_that_is_asked_for(network: str, stride: int, expected: int) -> None:
    made = head(network=network, stride=stride)
    side = SIDE // expected
    assert made.evidence(made.features(images())).shape == (2, 2, side, side)
    assert made.heat(images()).shape == (2, 2, SIDE, SIDE)


def test_heat_is_the_activation_times_its_gradient() -> None:
    made = head()
    made.named(("clear", "nodule"))
    shown = images()
    maps = made.backbone.maps(shown)
    assert made.backbone.levels[made.head.finer].stride == 4
    finer = maps[made.head.finer].detach()

    def logit(cells: torch.Tensor) -> torch.Tensor:
        """The rest of the network, from the map of stride 4 to the one that is read."""
        deeper = made.backbone.network.layer2(cells)
        return pooled(made.head.classifier(made.head.before(deeper)), 10.0)[:, 1].sum()

    slope = torch.autograd.functional.jacobian(logit, finer)
    plane = (slope * finer).sum(dim=1).relu()
    smooth = torch.stack([plane[:, a : a + 3, b : b + 3].mean(dim=(1, 2)) for a in range(6) for b in range(6)], dim=1)
    heat = made.heat(shown)
    assert not heat[:, 0].any()
    inner = torch.nn.functional.interpolate(heat[:, 1:], scale_factor=0.25, mode="bilinear")[:, 0, 1:-1, 1:-1]
    assert torch.corrcoef(torch.stack([inner.flatten(), smooth.flatten()]))[0, 1] > 0.98
    assert all(parameter.grad is None for parameter in made.parameters())
    with torch.inference_mode():
        assert torch.equal(made.heat(shown), heat)


def test_unknown_findings_count_for_nothing() -> None:
    made = head(2, "findings")
    features = made.features(images())
    known = made.loss(features, torch.tensor([[1, -1], [0, -1]]))
    logits = made.logits(features)[:, 0]
    goal = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(known, torch.nn.functional.binary_cross_entropy_with_logits(logits, goal))
