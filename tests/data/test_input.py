from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sslmed.config import DataError, UsageError
from sslmed.data.input import check_channels, network_input, open_store, to_image
from sslmed.data.intensity import Intensity
from sslmed.data.modality import MODALITIES, with_windows
from sslmed.data.store import Store
from sslmed.data.views import letterbox, placed

SIZE = 32
XRAY, PHOTO = MODALITIES["xray"], MODALITIES["photo"]


def between(low: float, high: float) -> Intensity:
    return Intensity(low, high, (low + high) / 2, (high - low) / 4)


def test_network_input_pads_with_the_darkest_value() -> None:
    image = np.full((10, 40), 3000, np.uint16)
    tensor = network_input(image, between(1000, 3000), XRAY, 40, 1)
    assert tensor.shape == (1, 40, 40)
    assert tensor[0, 20, 20] == 2
    assert tensor[0, 0, 0] == -2


def test_grey_is_repeated_for_a_network_with_colour_input() -> None:
    image = np.random.default_rng(0).integers(0, 4096, (40, 40), dtype=np.uint16)
    one, three = (network_input(image, between(0, 4095), XRAY, SIZE, channels) for channels in (1, 3))
    assert three.shape == (3, SIZE, SIZE)
    assert torch.equal(three, one.expand(3, -1, -1))


def test_colour_goes_channels_first_and_never_into_a_grey_network() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 2] = 255
    tensor = network_input(image, between(0, 255), PHOTO, 8, 3)
    assert tensor.shape == (3, 8, 8)
    assert (tensor[2] > 2).all()
    assert (tensor[:2] < 0).all()
    with pytest.raises(UsageError, match=r"backbone\.in_chans is 1.*3-channel"):
        network_input(image, between(0, 255), PHOTO, 8, 1)


# Windows and slices.


class Volumes(NamedTuple):
    """As much of a store as is asked how many planes an image has."""

    channels: int
    depth: int

    @property
    def index(self) -> Any:
        return SimpleNamespace(channels=np.array([self.channels]))

    @property
    def scans(self) -> Any:
        return SimpleNamespace(depth=np.array([1, self.depth]))


@pytest.mark.parametrize(
    ("channels", "held", "windows", "slices", "words"),
    [
        (1, Volumes(1, 9), (), 1, None),
        (3, Volumes(1, 9), (), 1, None),  # a single plane is repeated
        (3, Volumes(1, 9), ("lung", "bone", "brain"), 1, None),
        (9, Volumes(1, 9), ("lung", "bone", "brain"), 3, None),
        (1, Volumes(1, 9), ("lung", "bone"), 1, r"in_chans is 1, but an image becomes 2 windows; set .*in_chans=2"),
        (3, Volumes(1, 9), ("lung", "bone"), 3, r"an image becomes 3 slices x 2 windows; set backbone\.in_chans=6"),
        (1, Volumes(1, 9), (), 5, r"an image becomes 5 slices; set backbone\.in_chans=5"),
        (1, Volumes(3, 1), (), 1, r"the store holds 3 channels; set backbone\.in_chans=3"),
        (3, Volumes(1, 1), (), 3, r"data\.slices is 3, but the store holds single images only"),
        (9, Volumes(3, 4), (), 3, r"data\.slices is 3, but the store holds images in colour"),
    ],
)
def test_the_planes_of_an_image_must_be_the_channels_of_the_network(
    channels: int, held: Any, windows: tuple[str, ...], slices: int, words: str | None
) -> None:
    policy = with_windows(MODALITIES["ct"], windows)
    if words is None:
        check_channels(channels, held, policy, slices)
        return
    with pytest.raises(UsageError, match=words):
        check_channels(channels, held, policy, slices)


