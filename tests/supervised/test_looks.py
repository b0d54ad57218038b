"""Ways to look at an image, and back."""

from typing import Any

import pytest
import torch

from sslmed.supervised.looks import Look, answered, found, looks

IMAGES = torch.arange(2 * 1 * 6 * 6, dtype=torch.float32).reshape(2, 1, 6, 6)


@pytest.mark.parametrize(
    ("mirrors", "square", "count"),
    [
        ((), True, 3),  # the image and two smaller ones
        (("hflip",), True, 2),
        (("hflip", "vflip"), True, 4),
        (("hflip", "vflip", "rot90"), True, 8),  # all symmetries of a square
        (("rot90",), False, 2),  # of a rectangle only half a turn
        (("rot90",), True, 4),
        (("vflip",), False, 2),
    ],
)
def test_every_look_is_another_and_the_image_comes_first(mirrors: tuple[str, ...], square: bool, count: int) -> None:
    several = looks(mirrors, square)
    assert several[0] == Look()
    assert len(set(several)) == len(several) == count


@pytest.mark.parametrize("mirrors", [("hflip",), ("vflip",), ("rot90",), ("hflip", "vflip", "rot90")])
def test_back_undoes_there(mirrors: tuple[str, ...]) -> None:
    seen = [look.there(IMAGES) for look in looks(mirrors, square=True)]
    for look, turned in zip(looks(mirrors, square=True), seen, strict=True):
        torch.testing.assert_close(look.back(turned), IMAGES, rtol=0, atol=0)
    assert len({tuple(each.flatten().tolist()) for each in seen}) == len(seen), "each shows something else"


def test_hflip_mirrors_columns_and_vflip_rows() -> None:
    torch.testing.assert_close(looks(("hflip",), True)[1].there(IMAGES), IMAGES.flip(3))
    torch.testing.assert_close(looks(("vflip",), True)[1].there(IMAGES), IMAGES.flip(2))


def test_a_smaller_image_comes_back_in_its_place() -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    images = torch.stack([rows, columns])[None]
    for look in looks((), square=False)[1:]:
        back = look.back(look.there(images))
        assert look.scale < 1
        torch.testing.assert_close(back[..., 2:-2, 2:-2], images[..., 2:-2, 2:-2], rtol=0, atol=0.05)


def test_answers_are_means_over_looks() -> None:
    seen = looks(("hflip",), True)

    def left_half(images: torch.Tensor) -> torch.Tensor:
        return images[..., :3].mean(dim=(2, 3))

    torch.testing.assert_close(answered(left_half, IMAGES, seen), IMAGES.mean(dim=(2, 3)))
    torch.testing.assert_close(answered(lambda images: images * 2, IMAGES, seen), IMAGES * 2)


# Boxes.

EVERY = [Look(mirrored, turns) for mirrored in (False, True) for turns in range(4)]
NONE = [0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def painted(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """(1, 1, H, W): rectangles of the values 1, 2, and so on."""
    image = torch.zeros(1, 1, *size)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        image[..., top:bottom, left:right] = number
    return image


def finder(images: torch.Tensor) -> torch.Tensor:
    """(N, 4, 6): the box around each rectangle; the class is its number, the score less with it."""
    rows = torch.tensor([[NONE] * 4] * len(images))
    for own, image in zip(rows, images[:, 0], strict=True):
        for at, value in enumerate(sorted(set(image.round().flatten().tolist()) - {0.0})):
            down, across = torch.nonzero(image.round() == value, as_tuple=True)
            box = [across.min(), down.min(), across.max() + 1, down.max() + 1]
            own[at] = torch.tensor([*map(float, box), 0.9 - 0.1 * value, value])
    return rows


@pytest.mark.parametrize("size", [(12, 12), (12, 20), (21, 8)], ids=str)
@pytest.mark.parametrize("look", EVERY, ids=str)
def test_boxes_of_every_turn_and_mirroring_come_back(look: Look, size: tuple[int, int]) -> None:
    boxes = [(1, 2, 4, 9), (5, 0, 8, 3)]
    images = painted(size, *boxes)
    seen = finder(look.there(images))
    back = look.boxes_back(seen, size)
    assert back[0, :2, :4].tolist() == [list(each) for each in boxes]
    assert torch.equal(back[..., 4:], seen[..., 4:])
    if look != Look():
        assert not torch.equal(seen[..., :4], back[..., :4])


@pytest.mark.parametrize("scale", [0.5, 0.95])
@pytest.mark.parametrize("size", [(200, 120), (120, 200)], ids=str)
def test_boxes_of_a_smaller_image_come_back_to_a_pixel(size: tuple[int, int], scale: float) -> None:
    look = Look(scale=scale)
    for box in ((10, 20, 50, 100), (70, 5, 110, 45)):
        back = look.boxes_back(finder(look.there(painted(size, box))), size)
        torch.testing.assert_close(back[0, 0, :4], torch.tensor(box).float(), atol=1 / scale, rtol=0)
    exact = torch.tensor([[[size[1] / 2, size[0] / 2, size[1] / 2 + 10 * scale, size[0] / 2 + 20 * scale, 0.5, 0.0]]])
    expected = [size[1] / 2, size[0] / 2, size[1] / 2 + 10, size[0] / 2 + 20]
    torch.testing.assert_close(look.boxes_back(exact, size)[0, 0, :4], torch.tensor(expected))


def test_all_looks_together_say_each_box_once() -> None:
    images = torch.cat(
        [painted((16, 16), (1, 2, 6, 9), (8, 3, 12, 15)), painted((16, 16)), painted((16, 16), (0, 0, 4, 5))]
    )
    alone = finder(images)
    together = found(finder, images, EVERY, 0.6, 100)
    assert together.shape == (3, 4 * len(EVERY), 6)
    torch.testing.assert_close(together[:, :4], alone, rtol=0, atol=1e-5)
    assert (together[:, 4:] == torch.tensor(NONE)).all()


def test_one_look_says_what_the_network_says() -> None:
    images = painted((16, 16), (1, 2, 6, 9))
    assert torch.equal(found(finder, images, [Look()], 0.6, 100), finder(images))


def test_of_looks_that_differ_the_better_score_of_each_place_and_class_stays() -> None:
    """The image alone says the first rows, its mirror the others."""
    said = [
        [[2.0, 2, 8, 8, 0.6, 0], [10, 2, 14, 8, 0.5, 1], NONE],
        [[2.0, 2, 8, 7, 0.8, 0], [2, 2, 8, 8, 0.7, 1], [9, 10, 15, 12, 0.1, 0]],
    ]
    looked: list[torch.Tensor] = []

    def predict(images: torch.Tensor) -> torch.Tensor:
        looked.append(images)
        rows = torch.tensor([said[len(looked) - 1]])
        return rows if len(looked) == 1 else Look(mirrored=True).boxes_back(rows, (16, 16))

    together = found(predict, painted((16, 16)), [Look(), Look(mirrored=True)], 0.6, 100)
    expected: list[Any] = [said[1][0], said[1][1], said[0][1], said[1][2], NONE, NONE]
    torch.testing.assert_close(together[0], torch.tensor(expected))
