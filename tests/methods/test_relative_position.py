"""Relative position: which patch is where, keyed draws, heads; the pair is what is learnt. Its loss: tests/parity."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from courses import course
from torch import nn

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES
from sslmed.keyed_rng import rng
from sslmed.methods.relative_position import (
    RelativePosition,
    RelativePositionConfig,
    all_places,
    one_place,
    with_centre,
)
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.patch_grid import features

SMALL = {"hidden": 64, "dropout": 0.0}


def method(**settings: Any) -> RelativePosition:
    torch.manual_seed(0)
    return RelativePosition(
        RelativePositionConfig(**SMALL | settings), build(BackboneConfig(name="test_resnet"), 48, 0)
    )


def batch(images: torch.Tensor, epoch: int = 0) -> Batch:
    rows = torch.arange(len(images))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def rolled_anatomy(count: int, first: int = 0) -> torch.Tensor:
    """One picture of nine textures, rolled by whole cells, another way in each image: a patch alone tells no place."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    place = (rows // 16) * 3 + columns // 16
    texture = torch.sin((0.3 + 0.15 * place) * (rows % 16)) + torch.sin((1.6 - 0.15 * place) * (columns % 16))
    noise = 0.2 * torch.randn(count, 1, 48, 48, generator=torch.Generator().manual_seed(first))
    moved = [divmod((number + first) % 9, 3) for number in range(count)]
    return noise + torch.stack([texture.roll((16 * down, 16 * right), (0, 1))[None] for down, right in moved])


def test_the_eight_places_are_row_by_row_around_the_middle() -> None:
    cells = with_centre(all_places(2))
    assert cells.tolist() == [[4, 0, 1, 2, 3, 5, 6, 7, 8]] * 2
    assert with_centre(torch.tensor([[3], [4]])).tolist() == [[4, 3], [4, 5]], "left and right of the middle"


def test_a_random_place_is_keyed_by_seed_epoch_and_image() -> None:
    data = batch(torch.zeros(400, 1, 3, 3))
    places = one_place(data)
    assert places.tolist() == [[int(rng(3, 0, row, "relative position").integers(8))] for row in range(400)]
    assert np.bincount(places[:, 0], minlength=8).min() > 25
    assert one_place(replace(data, ids=data.ids[[9, 300]])).tolist() == places[[9, 300]].tolist()
    assert one_place(replace(data, epoch=1)).tolist() != places.tolist()


@pytest.mark.parametrize(("all_eight", "patches", "pairs"), [(True, 9, 8), (False, 2, 1)])
def test_every_patch_is_seen_once_by_itself_and_pairs_meet_behind(all_eight: bool, patches: int, pairs: int) -> None:
    task, data = method(all_eight=all_eight), batch(rolled_anatomy(4))
    shapes: list[tuple[int, ...]] = []
    for part in (task.backbone, task.projector):
        part.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    outputs = task.loss(data)
    width = task.backbone.num_features
    assert shapes == [(4 * patches, 1, *task.grid.patch((48, 48))), (4 * pairs, 2 * width)]
    assert outputs["embeddings"].shape == (4, width)


def test_the_head_is_the_references() -> None:
    task = method(hidden=4096, dropout=0.5)
    assert [type(part) for part in task.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout]
    first, norm, _, dropout = task.projector
    assert (norm.momentum, dropout.p, task.classifier.out_features) == (0.003, 0.5, 8)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert task.classifier.weight.std().item() == pytest.approx(0.005, rel=0.02)
    assert (RelativePositionConfig().hidden, RelativePositionConfig().dropout) == (4096, 0.5)


def test_the_pair_is_what_it_learns() -> None:
    """On images that it has not seen, where neither patch alone tells; with another image's neighbour it is chance."""
    task = method()
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    for epoch in range(60):
        outputs = task.loss(batch(rolled_anatomy(18, 100 * epoch), epoch))
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    for norm in task.modules():  # the reference's slow statistics would take hundreds of steps
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = None
            norm.reset_running_stats()
    with torch.no_grad():
        for epoch in range(4):
            task.loss(batch(rolled_anatomy(90, 9000 + epoch), epoch))
    task.eval()
    held = batch(rolled_anatomy(180, 7), epoch=99)
    with torch.no_grad():
        patches = task.grid.cut(held.views[0], 0, 0, held.ids, "x")
        seen = features(task.backbone, patches[:, with_centre(all_places(1))[0]])
        centres, answers = seen[:, :1].expand(-1, 8, -1), all_places(180).flatten()
        right = (task.logits(centres, seen[:, 1:]).argmax(dim=1) == answers).float().mean()
        others = seen[torch.randperm(180, generator=torch.Generator().manual_seed(0)), 1:]
        shuffled = (task.logits(centres, others).argmax(dim=1) == answers).float().mean()
    assert right > 0.9
    assert shuffled < 0.25, "chance is 0.125"


def test_its_view_is_never_mirrored() -> None:
    photo = MODALITIES["photo"]
    (view,) = method().views(photo)
    assert (view.hflip, view.vflip, view.rot90, view.grey) == (0.0, 0.0, 0.0, 0.66)
    kept = {"crop", "aspect", "brightness", "contrast", "colour", "blur"}
    assert all(getattr(view, knob) == getattr(photo.view, knob) for knob in kept)


def test_it_says_that_tissue_has_no_places() -> None:
    (warning,) = method().notes(MODALITIES["histology"], course(64))
    assert "warning: histology images have no up and down" in warning
    assert "relative_position is weak" in warning


def test_images_too_small_are_refused_with_the_least_size() -> None:
    with pytest.raises(UsageError, match=r"relative_position cuts images of 24 x 24 .*data.size=30 or more"):
        method().check(course(shape=(1, 24, 24)))
