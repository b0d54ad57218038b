"""Probes against their formulas, and the promise that a backbone comes back as it was."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sslmed.config import DataError
from sslmed.evaluation.probes import embed, knn_scores, linear_scores


@dataclass
class Batch:
    views: list[torch.Tensor]


class Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(1)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x)).flatten(1)


def blobs(count: int, seed: int, classes: int = 2, distance: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    label = np.arange(count) % classes
    centres = np.eye(classes, 8) * distance
    return (centres[label] + random.normal(size=(count, 8))).astype(np.float32), label


def test_embed_keeps_order_gradients_off_and_the_flags_of_every_module() -> None:
    backbone = Backbone().train()
    backbone.norm.eval()  # frozen on purpose
    before = backbone.norm.running_mean.clone()
    images = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    got = embed(backbone, [Batch([images[:3]]), Batch([images[3:]])])
    assert got.dtype == np.float32
    assert got.shape == (5, 4)
    np.testing.assert_allclose(got, images.flatten(1) / np.sqrt(1 + 1e-5), rtol=1e-5)  # no dropout: eval mode
    assert backbone.training
    assert backbone.drop.training
    assert not backbone.norm.training
    assert torch.equal(backbone.norm.running_mean, before)


def test_embed_restores_the_flags_after_a_failure() -> None:
    backbone = Backbone().train()
    with pytest.raises(RuntimeError):
        embed(backbone, [Batch([torch.zeros(1, 3, 2, 2)])])
    assert backbone.training
    assert backbone.norm.training


def test_embed_refuses_what_is_not_finite_and_what_is_empty() -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="1 of 3 images"):
        embed(Backbone(), [Batch([images])])
    with pytest.raises(ValueError, match="no images"):
        embed(Backbone(), [])


def test_embed_gives_float32_for_a_bf16_backbone() -> None:
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).to(torch.bfloat16)
    assert embed(backbone, [Batch([torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)])]).dtype == np.float32


def test_embed_shows_progress_when_named(capsys: pytest.CaptureFixture[str]) -> None:
    embed(Backbone(), [Batch([torch.zeros(2, 1, 2, 2)])], label="test images")
    assert "test images 1/1" in capsys.readouterr().err


def test_knn_is_dinos_weighted_vote() -> None:
    train_x, train_y = blobs(40, seed=0, classes=3)
    test_x, _ = blobs(9, seed=1, classes=3)
    got = knn_scores(train_x, train_y, test_x, 3, k=7, temperature=0.07)
    unit = torch.nn.functional.normalize
    similarity = unit(torch.tensor(test_x).double()) @ unit(torch.tensor(train_x).double()).T
    top, index = similarity.topk(7)
    votes = torch.zeros(9, 3, dtype=torch.float64)
    votes.scatter_add_(1, torch.tensor(train_y)[index], (top / 0.07).exp())
    np.testing.assert_allclose(got, votes / votes.sum(1, keepdim=True), rtol=1e-6)


def test_knn_caps_k_and_stands_extreme_input() -> None:
    train_x, train_y = blobs(6, seed=0)
    few = knn_scores(train_x, train_y, train_x[:2], 2, k=20)
    np.testing.assert_allclose(few, knn_scores(train_x, train_y, train_x[:2], 2, k=6))
    extreme = knn_scores(train_x, train_y, np.vstack([train_x[:1], np.zeros((1, 8))]), 2, temperature=1e-5)
    assert np.isfinite(extreme).all()
    assert extreme[0, train_y[0]] == pytest.approx(1.0)


def test_knn_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (train_x, train_y), (test_x, _) = blobs(30, seed=0), blobs(11, seed=1)
    whole = knn_scores(train_x, train_y, test_x, 2)
    monkeypatch.setattr("sslmed.evaluation.probes._BLOCK", 4)
    np.testing.assert_allclose(knn_scores(train_x, train_y, test_x, 2), whole)


def test_linear_is_logistic_regression_on_standardised_features() -> None:
    (train_x, train_y), (test_x, test_y) = blobs(60, seed=0, classes=3), blobs(60, seed=1, classes=3)
    train_x, test_x = train_x * np.float32(50) + 7, test_x * np.float32(50) + 7
    got = linear_scores(train_x, train_y, test_x, 3)
    mean, deviation = train_x.astype(float).mean(0), train_x.astype(float).std(0)
    model = LogisticRegression(max_iter=10000).fit((train_x - mean) / deviation, train_y)
    np.testing.assert_allclose(got, model.predict_proba((test_x - mean) / deviation), atol=1e-3)
    np.testing.assert_allclose(got.sum(axis=1), 1)
    assert (got.argmax(axis=1) == test_y).mean() > 0.85
    np.testing.assert_array_equal(got, linear_scores(train_x, train_y, test_x, 3))


def test_linear_with_missing_classes_and_a_constant_feature() -> None:
    train_x, train_y = blobs(20, seed=0)
    train_x[:, 5] = 2.0
    got = linear_scores(train_x, train_y * 2, train_x, 3)
    assert np.isfinite(got).all()
    assert (got[:, 1] == 0).all()
    np.testing.assert_array_equal(linear_scores(train_x[:1], np.array([1]), train_x[:3], 3), [[0, 1, 0]] * 3)


def test_an_unconverged_solver_says_nothing() -> None:
    train_x, train_y = blobs(40, seed=0, distance=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_scores(train_x, train_y, train_x, 2, max_iterations=1)
