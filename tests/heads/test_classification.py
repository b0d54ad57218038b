"""The losses of classes and findings against closed forms, by value and gradient; balance; mixup."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from sslmed.data.loading import Batch
from sslmed.heads.classification import Classification, ClassificationConfig
from sslmed.models.backbones import Backbone

WIDTH = 5


class Network(nn.Module):
    """Stands for a timm network: the features are the image's first pixels."""

    num_features = WIDTH

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :WIDTH]


def make(kind: str = "class", classes: int = 3, **settings: object) -> Classification:
    """A head in float64 with weights that are not zero."""
    head = Classification(ClassificationConfig(**settings), Backbone(Network()), classes, kind)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=stream))
    return head.eval()


FEATURES = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1)).double()
CLASS = torch.tensor([0, 2, 1, 1, 2, 2])
FINDINGS = torch.tensor([[1, 0, -1], [0, 0, 1], [-1, -1, -1], [1, 1, 0], [0, -1, 1], [0, 0, 0]])


def linear(head: Classification) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K), by NumPy, and the features with a 1 for the bias."""
    layer = head.head[-1]
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    features = FEATURES.numpy()
    return features @ weight.T + bias, np.hstack([features, np.ones((len(features), 1))])


def check(head: Classification, target: torch.Tensor, expected: float, by_logit: np.ndarray) -> None:
    """The loss, and its gradient by every weight, from that by the logits (N, K)."""
    head.zero_grad()
    loss = head.loss(FEATURES, target)
    loss.backward()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    gradient = by_logit.T @ linear(head)[1]
    layer = head.head[-1]
    found = np.hstack([layer.weight.grad.numpy(), layer.bias.grad.numpy()[:, None]])
    np.testing.assert_allclose(found, gradient, rtol=1e-10, atol=1e-12)


def test_the_last_layer_starts_at_equal_probabilities() -> None:
    for hidden in (0, 4):
        head = Classification(ClassificationConfig(hidden=hidden), Backbone(Network()), 4, "class").eval()
        assert torch.equal(head.predict(FEATURES.float()), torch.full((6, 4), 0.25))


def test_a_hidden_layer_has_its_width_and_gelu() -> None:
    head = make(hidden=7).double()
    first, last = head.head[0], head.head[-1]
    assert first.weight.shape == (7, WIDTH)
    inside = FEATURES @ first.weight.T + first.bias
    inside = inside * 0.5 * (1 + torch.erf(inside / math.sqrt(2)))
    torch.testing.assert_close(head.logits(FEATURES), inside @ last.weight.T + last.bias)


def test_dropout_is_before_the_last_layer_and_in_training_alone() -> None:
    head = make(dropout=0.5)
    features = torch.ones(2000, WIDTH)
    assert torch.equal(head.logits(features)[0], head.logits(features)[1])
    head.train()
    spread = head.logits(features).var(dim=0)  # of 2 w with probability a half: w² each
    torch.testing.assert_close(spread, head.head[-1].weight.square().sum(dim=1), rtol=0.15, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_of_classes(weighted: bool) -> None:
    head = make(balance="weights" if weighted else "none")
    head.balance(torch.tensor([10, 30, 20]))
    weights = np.array([20 / 10, 20 / 30, 1.0]) if weighted else np.ones(3)
    head = head.double()
    if weighted:
        torch.testing.assert_close(head.weights, torch.from_numpy(weights), rtol=1e-7, atol=0)
        weights = head.weights.numpy()  # as rounded to fp32
    logits, _ = linear(head)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    each = weights[CLASS.numpy()]
    truth = np.eye(3)[CLASS.numpy()]
    expected = -(each * np.log((shares * truth).sum(axis=1))).sum() / each.sum()
    check(head, CLASS, expected, each[:, None] * (shares - truth) / each.sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_of_findings_leaves_unknown_ones_out(weighted: bool) -> None:
    head = make("findings", balance="weights" if weighted else "none")
    head.balance(torch.tensor([[30, 10], [5, 20], [7, 0]]))  # without, with; one that no train image has
    head = head.double()
    ratio = np.array([3.0, 0.25, 7.0]) if weighted else np.ones(3)
    if weighted:
        assert head.weights.tolist() == ratio.tolist()
    logits, _ = linear(head)
    shares, truth = 1 / (1 + np.exp(-logits)), FINDINGS.numpy()
    known = truth >= 0
    each = -np.where(truth == 1, ratio * np.log(shares), np.log(1 - shares))
    by_logit = np.where(truth == 1, ratio * (shares - 1), shares)
    check(head, FINDINGS, each[known].mean(), np.where(known, by_logit, 0) / known.sum())


def test_a_batch_of_which_nothing_is_known_teaches_nothing() -> None:
    head = make("findings").double()
    check(head, torch.full((6, 3), -1), 0.0, np.zeros((6, 3)))


def test_every_class_weighs_the_same_in_all() -> None:
    counts = torch.tensor([7, 100, 3, 0])
    head = make(classes=4, balance="weights")
    head.balance(counts)
    share = head.weights * counts
    torch.testing.assert_close(share[:3], share[:1].expand(3))
    assert torch.isfinite(head.weights).all(), "a class that no train image has"
    plain = make(classes=4)
    plain.balance(counts)
    assert plain.weights is None


def test_the_positives_of_a_finding_weigh_as_much_as_its_negatives() -> None:
    counts = torch.tensor([[90, 10], [4, 6]])
    head = make("findings", classes=2, balance="weights")
    head.balance(counts)
    torch.testing.assert_close(head.weights * counts[:, 1], counts[:, 0].float())


def test_drawing_evenly_is_the_samplers_work() -> None:
    head = make(balance="sampling")
    head.balance(torch.tensor([1, 2, 3]))
    assert head.weights is None
    assert head.config.drawn_evenly
    assert not make(balance="weights").config.drawn_evenly


@pytest.mark.parametrize("kind", ["class", "findings"])
def test_the_temperature_divides_logits(kind: str) -> None:
    head = make(kind).double()
    logits, _ = linear(head)
    for temperature in (1.0, 0.5, 3.0):
        head.temperature = temperature
        soft = np.exp(logits / temperature)
        expected = soft / soft.sum(axis=1, keepdims=True) if kind == "class" else soft / (1 + soft)
        np.testing.assert_allclose(head.predict(FEATURES).detach().numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(head.logits(FEATURES).detach().numpy(), logits, rtol=1e-12)


def batch(target: torch.Tensor, first: int = 0, seed: int = 0, epoch: int = 0) -> Batch:
    ids = torch.arange(first, first + len(target))
    images = torch.randn(len(target), 1, 4, 4, generator=torch.Generator().manual_seed(2))
    return Batch([images], target, ids, ids, seed, epoch)


def share_of(head: Classification, given: Batch) -> float:
    """Found by least squares from the mixed images, and held against each pixel."""
    images, _ = head.mixed(given)
    here, there = given.views[0], given.views[0].flip(0)
    share = (((images - there) * (here - there)).sum() / (here - there).square().sum()).item()
    torch.testing.assert_close(images, here * share + there * (1 - share), rtol=0, atol=1e-5)
    return share


def test_mixup_of_classes_mixes_images_and_targets_in_one_share() -> None:
    head, given = make(mixup=0.4), batch(CLASS)
    share = share_of(head, given)
    assert 0 < share < 1
    _, target = head.mixed(given)
    truth = torch.eye(3)[CLASS]
    torch.testing.assert_close(target, truth * share + truth.flip(0) * (1 - share), rtol=0, atol=1e-5)
    assert torch.equal(given.target, CLASS), "the batch stays as it is"


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_mixed_classes_is_the_mix_of_losses(weighted: bool) -> None:
    head = make(mixup=0.4, balance="weights" if weighted else "none")
    head.balance(torch.tensor([10, 30, 20]))
    head = head.double()
    _, target = head.mixed(batch(CLASS))
    logits, _ = linear(head)
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    weights = np.ones(3) if head.weights is None else head.weights.numpy()
    by_logit = np.exp(log_shares) * (target.numpy() * weights).sum(axis=1, keepdims=True) - target.numpy() * weights
    check(head, target.double(), -(target.numpy() * weights * log_shares).sum() / 6, by_logit / 6)


def test_mixup_of_findings_leaves_unknown_ones_unknown() -> None:
    head, given = make("findings", mixup=0.4), batch(FINDINGS)
    share = share_of(head, given)
    _, target = head.mixed(given)
    unknown = (FINDINGS < 0) | (FINDINGS.flip(0) < 0)
    assert (target[unknown] == -1).all()
    mixed = FINDINGS * share + FINDINGS.flip(0) * (1 - share)
    torch.testing.assert_close(target[~unknown], mixed[~unknown], rtol=0, atol=1e-5)
    assert torch.isfinite(head.loss(FEATURES.float(), target))


def test_the_share_is_keyed() -> None:
    head = make(mixup=0.4)
    first = share_of(head, batch(CLASS))
    assert share_of(head, batch(CLASS)) == first
    torch.manual_seed(5)
    assert share_of(head, batch(CLASS)) == first, "torch's stream is not asked"
    others = [batch(CLASS, epoch=1), batch(CLASS, seed=1), batch(CLASS, first=6)]
    assert len({first, *(share_of(head, other) for other in others)}) == 4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha: float) -> None:
    head = make(mixup=alpha)
    here, there = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    shares = []
    for row in range(400):
        ids = torch.tensor([row, row + 1])
        given = Batch([torch.cat([there, here])], torch.tensor([0, 1]), ids, ids, 0, 0)
        shares.append(head.mixed(given)[0][0].item())
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("kind", ["class", "findings"])
def test_without_mixup_nothing_changes(kind: str) -> None:
    given = batch(CLASS if kind == "class" else FINDINGS)
    images, target = make(kind).mixed(given)
    assert images is given.views[0]
    assert target is given.target


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"hidden": -1}, {"dropout": 1.0}, {"mixup": -0.1}, {"balance": "classes"}, {"mixpu": 0.2}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ClassificationConfig(**settings)
