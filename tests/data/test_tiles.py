import numpy as np
import pytest

from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.tiles import cut
from sslmed.keyed_rng import rng

WINDOW = (8, 12)


def places(height: int, width: int) -> np.ndarray:
    """Each pixel's row and column."""
    return np.stack(np.mgrid[:height, :width], axis=-1).astype(np.int16)


def tiles(pixels: np.ndarray, mask: np.ndarray | None, count: int, rot90: float = 0.0) -> list[np.ndarray]:
    return [cut(pixels, mask, WINDOW, rot90, rng(0, 0, number, "tile"))[0] for number in range(count)]


def test_a_tile_is_a_part_of_the_image_and_its_mask_the_same_part() -> None:
    pixels = places(20, 30)
    mask = (pixels[..., 0] * 7 + pixels[..., 1]).astype(np.uint8)
    for number in range(60):
        tile, part = cut(pixels, mask, WINDOW, 0.5, rng(0, 0, number, "tile"))
        assert tile.shape == (*WINDOW, 2)
        assert part is not None
        np.testing.assert_array_equal(part, (tile[..., 0] * 7 + tile[..., 1]).astype(np.uint8))
        assert len(np.unique(tile.reshape(-1, 2), axis=0)) == 96  # no pixel twice
        assert tile.reshape(-1, 2).max(axis=0).max() < 30


def test_it_lies_anywhere_alike() -> None:
    corners = np.array([tile[0, 0] for tile in tiles(places(11, 14), None, 1200)])
    counts = np.zeros((4, 3), int)
    np.add.at(counts, tuple(corners.T), 1)
    assert counts.shape == (11 - 8 + 1, 14 - 12 + 1)
    assert (counts > 60).all()  # 100 each, 4 standard deviations
    assert (counts < 140).all()


def test_an_image_of_the_size_of_the_tile_is_the_tile() -> None:
    pixels = places(*WINDOW)
    np.testing.assert_array_equal(tiles(pixels, np.ones(WINDOW, np.uint8), 1)[0], pixels)


def test_a_third_is_laid_on_foreground() -> None:
    """One pixel in 10,000: by chance a tile holds it in 1 % of cases."""
    pixels = places(100, 100)
    mask = np.zeros((100, 100), np.uint8)
    mask[40, 60] = 3
    at = [np.argwhere((tile == (40, 60)).all(axis=-1)) for tile in tiles(pixels, mask, 1500)]
    held = np.array([place[0] for place in at if len(place)])
    chance = 96 / (93 * 89)
    assert abs(len(held) / 1500 - (1 / 3 + 2 / 3 * chance)) < 0.045  # 3.6 standard deviations
    assert held.min(axis=0).tolist() == [0, 0]  # anywhere in the tile, not in its middle
    assert held.max(axis=0).tolist() == [7, 11]
    assert np.abs(held.mean(axis=0) - (3.5, 5.5)).max() < 0.6


def test_rare_classes_come_as_often_as_common_ones_and_void_never() -> None:
    pixels = places(100, 100)
    mask = np.zeros((100, 100), np.uint8)
    mask[:, 50:] = 1
    mask[80:, :50] = 255
    mask[40, 20] = 2
    held = np.mean([(tile == (40, 20)).all(axis=-1).any() for tile in tiles(pixels, mask, 1500)])
    assert abs(held - (1 / 6 + 2 / 3 * 96 / (93 * 89))) < 0.035
    void = np.where(mask == 255, mask, 0)
    plain = [tile[0, 0] for tile in tiles(pixels, np.zeros_like(mask), 300)]
    np.testing.assert_array_equal([tile[0, 0] for tile in tiles(pixels, void, 300)], plain)


def test_the_corners_of_the_image_are_foreground_too() -> None:
    for place in ((0, 0), (0, 29), (19, 0), (19, 29)):
        mask = np.zeros((20, 30), np.uint8)
        mask[place] = 1
        held = [(tile == place).all(axis=-1).any() for tile in tiles(places(20, 30), mask, 200)]
        assert 0.2 < np.mean(held) < 0.5


