"""Ways to look at an image, and back."""

import pytest
import torch

from sslmed.supervised.looks import Look, answered, looks

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
    found = looks(mirrors, square)
    assert found[0] == Look()
    assert len(set(found)) == len(found) == count


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
