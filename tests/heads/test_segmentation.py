"""Dice and cross-entropy of masks against plain formulas, by value and gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sslmed.heads.segmentation import Segmentation, SegmentationConfig, dice_loss
from sslmed.models.backbones import BackboneConfig, build

VOID = 255
SHAPE = (3, 4, 6, 5)  # images, classes, rows, columns


def drawn(seed: int, void: float = 0.2, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    stream = np.random.default_rng(seed)
    logits = stream.normal(0, 2, (SHAPE[0], classes, *SHAPE[2:]))
    target = stream.integers(classes, size=(SHAPE[0], *SHAPE[2:]))
    target[stream.random(target.shape) < void] = VOID
    return torch.from_numpy(logits).requires_grad_(), torch.from_numpy(target)


def softmax(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def plain_dice(logits: np.ndarray, target: np.ndarray) -> float:
    """Class by class, over the counted pixels of the whole batch in one row."""
    shares = softmax(logits)
    scores = []
    for label in range(1, logits.shape[1]):
        p, t = shares[:, label][target != VOID], (target[target != VOID] == label).astype(float)
        scores.append((2 * np.dot(p, t) + 1) / (p.sum() + t.sum() + 1))
    return 1 - float(np.mean(scores))


def looped_dice(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same, pixel by pixel."""
    images, classes, rows, columns = logits.shape
    overlap, area, size = ([logits.new_zeros(()) for _ in range(classes)] for _ in range(3))
    for image in range(images):
        for row in range(rows):
            for column in range(columns):
                truth = int(target[image, row, column])
                if truth == VOID:
                    continue
                pixel = logits[image, :, row, column]
                pixel = (pixel - pixel.logsumexp(0)).exp()
                overlap[truth] = overlap[truth] + pixel[truth]
                size[truth] = size[truth] + 1
                for label in range(classes):
                    area[label] = area[label] + pixel[label]
    dice = [(2 * o + 1) / (a + s + 1) for o, a, s in zip(overlap[1:], area[1:], size[1:], strict=True)]
    return 1 - sum(dice) / len(dice)


def plain_entropy(logits: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    counted = target != VOID
    labels = target[counted]
    found = np.moveaxis(softmax(logits), 1, -1)[counted]
    each = weights[labels]
    return float(-(each * np.log(found[np.arange(len(labels)), labels])).sum() / each.sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.9), st.integers(2, 5))
def test_dice_is_the_formula(seed: int, void: float, classes: int) -> None:
    logits, target = drawn(seed, void, classes)
    assert dice_loss(logits, target).item() == pytest.approx(plain_dice(logits.detach().numpy(), target.numpy()))


@pytest.mark.parametrize("seed", range(3))
def test_dice_has_the_gradient_of_a_loop_over_pixels(seed: int) -> None:
    logits, target = drawn(seed)
    other = logits.detach().clone().requires_grad_()
    loss, looped = dice_loss(logits, target), looped_dice(other, target)
    loss.backward()
    looped.backward()
    torch.testing.assert_close(loss, looped, rtol=1e-12, atol=0)
    torch.testing.assert_close(logits.grad, other.grad, rtol=1e-9, atol=1e-14)
    assert torch.autograd.gradcheck(lambda values: dice_loss(values, target), logits)


def test_dice_of_perfect_and_of_wrong_masks() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.int64)
    target[:, :4] = 1
    right = torch.nn.functional.one_hot(target, 2).movedim(-1, 1) * 200.0
    assert dice_loss(right, target).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(right.flip(1), target).item() == pytest.approx(1 - 1 / 65)


def test_the_background_counts_in_no_dice() -> None:
    logits, target = drawn(0, classes=2)
    foreground = dice_loss(logits, target)
    twice = dice_loss(torch.cat([logits, torch.full_like(logits[:, :1], -1e9)], dim=1), target)
    torch.testing.assert_close(
        twice, foreground / 2
    )  # a class that is neither there nor found has 0, and no background


