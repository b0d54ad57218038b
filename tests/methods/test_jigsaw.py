"""Jigsaw: orders and their inverses, keyed draws, heads; the arrangement is what is learnt. Its loss: tests/parity."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from courses import course
from torch import nn

from sslmed.config import UsageError
from sslmed.data.loading import Batch
from sslmed.data.modality import MODALITIES, with_views
from sslmed.keyed_rng import rng
from sslmed.methods.jigsaw import Jigsaw, JigsawConfig, arranged, drawn_orders
from sslmed.models.backbones import BackboneConfig, build
from sslmed.models.masking import patchify, unpatchify
from sslmed.models.patch_grid import features
from sslmed.models.permutations import maximal_hamming

XRAY = MODALITIES["xray"]


def method(backbone: BackboneConfig | None = None, size: int = 48, **settings: Any) -> Jigsaw:
    torch.manual_seed(0)
    network = build(backbone or BackboneConfig(name="test_resnet"), size, 0)
    return Jigsaw(JigsawConfig(**{"hidden": 32} | settings), network)


def batch(images: torch.Tensor, epoch: int = 0) -> Batch:
    rows = torch.arange(len(images))
    return Batch(views=[images], target=rows, ids=rows, groups=rows, seed=3, epoch=epoch)


def anatomy(count: int) -> torch.Tensor:
    """Images whose nine places look different, each in its own texture, alike in all images but for noise."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    place = (rows // 16) * 3 + columns // 16
    texture = torch.sin((0.3 + 0.15 * place) * rows) + torch.sin((1.6 - 0.15 * place) * columns)
    return texture + 0.3 * torch.randn(count, 1, 48, 48, generator=torch.Generator().manual_seed(1))


def test_patches_arranged_and_put_back_are_the_image_to_the_bit() -> None:
    images = torch.randn(100, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    patches = patchify(images, (10, 10))
    table = torch.from_numpy(maximal_hamming(100, 9).astype("int64"))
    shown = arranged(patches, table)
    assert not (shown == patches).all(dim=2).all(dim=1).any(), "every image is in disorder"
    assert torch.equal(unpatchify(arranged(shown, table.argsort(dim=1)), (3, 3), (10, 10)), images)
    for row, order in enumerate(table.tolist()):
        assert all(torch.equal(shown[row, k], patches[row, place]) for k, place in enumerate(order))


def test_orders_are_keyed_by_seed_epoch_and_image() -> None:
    data = batch(torch.zeros(500, 1, 3, 3))
    orders = drawn_orders(data, 10)
    assert orders.tolist() == [int(rng(3, 0, row, "jigsaw").integers(10)) for row in range(500)]
    assert np.bincount(orders, minlength=10).min() > 25
    few = replace(data, ids=data.ids[[7, 400]])
    assert drawn_orders(few, 10).tolist() == orders[[7, 400]].tolist()
    assert drawn_orders(replace(data, epoch=1), 10).tolist() != orders.tolist()


def test_the_network_sees_one_patch_at_a_time_and_the_classifier_all_in_order() -> None:
    task, data = method(), batch(anatomy(2))
    shapes: list[tuple[int, ...]] = []
    for part in (task.backbone, task.projector, task.classifier):
        part.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    outputs = task.loss(data)
    assert shapes == [(18, 1, 12, 12), (18, task.backbone.num_features), (2, 9 * 32)]
    assert outputs["embeddings"].shape == (2, task.backbone.num_features)
    assert [type(part) for part in task.projector] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert task.classifier.out_features == 100
    assert (JigsawConfig().hidden, JigsawConfig().permutations) == (1000, 100)


def test_the_arrangement_is_what_it_learns() -> None:
    """On images that it has not seen; and nothing is left of it when the patches are shown in yet another order."""
    task = method(permutations=20)
    optimizer = torch.optim.AdamW(task.parameters(), lr=2e-3)
    train, found = anatomy(16), []
    for epoch in range(45):
        outputs = task.loss(batch(train, epoch))
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        found.append(outputs["loss"].item())
    assert found[-1] < 0.3 * found[0]
    task.eval()
    held = batch(torch.roll(anatomy(200), 3, dims=0), epoch=99)
    held.ids += 1000
    orders = drawn_orders(held, 20)
    patches = task.grid.cut(held.views[0], held.seed, held.epoch, held.ids, "jigsaw jitter")
    with torch.no_grad():
        seen = features(task.backbone, arranged(patches, task.permutations[orders]))
        right = (task.logits(seen).argmax(dim=1) == orders).float().mean()
        again = torch.rand(200, 9, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
        shuffled = (task.logits(arranged(seen, again)).argmax(dim=1) == orders).float().mean()
    assert right > 0.9
    assert shuffled < 0.15, "chance is 0.05"


def test_the_set_travels_with_the_checkpoint() -> None:
    task = method(permutations=20)
    assert torch.equal(task.state_dict()["permutations"], torch.from_numpy(maximal_hamming(20, 9).astype("int64")))


def test_its_view_stays_upright_and_mostly_without_colour() -> None:
    photo = MODALITIES["photo"]
    loose = replace(photo, view=photo.view.model_copy(update={"rotate": 90.0, "rot90": 1.0, "vflip": 0.5}))
    (view,) = method().views(loose)
    assert (view.rot90, view.vflip, view.rotate, view.grey) == (0.0, 0.0, 15.0, 0.66)
    assert view.hflip == photo.view.hflip, "VISSL mirrors too"
    assert method().views(XRAY)[0].grey == 0, "there is no colour"


def test_it_says_where_it_is_weak_or_the_solution_shows() -> None:
    (marked,) = method().notes(XRAY, course(64))
    assert "burned-in text" in marked
    (tissue,) = method().notes(MODALITIES["histology"], course(64))
    assert "warning: histology images have no up and down" in tissue
    assert [note.partition(":")[0] for note in method().notes(MODALITIES["photo"], course(64))] == ["note", "note"]
    assert method().notes(MODALITIES["ct"], course(64)) == []
    steep = with_views(MODALITIES["ct"], {"rotate": 40})
    assert "jigsaw limits views.rotate" in method().notes(steep, course(64))[-1]


def test_images_too_small_for_nine_patches_are_refused_with_the_least_size() -> None:
    with pytest.raises(UsageError, match=r"jigsaw cuts images of 24 x 24 into patches of 6 x 6.*data.size=27 or more"):
        method().check(course(shape=(1, 24, 24)))
    with pytest.raises(UsageError, match="vit_tiny_patch16_224 is built for whole images"):
        method(BackboneConfig(name="vit_tiny_patch16_224", patch=16)).check(course(shape=(1, 48, 48)))


def test_patches_must_not_vanish() -> None:
    with pytest.raises(ValueError, match=r"gap and jitter are 0.3 and 0.3; allowed: at most 0.5 together"):
        JigsawConfig(gap=0.3, jitter=0.3)
