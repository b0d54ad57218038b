"""Rotation: labels and pixels, keyed draws, what gives the answer away. Its loss: tests/parity."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from courses import course

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.keyed_rng import rng
from sslmed.methods.rotation import Rotation, RotationConfig, all_turns, inside_circle, one_turn
from sslmed.models.backbones import BackboneConfig, build

XRAY = MODALITIES["xray"]
IMAGES = torch.randn(5, 2, 16, 16, generator=torch.Generator().manual_seed(0))


def batch(images: torch.Tensor, ids: list[int] | None = None, epoch: int = 0) -> Batch:
    rows = torch.tensor(ids if ids is not None else range(len(images)))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def method(**settings: bool) -> Rotation:
    torch.manual_seed(0)
    return Rotation(RotationConfig(**settings), build(BackboneConfig(name="test_resnet"), 32, 0))


def test_all_four_rotations_equal_rot90_pixel_by_pixel() -> None:
    turned, labels = all_turns(IMAGES)
    assert turned.shape == (20, 2, 16, 16)
    for row, (image, label) in enumerate(zip(turned, labels, strict=True)):
        assert torch.equal(image, torch.rot90(IMAGES[row % 5], int(label), (1, 2)))
    assert labels.bincount().tolist() == [5] * 4


def test_one_rotation_is_keyed_by_seed_epoch_and_image() -> None:
    images = IMAGES[:1].expand(200, -1, -1, -1)
    turned, labels = one_turn(images, batch(images))
    assert all(torch.equal(turned[i], torch.rot90(images[i], int(labels[i]), (1, 2))) for i in range(200))
    assert labels.tolist() == [int(rng(3, 0, row, "rotation").integers(4)) for row in range(200)]
    assert np.bincount(labels, minlength=4).min() > 30
    again = one_turn(images[:3], batch(images[:3], ids=[7, 100, 2]))[1]
    assert again.tolist() == labels[[7, 100, 2]].tolist(), "whatever else is in the batch"
    assert one_turn(images, batch(images, epoch=1))[1].tolist() != labels.tolist()


def test_the_batch_is_four_times_as_large_unless_told_otherwise() -> None:
    seen: list[int] = []
    for all_four in (True, False):
        task = method(all_four=all_four)
        task.classifier.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        outputs = task.loss(batch(torch.randn(3, 1, 32, 32)))
        assert outputs["embeddings"].shape == (3, task.backbone.num_features)
    assert seen == [12, 3]


def test_a_marker_in_the_corner_tells_the_rotation_and_the_circle_removes_it() -> None:
    marked = torch.zeros(1, 1, 32, 32)
    marked[..., :4, :4] = 1
    turned, _ = all_turns(marked)
    assert not torch.equal(turned[0], turned[1])
    masked, _ = all_turns(inside_circle(marked))
    assert all(torch.equal(masked[0], image) for image in masked)
    # the mask itself says nothing: it is the same in all four
    full, _ = all_turns(inside_circle(torch.ones(1, 1, 33, 33)))
    assert all(torch.equal(full[0], image) for image in full)
    assert 0.75 < full[0].mean() < 0.8  # pi / 4


def test_its_view_never_contradicts_the_label() -> None:
    loose = replace(XRAY, view=XRAY.view.model_copy(update={"rotate": 90.0, "rot90": 1.0, "vflip": 0.5}))
    (view,) = method().views(loose)
    assert (view.rot90, view.vflip, view.rotate) == (0.0, 0.0, 15.0)


def test_it_warns_where_rotation_cannot_be_told_or_is_given_away() -> None:
    (marker,) = method().notes(XRAY, course(64))
    assert "warning" in marker
    assert "method.circle=true" in marker
    assert not method(circle=True).notes(XRAY, course(64))
    (degenerate,) = method(circle=True).notes(replace(XRAY, name="tissue", upright=False), course(64))
    assert "tissue images have no up and down" in degenerate
    unsure = method().notes(MODALITIES["photo"], course(64))
    assert ["note: where" in note for note in unsure] == [True, True]


def test_it_says_which_settings_of_views_it_limits() -> None:
    photo = with_views(MODALITIES["photo"], {"rotate": 40, "vflip": 0.5})
    assert "limits views.rotate, views.vflip" in method(circle=True).notes(photo, course(64))[-1]


def test_images_must_be_square() -> None:
    with pytest.raises(UsageError, match=r"square images, not 16 x 32"):
        method().loss(batch(torch.zeros(2, 1, 16, 32)))
