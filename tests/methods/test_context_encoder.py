"""The context encoder: holes of the asked shape and area, a loss there alone, in-paintings better than fillings."""

import numpy as np
import pytest
import torch
from courses import course
from pydantic import ValidationError
from restorations import HELD_OUT, batch, noise, small, trained, waves
from scipy import ndimage

from sslmed.data.modality import MODALITIES
from sslmed.methods.context_encoder import ContextEncoderConfig, fill_in_mean, in_painting_error

HOLES = ("random", "blocks", "centre")
every_kind = pytest.mark.parametrize("holes", HOLES)


def nearest(images: torch.Tensor, holes: torch.Tensor) -> torch.Tensor:
    """Each hidden pixel as its nearest seen one."""
    filled = images.clone()
    for n, hole in enumerate(holes.numpy()):
        _, places = ndimage.distance_transform_edt(hole, return_indices=True)
        filled[n, 0] = images[n, 0][places[0], places[1]]
    return filled


def error(found: torch.Tensor, images: torch.Tensor, holes: torch.Tensor) -> float:
    return float((found - images)[:, 0][holes].square().mean())


def test_held_out_holes_are_painted_better_than_by_their_mean_or_nearest_neighbours() -> None:
    method, data = small("context_encoder"), batch(waves(16, seed=1), HELD_OUT)
    images, holes = data.views[0], method.holes(data)
    plain = [error(filled, images, holes) for filled in (fill_in_mean(images, holes), nearest(images, holes))]
    trained(method)
    with torch.no_grad():
        outputs = method.loss(data)
        painted = method.pictures(data)[:, 2]
    first = error(painted, images[:8], holes[:8])
    assert first < 0.3 * min(plain)
    assert outputs["loss"] < 0.3 * min(plain)
    assert outputs["gain_db"] > 5


@every_kind
def test_holes_have_their_area(holes: str) -> None:
    method = small("context_encoder", size=64, holes=holes)
    area = method.holes(batch(torch.zeros(100, 1, 64, 64))).float().mean(dim=(1, 2))
    if holes == "centre":
        assert (area == 0.25).all()
    else:
        assert area.min() >= 0.2 - 1e-3
        assert area.max() <= 0.3 + 1e-3
        assert len(area.unique()) > 10
    if holes == "random":
        assert area.min() < 0.21
        assert area.max() > 0.29


@every_kind
@pytest.mark.parametrize("overlap", [None, 0, 2])
def test_the_gradient_is_in_the_holes_and_their_overlap_alone(holes: str, overlap: int | None) -> None:
    method, data = small("context_encoder", holes=holes, overlap=overlap), batch(noise(3, 1, 32, 32))
    seen: list[torch.Tensor] = []
    method.restorer.register_forward_hook(lambda _, __, output: (output.retain_grad(), seen.append(output))[1])
    method.loss(data)["loss"].backward()
    reached, hidden = seen[0].grad[:, 0] != 0, method.holes(data)
    width = {None: 1 if holes == "centre" else 0}.get(overlap, overlap)
    wider = np.stack([ndimage.maximum_filter(each, 2 * width + 1, mode="constant") for each in hidden.numpy()])
    assert torch.equal(reached, torch.from_numpy(wider))
    assert method.overlap((32, 32)) == width


def test_overlap_counts_ten_times() -> None:
    painted, images = noise(1, 1, 4, 4).double(), torch.zeros(1, 1, 4, 4).double()
    holes, overlap = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    holes[0, 0, 0], overlap[0, 0, 1] = True, True
    p, q = painted[0, 0, 0, 0].item(), painted[0, 0, 0, 1].item()
    found = in_painting_error(painted, images, holes, overlap, 10.0).item()
    assert found == pytest.approx((p**2 + 10 * q**2) / 11)


def test_hidden_pixels_are_not_seen() -> None:
    method, data = small("context_encoder").eval(), batch(noise(3, 1, 32, 32))
    images, holes = data.views[0], method.holes(data)
    other = torch.where(holes[:, None], 1000.0, images)
    assert torch.equal(fill_in_mean(images, holes), fill_in_mean(other, holes))
    filled = fill_in_mean(images, holes)
    for n in range(3):
        torch.testing.assert_close(filled[n, 0][holes[n]], images[n, 0][~holes[n]].mean().expand(int(holes[n].sum())))
    assert torch.equal(filled.masked_select(~holes[:, None]), images.masked_select(~holes[:, None]))


def test_settings_that_do_nothing_are_named() -> None:
    xray = MODALITIES["xray"]
    assert "hides a quarter" in small("context_encoder", holes="centre", area=(0.1, 0.2)).notes(xray, course(64))[0]
    (first,) = small("context_encoder", holes="blocks").notes(xray, course(64))
    assert "blocks hide method.area's first number, 0.2," in first
    assert not small("context_encoder", holes="blocks", area=(0.3, 0.3)).notes(xray, course(64))
    assert "without method.overlap" in small("context_encoder", overlap_weight=5.0).notes(xray, course(64))[0]
    assert not small("context_encoder", overlap=3, overlap_weight=5.0).notes(xray, course(64))
    with pytest.raises(ValidationError, match="the smaller first"):
        ContextEncoderConfig(area=(0.3, 0.2))


@every_kind
def test_images_of_a_few_pixels(holes: str) -> None:
    method = small("context_encoder", holes=holes)
    for size in ((1, 1), (3, 5), (7, 2)):
        hidden = method.holes(batch(torch.zeros(4, 1, *size)))
        assert hidden.any(dim=2).any(dim=1).all()
        assert torch.isfinite(fill_in_mean(noise(4, 1, *size), hidden)).all()