class Fixed(Segmentation):
    """Segmentation whose features are the logits."""

    def __init__(self, classes: int = 4, **config: object) -> None:
        network = build(BackboneConfig(name="test_resnet"), 32, 0)
        super().__init__(SegmentationConfig(**config), network, classes)

    def logits(self, features: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return features


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mix(share: float, weighted: bool) -> None:
    head = Fixed(dice=share, balance="weights" if weighted else "none")
    head.balance(torch.tensor([10000, 100, 400, 0]))
    weights = np.ones(4) if head.weights is None else head.double().weights.numpy()
    logits, target = drawn(1)
    expected = share * plain_dice(logits.detach().numpy(), target.numpy())
    expected += (1 - share) * plain_entropy(logits.detach().numpy(), target.numpy(), weights)
    loss = head.loss(logits, target)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    if share == 0:
        counted = target != VOID
        labels = target.masked_fill(~counted, 0)
        each = torch.from_numpy(weights)[labels] * counted
        truth = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)
        gradient = each[:, None] * (logits.detach().softmax(dim=1) - truth) / each.sum()
        torch.testing.assert_close(logits.grad, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_ignored_pixels_have_exactly_no_gradient(share: float) -> None:
    head = Fixed(dice=share)
    logits, target = drawn(2)
    head.loss(logits, target).backward()
    ignored = target == VOID
    assert ignored.any()
    assert (logits.grad.movedim(1, -1)[ignored] == 0).all()
    assert (logits.grad.movedim(1, -1)[~ignored] != 0).all()
    changed = logits.detach().clone()
    changed.movedim(1, -1)[ignored] = 1e4
    assert torch.equal(head.loss(changed, target), head.loss(logits.detach(), target))


@pytest.mark.parametrize("filled", [0, VOID])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_without_foreground_or_without_anything_is_finite(filled: int, weighted: bool) -> None:
    head = Fixed(dice=0.5, balance="weights" if weighted else "none")
    head.balance(torch.tensor([100, 10, 10, 10]))
    logits, target = drawn(3)
    loss = head.double().loss(logits, torch.full_like(target, filled))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert bool(logits.grad.any()) == (filled == 0)
    if filled == VOID:
        assert loss.item() == 0
    else:  # Dice pushes foreground down: with no pixel of it, its own term is 1 / (sum p + 1)
        assert (logits.grad[:, 1:] > 0).all()


def test_rare_classes_count_by_the_root_of_their_pixels() -> None:
    head = Fixed(balance="weights")
    head.balance(torch.tensor([10000, 100, 400, 0]))
    assert head.weights.mean().item() == pytest.approx(1)
    ratios = head.weights / head.weights[0]
    torch.testing.assert_close(ratios, torch.tensor([1.0, 10.0, 5.0, 100.0]))
    plain = Fixed()
    plain.balance(torch.tensor([10000, 100, 400, 0]))
    assert plain.weights is None


def test_the_temperature_divides_logits() -> None:
    head = Fixed()
    logits, _ = drawn(4)
    head.temperature = 2.5
    np.testing.assert_allclose(
        head.predict(logits).detach().numpy(), softmax(logits.detach().numpy() / 2.5), rtol=1e-12
    )


def test_tiles_are_asked_for_by_input() -> None:
    assert SegmentationConfig(input="tiles").tiles
    assert not SegmentationConfig().tiles


@pytest.mark.parametrize("side", [(32, 32), (40, 56)])
@pytest.mark.parametrize("network", ["test_resnet", "test_vit", "test_convnext"])
def test_masks_have_the_size_of_the_images(network: str, side: tuple[int, int]) -> None:
    if network == "test_vit":
        side = tuple(each // 16 * 16 for each in side)
    head = Segmentation(SegmentationConfig(), build(BackboneConfig(name=network), side, 0), 3).eval()
    assert head(torch.randn(2, 1, *side)).shape == (2, 3, *side)


def test_settings_out_of_range_are_refused() -> None:
    for given_ in ({"dice": 1.1}, {"input": "parts"}, {"balance": "sampling"}, {"dise": 0.2}):
        with pytest.raises(ValueError, match=next(iter(given_))):
            SegmentationConfig(**given_)