@pytest.mark.parametrize("shape", [(20, 30), (12, 12), (40, 12)])
def test_turns_are_equally_likely(shape: tuple[int, int]) -> None:
    turned = [turns_of(tile) for tile in tiles(places(*shape), None, 400, rot90=1)]
    assert min(turned.count(turns) for turns in range(4)) > 65
    assert {turns_of(tile) for tile in tiles(places(*shape), None, 50)} == {0}
    some = [turns_of(tile) for tile in tiles(places(*shape), None, 400, rot90=0.4)]
    assert 0.62 < np.mean(np.array(some) == 0) < 0.78  # 0.6 + 0.4 / 4


def test_where_there_is_no_room_for_a_quarter_turn_there_is_none() -> None:
    turned = [turns_of(tile) for tile in tiles(places(10, 30), None, 200, rot90=1)]
    assert set(turned) == {0, 2}
    assert 70 < turned.count(2) < 130


def turns_of(tile: np.ndarray) -> int:
    """Quarter turns against the clock, from where the rows go."""
    down, across = (int(value) for value in tile[1, 0] - tile[0, 0])
    return {(1, 0): 0, (0, -1): 1, (-1, 0): 2, (0, 1): 3}[down, across]


@pytest.mark.parametrize("shape", [(7, 40), (40, 11)])
def test_an_image_smaller_than_the_tile_is_refused(shape: tuple[int, int]) -> None:
    words = rf"tile of 8 x 12 pixels .* image of {shape[0]} x {shape[1]}; give a smaller data\.size"
    with pytest.raises(DataError, match=words):
        tiles(places(*shape), None, 1)


def boxed(*rows: tuple[float, float, float, float, int]) -> Boxes:
    """Left, top, right, bottom, class."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    return Boxes(table[:, :4], table[:, 4].astype(np.int16))


def held(boxes: Boxes, place: tuple[int, int], count: int = 1500) -> float:
    """The share of tiles that hold the pixel at ``place``."""
    made = (cut(places(100, 100), boxes, WINDOW, 0, rng(0, 0, number, "tile"))[0] for number in range(count))
    return float(np.mean([(tile == place).all(axis=-1).any() for tile in made]))


def test_a_third_of_the_tiles_holds_the_middle_of_a_box() -> None:
    chance = 96 / (93 * 89)
    assert abs(held(boxed((58, 38, 63, 43, 0)), (40, 60)) - (1 / 3 + 2 / 3 * chance)) < 0.045
    assert held(boxed((0, 0, 2, 2, 0)), (1, 1)) > 0.28  # in the corner of the image, too
    assert held(boxed((98, 98, 100, 100, 0)), (99, 99)) > 0.28


def test_rare_boxes_come_as_often_as_common_ones() -> None:
    common = [(float(left), 90.0, left + 3.0, 94.0, 0) for left in range(0, 90, 3)]
    share = held(boxed(*common, (58, 38, 63, 43, 4)), (40, 60))
    assert abs(share - (1 / 6 + 2 / 3 * 96 / (93 * 89))) < 0.035


def test_without_boxes_a_tile_lies_anywhere() -> None:
    corners = [cut(places(30, 40), boxed(), WINDOW, 0, rng(0, 0, number, "tile"))[0][0, 0] for number in range(300)]
    plain = [tile[0, 0] for tile in tiles(places(30, 40), np.zeros((30, 40), np.uint8), 300)]
    np.testing.assert_array_equal(corners, plain)


def test_boxes_are_cut_and_turned_as_the_tile_is() -> None:
    seen = 0
    for number in range(120):
        tile, boxes = cut(places(20, 30), boxed((9, 6, 18, 11, 2)), WINDOW, 0.8, rng(0, 0, number, "tile"))
        rows, columns = np.nonzero(((tile >= (6, 9)) & (tile < (11, 18))).all(axis=-1))
        if len(boxes):
            seen += 1
            assert boxes.xyxy.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
            assert boxes.classes.tolist() == [2]
        else:
            sides = (0, 0) if not len(rows) else (np.ptp(rows) + 1, np.ptp(columns) + 1)
            assert len(rows) < 0.25 * 45 or min(sides) < 2
    assert 40 < seen < 120
