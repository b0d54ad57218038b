"""What all restorative methods do alike: keyed damage of any size, any network, pictures, a decoder to go on with."""

from dataclasses import replace

import pytest
import torch
from courses import course
from restorations import batch, noise, small

from sslmed.data.geometry_view import GEOMETRY, geometry_view
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.methods import METHODS
from sslmed.models.segmenters import PixelDecoder

NAMES = ("denoising", "context_encoder", "context_restoration", "models_genesis")
every = pytest.mark.parametrize("name", NAMES)


def damaged(method: torch.nn.Module, data: Batch) -> torch.Tensor:
    """What the network is given."""
    given: list[torch.Tensor] = []
    maps = method.backbone.maps
    method.backbone.maps = lambda images: given.append(images) or maps(images)
    method.loss(data)
    del method.backbone.maps
    return given[0]


@every
def test_damage_is_keyed_by_seed_epoch_and_id_alone(name: str) -> None:
    method, data = small(name), batch(noise(6, 1, 32, 32))
    first = damaged(method, data)
    half = replace(data, views=[data.views[0][3:]], ids=data.ids[3:])
    assert torch.equal(damaged(method, half), first[3:])
    assert torch.equal(damaged(method, data), first)
    assert not torch.equal(damaged(method, replace(data, epoch=1)), first)
    assert not torch.equal(damaged(method, replace(data, seed=4)), first)
    twins = replace(data, views=[data.views[0][:1].expand(6, -1, -1, -1).clone()])
    assert len(damaged(method, twins).flatten(1).unique(dim=0)) > 3, "each image its own"


@every
@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_shape_and_depth(name: str, size: tuple[int, int], channels: int) -> None:
    method = small(name, size=size, channels=channels)
    outputs = method.loss(batch(noise(3, channels, *size)))
    outputs["loss"].backward()
    assert torch.isfinite(outputs["loss"])
    assert outputs["embeddings"].shape == (3, method.backbone.num_features)


@every
@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext"])
def test_other_networks(name: str, backbone: str) -> None:
    method = small(name, backbone)
    method.loss(batch(noise(2, 1, 32, 32)))["loss"].backward()
    without = {key for key, value in method.named_parameters() if value.grad is None}
    assert without == method.without_gradient


@every
@pytest.mark.parametrize("level", [-2.0, 0.0, 1e4])
def test_flat_images_are_finite_in_float_and_bf16(name: str, level: float) -> None:
    method, data = small(name), batch(torch.full((3, 1, 32, 32), level))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = method.loss(data)
        assert torch.isfinite(outputs["loss"])
        assert torch.isfinite(outputs["gain_db"])
        assert outputs["loss"].dtype == torch.float32


@every
def test_damage_is_the_same_under_bf16_and_in_any_precision(name: str) -> None:
    method, data = small(name), batch(noise(3, 1, 32, 32))
    exact = damaged(method, data)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(damaged(method, data), exact)
    wide = damaged(method.double(), replace(data, views=[data.views[0].double()]))
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), exact, atol=1e-4, rtol=1e-4)


@every
def test_the_images_themselves_stay_as_they_are(name: str) -> None:
    data = batch(noise(3, 1, 32, 32))
    kept = data.views[0].clone()
    small(name).loss(data)
    assert torch.equal(data.views[0], kept)


@every
def test_pictures_are_original_damaged_and_restored(name: str) -> None:
    method, data = small(name).eval(), batch(noise(10, 1, 32, 32))
    pictures = method.pictures(data)
    assert pictures.shape == (8, 3, 1, 32, 32)
    assert torch.equal(pictures[:, 0], data.views[0][:8])
    assert torch.equal(pictures[:, 1], damaged(method, data)[:8])
    assert torch.isfinite(pictures).all()


@every
def test_the_view_moves_the_image_and_no_more(name: str) -> None:
    xray = MODALITIES["xray"]
    method = small(name)
    assert method.views(xray) == (geometry_view(xray),)
    assert not method.notes(xray, course(64))
    (note,) = method.notes(with_views(xray, {"gamma": 0.1}), course(64))
    assert note == f"of views, {name} uses {', '.join(GEOMETRY)} alone: views.gamma has no effect"
    (note,) = small(name, "test_convnext").notes(xray, course(64))
    assert f"{name} trains the backbone's maps; 2 tensors behind them stay as they are" in note


def test_these_methods_alone_have_a_decoder_to_go_on_with() -> None:
    for name in METHODS:
        assert (METHODS[name].exported_decoder.fget(_Any()) is not None) == (name in NAMES)
    method = small("denoising")
    assert method.exported_decoder.keys() == method.restorer.reusable.keys()


class _Any:
    """Stands for a method whose restorer is one."""

    restorer = PixelDecoder(small("denoising").backbone.levels, 1)
