"""Boxes on whole images: from the letterbox back to the image, in one pass and in tiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sslmed.config import DataError
from sslmed.data.input import network_input
from sslmed.data.intensity import Intensity
from sslmed.data.modality import named
from sslmed.heads.localization import Localization, LocalizationConfig
from sslmed.models.backbones import BackboneConfig, build
from sslmed.supervised.applying import Answer, Applied, boxes_on
from sslmed.supervised.looks import Look

NONE = [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
INTENSITY = Intensity(0, 255, 0, 255)


def rows(*found: list[float]) -> npt.NDArray[np.float32]:
    return np.array(found, np.float32).reshape(-1, 6)


def test_boxes_of_a_letterbox_lie_on_the_image_again() -> None:
    """An image of 40 x 80 lies in rows 16 to 48 of 64 x 64, at 0.8 of its size."""
    found = boxes_on(rows([8, 20, 24, 36, 0.9, 1], [0, 16, 64, 48, 0.8, 0], NONE), (40, 80), 64)
    np.testing.assert_allclose(found.xyxy, [[10, 5, 30, 25], [0, 0, 80, 40]], atol=1e-4)
    assert found.classes.tolist() == [1, 0]
    np.testing.assert_allclose(found.scores, [0.9, 0.8], rtol=1e-6)


def test_what_lies_beside_the_image_is_left_out_and_what_reaches_beyond_is_cut() -> None:
    beside, across, edge = [5, 2, 20, 15, 0.9, 0], [-3, 10, 20, 24, 0.8, 0], [4, 47.7, 20, 60, 0.7, 0]
    found = boxes_on(rows(beside, across, edge), (40, 80), 64)
    np.testing.assert_allclose(found.xyxy, [[0, 0, 25, 10]], atol=1e-4)
    assert len(boxes_on(rows(NONE, NONE), (40, 80), 64)) == 0
    assert len(boxes_on(rows(), (40, 80), 64)) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(8, 300), st.integers(8, 300), st.sampled_from([64, (48, 96), (100, 30)]), st.data())
def test_there_and_back_again(height: int, width: int, size: Any, data: st.DataObject) -> None:
    """The corners of a painted rectangle, after `network_input` and back, to a pixel of the input or of the image."""
    right, bottom = data.draw(st.integers(4, width)), data.draw(st.integers(4, height))
    left, top = data.draw(st.integers(0, right - 4)), data.draw(st.integers(0, bottom - 4))
    pixels = np.zeros((height, width), np.uint8)
    pixels[top:bottom, left:right] = 255
    seen = network_input(pixels, INTENSITY, named("xray"), size, 1)[0].numpy()
    bright = seen > (seen.max() + seen.min()) / 2
    across, down = np.flatnonzero(bright.any(axis=0)), np.flatnonzero(bright.any(axis=1))
    if not len(across) or seen.max() - seen.min() < 1e-3:
        return  # so much smaller that nothing is left of it, or bright all over
    found = boxes_on(rows([across[0], down[0], across[-1] + 1, down[-1] + 1, 0.5, 0]), (height, width), size)
    box = size if isinstance(size, tuple) else (size, size)
    pixel = max(1.0, max(height / box[0], width / box[1]))
    if (left, top, right, bottom) != (0, 0, width, height):
        np.testing.assert_allclose(found.xyxy, [[left, top, right, bottom]], atol=1.01 * pixel + 0.5)


class Bright(nn.Module):
    """In the place of a detector: the box around what is brighter than half, within an input of any size."""

    kind = "boxes"

    def __init__(self, stride: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.config = LocalizationConfig()
        self.stride = stride
        self.locates = False
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(tuple(images.shape))
        found = torch.tensor([[NONE] * 3] * len(images))
        for own, image in zip(found, images[:, 0], strict=True):
            down, across = torch.nonzero(image > 0, as_tuple=True)
            if len(down):
                box = [across.min(), down.min(), across.max() + 1, down.max() + 1]
                own[0] = torch.tensor([*map(float, box), 0.5 + len(down) / 1e5, 1.0])
        return found


def image(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[npt.NDArray[np.uint8], Intensity]:
    """Dark, with a bright rectangle; the mean of the intensity is between the two."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels, Intensity(0, 255, 127.5, 60)


def applied(head: Any, size: Any = 64, **changes: Any) -> Applied:
    return Applied(head, named("xray"), size, 1, **changes)


def only(answers: list[Answer]) -> npt.NDArray[np.float32]:
    (answer,) = answers
    assert answer.boxes is not None
    assert answer.labels is None
    assert answer.scores.size == 0
    return answer.boxes.xyxy


@pytest.mark.parametrize("looks", [(Look(),), (Look(), Look(mirrored=True)), (Look(turns=1), Look(turns=3))], ids=str)
@pytest.mark.parametrize("size", [64, (64, 64)])
def test_whole_images_of_any_shape(looks: tuple[Look, ...], size: Any) -> None:
    for height, width, box in ((128, 128, (20, 40, 60, 100)), (64, 128, (10, 4, 50, 40)), (256, 64, (8, 80, 40, 200))):
        found = only(list(applied(Bright(), size, looks=looks)([image(height, width, box)])))
        np.testing.assert_allclose(found, [box], atol=4)


def test_images_keep_their_order() -> None:
    boxes = [(4 * at, 4, 4 * at + 20, 24) for at in range(5)]
    answers = list(applied(Bright())([image(64, 64, box) for box in boxes]))
    assert [only([each]).tolist() for each in answers] == [[list(map(float, box))] for box in boxes]


@pytest.mark.parametrize("looks", [(Look(),), (Look(), Look(mirrored=True))], ids=str)
@pytest.mark.parametrize("box", [(90, 40, 110, 60), (0, 0, 12, 20), (140, 100, 160, 130), (40, 50, 64, 74)])
def test_tiles_find_an_object_in_its_own_resolution(box: Any, looks: tuple[Look, ...]) -> None:
    head = Bright()
    found = only(list(applied(head, tiles=True, looks=looks)([image(130, 160, box)])))
    assert found.tolist() == [list(map(float, box))]
    assert {shape[1:] for shape in head.sizes} == {(1, 64, 64)}


def test_tiles_of_a_shrunk_image_give_boxes_of_the_large_one() -> None:
    found = only(list(applied(Bright(), tiles=True, shrunk_to=80)([image(160, 200, (20, 40, 60, 100))])))
    np.testing.assert_allclose(found, [[20, 40, 60, 100]], atol=2)


def test_an_image_smaller_than_a_tile_is_refused() -> None:
    with pytest.raises(DataError, match="smaller than the model's tiles"):
        list(applied(Bright(), tiles=True)([image(40, 200, (1, 1, 9, 9))]))


@pytest.mark.parametrize("tiles", [False, True])
def test_a_real_head_is_left_as_it_came(tiles: bool) -> None:
    torch.manual_seed(0)
    backbone = build(BackboneConfig(name="test_resnet"), 64, 0)
    head = Localization(LocalizationConfig(width=16, depth=1, reducer=True), backbone, 2).train()
    ask: Callable[[], list[Answer]] = lambda: list(applied(head, tiles=tiles)([image(96, 128, (20, 20, 60, 70))]))  # noqa: E731
    before = {name: value.clone() for name, value in head.state_dict().items()}
    first, second = only(ask()), only(ask())
    assert head.training
    assert len(first) > 0
    np.testing.assert_array_equal(first, second)
    assert ((first >= 0) & (first <= [128, 96, 128, 96])).all()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