def test_windows_and_slices_are_planes_of_the_input() -> None:
    stack = np.random.default_rng(0).integers(-1024, 1024, (20, 24, 3)).astype(np.int16)
    policy = with_windows(MODALITIES["ct"], ("lung", "bone"))
    intensity = policy.intensity(stack)
    found = network_input(stack, intensity, policy, 32, 6)
    assert found.shape == (6, 32, 32)
    for number, name in enumerate(("lung", "bone")):
        for place in range(3):
            alone = with_windows(MODALITIES["ct"], (name,))
            expected = network_input(stack[..., place], intensity, alone, 32, 1)
            assert torch.equal(found[3 * number + place], expected[0])
    assert (found[:, 0, 0] == -2).all()  # what the letterbox adds is air
    with pytest.raises(UsageError, match=r"in_chans is 3.*6-channel"):
        network_input(stack, intensity, policy, 32, 3)


def test_a_store_of_another_policy_is_not_opened(phantom_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store(phantom_store.path).fingerprint == phantom_store.fingerprint
    other = replace(XRAY, record={"percentiles": [2, 98], "of": "image"})
    monkeypatch.setitem(MODALITIES, "xray", other)
    with pytest.raises(DataError, match=r"made by another policy for xray.*percentiles \[0.5, 99.5\] there, \[2, 98\]"):
        open_store(phantom_store.path)


# Back to the image.

SHAPES = [(200, 300), (300, 200), (96, 96), (41, 40), (700, 90), (64, 512), (30, 25)]


@pytest.mark.parametrize("size", [96, (64, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_that_went_through_the_letterbox_comes_back(shape: tuple[int, int], size: Any) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    away = ((rows / shape[0] - 0.45) / 0.35) ** 2 + ((columns / shape[1] - 0.55) / 0.35) ** 2
    mask = away < 1
    one_hot = np.stack([~mask, mask], axis=-1).astype(np.float32)
    scores = letterbox(one_hot, size, fill=5.0).transpose(2, 0, 1)  # what is added must not be seen again
    back = to_image(scores, shape, size)
    assert back.shape == (2, *shape)
    assert back.dtype == torch.float32
    assert back.max() < 1.01
    found = back.argmax(dim=0).numpy() == 1
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.98


@pytest.mark.parametrize("size", [96, (64, 128)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_place_comes_back_to_itself(shape: tuple[int, int], size: Any) -> None:
    """Within half a pixel of the coarser of the two grids at the border, within a tenth inside."""
    places = np.stack(np.mgrid[: shape[0], : shape[1]], axis=-1).astype(np.float32)
    back = to_image(letterbox(places, size, fill=-1.0).transpose(2, 0, 1), shape, size).numpy()
    step = [max(1.0, whole / inside) for whole, inside in zip(shape, placed(shape, size)[2:], strict=True)]
    for axis in (0, 1):
        away = np.abs(back[axis] - places[..., axis])
        assert away.max() < step[axis] / 2
        edge = int(np.ceil(step[axis]))
        assert np.moveaxis(away, axis, 0)[edge:-edge].max() < 0.1


def test_scores_are_resized_as_opencv_does() -> None:
    """Pixel centres at half numbers: worked out by hand for one row of two pixels, made twice as wide."""
    back = to_image(torch.tensor([[[0.0, 1.0]]]).expand(1, 16, 2).repeat_interleave(8, dim=2), (16, 16), 16)
    assert torch.equal(back[0, 0], torch.tensor([0.0] * 8 + [1.0] * 8))  # of the size itself: as it is
    picture = torch.arange(16.0).expand(1, 16, 16)
    doubled = to_image(picture, (32, 32), 16)[0, 0]
    assert doubled[:4].tolist() == [0.0, 0.25, 0.75, 1.25]
    stretched = letterbox(picture[0].numpy(), 32, fill=0)  # OpenCV's, an independent implementation
    np.testing.assert_allclose(to_image(picture, (32, 32), 16)[0].numpy(), stretched, atol=1e-5)


def test_scores_of_any_precision_come_back_on_their_device() -> None:
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert to_image(torch.ones(1, 16, 16, dtype=dtype), (5, 7), 16).dtype == expected
    frozen = np.ones((1, 16, 16), np.float32)
    frozen.setflags(write=False)
    assert to_image(frozen, (5, 7), 16).shape == (1, 5, 7)
    assert to_image(torch.ones(1, 16, 16, device="meta"), (5, 7), 16).device.type == "meta"
