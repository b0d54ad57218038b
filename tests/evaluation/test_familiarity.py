"""The distance by value, a limit that holds for new images of the same kind, and another kind above it."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from sslmed.config import DataError
from sslmed.evaluation.familiarity import MARGIN, Familiarity, appearance, measure
from sslmed.models.backbones import BackboneConfig, build


def correlated(count: int, width: int, seed: int) -> np.ndarray:
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    features = np.random.default_rng(seed).normal(size=(count, width)) @ mixing + 5.0
    return (features * np.geomspace(0.1, 100, width)).astype(np.float32)


def test_distance_is_mahalanobis() -> None:
    covariance = np.array([[4.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], np.float32)
    usual = Familiarity(np.array([1.0, 2.0, 3.0], np.float32), covariance, 1.0)
    points = np.array([[1.0, 2.0, 3.0], [2.0, 0.0, 3.5], [-1.0, 2.0, 9.0]])
    from_mean = points - [1.0, 2.0, 3.0]
    expected = np.einsum("md,de,me->m", from_mean, np.linalg.inv(covariance.astype(np.float64)), from_mean) / 3
    assert usual.distance(points) == pytest.approx(expected, rel=1e-9)


def test_covariance_is_ledoit_and_wolfs_of_standardised_features() -> None:
    train = correlated(60, 20, 0)
    scale = train.astype(np.float64).std(axis=0)
    expected = LedoitWolf().fit(train / scale).covariance_ * np.outer(scale, scale)
    usual = measure(train, correlated(30, 20, 1))
    assert usual.covariance == pytest.approx(expected, rel=1e-4)
    assert usual.mean == pytest.approx(train.mean(axis=0), rel=1e-5)
    assert usual.limit == pytest.approx(MARGIN * np.quantile(usual.distance(correlated(30, 20, 1)), 0.99))


@pytest.mark.parametrize("count", [15, 40, 500])
def test_the_limit_holds_for_the_same_kind_and_not_for_another(count: int) -> None:
    """With fewer images than features too; the other kind differs in correlations alone, not in a single feature."""
    usual = measure(correlated(count, 40, 0), correlated(max(count // 3, 10), 40, 1))
    assert (usual.distance(correlated(500, 40, 2)) > usual.limit).mean() < 0.06
    far = correlated(100, 40, 3) + 50 * correlated(500, 40, 2).std(axis=0)
    assert (usual.distance(far) > usual.limit).all()
    if count == 500:
        unmixed = np.random.default_rng(4).permuted(correlated(500, 40, 0), axis=0)
        assert (usual.distance(unmixed) > usual.limit).mean() > 0.8


def test_scales_of_features_do_not_matter() -> None:
    scale = np.geomspace(0.5, 2, 20).astype(np.float32)
    one = measure(correlated(50, 20, 0), correlated(20, 20, 1))
    other = measure(correlated(50, 20, 0) * scale, correlated(20, 20, 1) * scale)
    points = correlated(30, 20, 2)
    assert other.distance(points * scale) == pytest.approx(one.distance(points), rel=1e-3)


def test_a_channel_that_is_always_the_same_is_watched_within_reason() -> None:
    train, held_out = correlated(50, 20, 0), correlated(20, 20, 1)
    train[:, 3], held_out[:, 3] = 7.0, 7.0
    usual = measure(train, held_out)
    assert np.isfinite(usual.limit)
    assert (usual.distance(held_out) <= usual.limit).all()
    changed = held_out.copy()
    changed[:, 3] = 1e4
    assert (usual.distance(changed) > usual.limit).all()


def test_what_is_not_finite_is_unfamiliar() -> None:
    usual = measure(correlated(50, 20, 0), correlated(20, 20, 1))
    points = correlated(3, 20, 2)
    points[1, 4], points[2, 0] = np.nan, np.inf
    distance = usual.distance(points)
    assert np.isfinite(distance[0])
    assert distance[1:].tolist() == [np.inf, np.inf]


def test_it_comes_back_from_its_tensors_and_holds_no_image() -> None:
    train = correlated(15, 40, 0)
    usual = measure(train, correlated(10, 40, 1))
    tensors = usual.tensors()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "mean": (40,),
        "covariance": (40, 40),
        "limit": (),
    }
    back = Familiarity.from_tensors(tensors)
    points = correlated(5, 40, 2)
    assert np.array_equal(back.distance(points), usual.distance(points))
    assert back.limit == usual.limit


@pytest.mark.parametrize(
    "broken",
    [
        {"mean": None},
        {"covariance": torch.eye(3)},
        {"mean": torch.zeros(2, 2)},
        {"limit": torch.tensor(float("nan"))},
        {"limit": torch.zeros(3)},
        {"covariance": torch.full((20, 20), float("nan"))},
        {"covariance": -torch.eye(20)},
    ],
)
def test_other_tensors_are_refused(broken: dict[str, torch.Tensor | None]) -> None:
    tensors = {**measure(correlated(50, 20, 0), correlated(20, 20, 1)).tensors(), **broken}
    with pytest.raises(DataError, match="damaged"):
        Familiarity.from_tensors({name: each for name, each in tensors.items() if each is not None})


@pytest.mark.parametrize(("train", "held_out"), [(1, 5), (5, 0)])
def test_too_few_images(train: int, held_out: int) -> None:
    with pytest.raises(ValueError, match="at least 2 training images and 1 held-out"):
        measure(correlated(train, 4, 0), correlated(held_out, 4, 1))


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "test_vit", "swin_tiny_patch4_window7_224"])
def test_what_is_looked_at(name: str) -> None:
    backbone = build(BackboneConfig(name=name), 64, 0).eval()
    images = torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        found = appearance(backbone, images)
        first, second = backbone.early_maps(images)
    widths = [min(64, each.shape[1]) for each in (first, second)]
    assert found.shape == (3, 2 * sum(widths))
    assert found.dtype == torch.float32
    assert torch.allclose(found[:, 0], first[:, 0].mean(dim=(1, 2)), atol=1e-5)
    assert torch.allclose(found[:, 2 * widths[0] - 1], first[:, -1].std(dim=(1, 2), correction=0), atol=1e-5)
    assert torch.allclose(found[:, -1], second[:, -1].std(dim=(1, 2), correction=0), atol=1e-5)


def test_pictures_of_another_kind_are_unfamiliar() -> None:
    """Smooth shapes of one kind of texture, against noise and against stripes, through a random network."""
    backbone = build(BackboneConfig(name="test_resnet"), 64, 0).eval()
    generator = torch.Generator().manual_seed(0)

    def smooth(count: int) -> torch.Tensor:
        return torch.nn.functional.interpolate(torch.randn(count, 1, 6, 6, generator=generator), 64, mode="bicubic")

    def seen(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return appearance(backbone, images).numpy()

    usual = measure(seen(smooth(40)), seen(smooth(12)))
    assert (usual.distance(seen(smooth(60))) > usual.limit).mean() <= 0.1
    stripes = torch.sin(torch.arange(64.0) * 1.5).expand(10, 1, 64, 64) + 0.2 * smooth(10)
    for other in (torch.randn(10, 1, 64, 64, generator=generator), stripes):
        assert (usual.distance(seen(other)) > usual.limit).all()
