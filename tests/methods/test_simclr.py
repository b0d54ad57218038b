"""NT-Xent against the closed form and lightly, by value and gradient; the head's and the views' details."""

import numpy as np
import pytest
import ranks
import torch
from torch import nn

from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES
from sslmed.methods.simclr import SimCLR, SimCLRConfig, nt_xent, projection_head
from sslmed.models.backbones import BackboneConfig, build


def closed_form(
    first: np.ndarray, second: np.ndarray, temperature: float, groups: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Equation 1 of arXiv 2002.05709 in float64 loops, and its gradient with respect to the raw first views.

    The sum below the fraction goes over the views of other groups, and the positive.

    d loss / d u_i = (sum_k P_ik u_k + sum_k P_ki u_k - 2 u_pos(i)) / (2N temperature) on the sphere, then projected:
    d u / d z = (I - u u^T) / |z|.
    """
    raw = np.concatenate([first, second])
    length = np.linalg.norm(raw, axis=1, keepdims=True)
    unit = raw / length
    views, half = len(raw), len(first)
    group = np.tile(np.arange(half) if groups is None else groups, 2)
    probabilities = np.zeros((views, views))
    loss = 0.0
    for i in range(views):
        counts = [group[k] != group[i] or k == (i + half) % views for k in range(views)]
        weights = np.array([counts[k] and np.exp(unit[i] @ unit[k] / temperature) for k in range(views)])
        probabilities[i] = weights / weights.sum()
        loss -= np.log(probabilities[i, (i + half) % views]) / views
    positive = np.roll(unit, half, axis=0)
    on_sphere = (probabilities @ unit + probabilities.T @ unit - 2 * positive) / (views * temperature)
    gradient = (on_sphere - (on_sphere * unit).sum(axis=1, keepdims=True) * unit) / length
    return loss, gradient[:half]


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_nt_xent_equals_the_closed_form_by_value_and_gradient(temperature: float) -> None:
    stream = np.random.default_rng(0)
    first, second = stream.normal(size=(2, 6, 5))
    loss, gradient = closed_form(first, second, temperature)
    z = torch.tensor(first, requires_grad=True)
    ours = nt_xent(z, torch.tensor(second), temperature)
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-12)
    np.testing.assert_allclose(z.grad, gradient, atol=1e-12)


GROUPS = [[4, 4, 0, 4, 1, 0, 7, 2], [0, 0, 1, 1, 2, 2, 3, 3], [5, 0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("groups", GROUPS)
def test_a_group_does_not_repel_itself(groups: list[int]) -> None:
    stream = np.random.default_rng(4)
    first, second = stream.normal(size=(2, 8, 5))
    loss, gradient = closed_form(first, second, 0.2, np.array(groups))
    z = torch.tensor(first, requires_grad=True)
    ours = nt_xent(z, torch.tensor(second), 0.2, torch.tensor(groups))
    ours.backward()
    assert ours.item() == pytest.approx(loss, abs=1e-12)
    assert ours.item() < nt_xent(z, torch.tensor(second), 0.2).item() - 0.01
    np.testing.assert_allclose(z.grad, gradient, atol=1e-12)


def test_groups_that_all_differ_change_no_bit() -> None:
    views = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = []
    for groups in (None, torch.arange(16).flip(0)):
        z = [view.clone().requires_grad_() for view in views]
        loss = nt_xent(*z, 0.2, groups)
        loss.backward()
        found.append((loss.detach(), *(each.grad for each in z)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_batch_of_one_group_has_nothing_to_learn_and_no_nan() -> None:
    z = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
    loss = nt_xent(z, torch.randn(4, 3, dtype=torch.float64), 0.2, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_the_loss_of_a_batch_takes_its_groups() -> None:
    method = ranks.small_method("simclr").eval()
    views = [torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    ids = torch.arange(4)
    for groups in (ids, torch.tensor([0, 0, 1, 2])):
        loss = method.loss(Batch(views, ids, ids, groups, seed=0, epoch=0))["loss"]
        assert torch.equal(loss, nt_xent(*method._project(*views), 0.2, groups))


def test_half_precision_embeddings_are_compared_in_fp32() -> None:
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z, z, 0.01)  # exp(100) overflows half precision
    assert loss.dtype == torch.float32
    assert loss.item() == nt_xent(z.float(), z.float(), 0.01).item()


def test_identical_embeddings_give_the_loss_of_guessing() -> None:
    z = torch.ones(8, 4, dtype=torch.float64)
    assert nt_xent(z, z, 0.2).item() == pytest.approx(np.log(15))


def test_the_projection_head_is_the_references() -> None:
    head = projection_head(32, 64, 16, layers=3)
    kinds = [type(module) for module in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert all(module.bias is None for module in head if isinstance(module, nn.Linear))
    assert [module.bias is None for module in head if isinstance(module, nn.BatchNorm1d)] == [False, False, True]
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_batchnorm_sees_both_views_together_unless_told_otherwise() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 1, 32, 32), 5 + torch.randn(4, 1, 32, 32)
    backbone = build(BackboneConfig(name="test_resnet"), 32, 0)
    means = []
    for pooled in (True, False):
        method = SimCLR(SimCLRConfig(pool_batchnorm=pooled), backbone)
        means.append([z.mean(dim=0).abs().max().item() for z in method._project(first, second)])
    assert min(means[0]) > 1e-3, "pooled statistics leave each view off centre"
    assert max(means[1]) < 1e-5, "per-view statistics centre each view"


def test_both_views_follow_the_modality() -> None:
    method = SimCLR(SimCLRConfig(), build(BackboneConfig(name="test_resnet"), 32, 0))
    for modality in MODALITIES.values():
        assert method.views(modality) == (modality.view, modality.view)
