"""What is drawn: the right number of panels, masks and boxes where they belong, and values on a fixed scale."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sslmed.data.annotations.boxes import Boxes
from sslmed.data.previews import panels
from sslmed.data.previews.panels import Classes, Cut, Shown

CLASSES = Classes(("background", "nerve", "vessel"), ("cell", "nucleus"))


def shown(shape: tuple[int, ...] = (40, 60), planes: int = 1, views: int = 3) -> Shown:
    pixels = np.random.default_rng(0).integers(0, 4000, shape, dtype=np.uint16)
    given = np.random.default_rng(1).normal(0, 1, (planes, 48, 48)).astype(np.float32)
    return Shown(
        title="row 3 (train)",
        pixels=pixels,
        ranges=((10.0, 3900.0),),
        planes=given,
        names={number: f"plane {number}" for number in range(1 if len(shape) == 3 else planes)},
        views=tuple(given * factor for factor in range(views)),
        place=(8, 0, 32, 48),
    )


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that becomes a PNG."""
    drawn: list[Figure] = []
    png = panels._png

    def kept(figure: Figure) -> bytes:
        drawn.append(figure)
        return png(figure)

    monkeypatch.setattr(panels, "_png", kept)
    return drawn


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize(
    ("sample", "panels_a_row"),
    [(shown(), 1 + 1 + 3 + 2), (shown((40, 60, 3), 3), 1 + 1 + 3 + 2), (shown(planes=3, views=2), 1 + 3 + 2 + 2)],
)
def test_a_panel_for_everything(sample: Shown, panels_a_row: int, figures: list[Figure]) -> None:
    png = panels.images([sample] * 4, Classes())
    (figure,) = figures
    assert len(figure.axes) == 4 * panels_a_row
    height, width = opened(png).shape[:2]
    assert (width / 100, height / 100) == pytest.approx(figure.get_size_inches(), abs=0.02)


def test_rows_of_fewer_planes_leave_room_for_those_with_more(figures: list[Figure]) -> None:
    panels.images([shown(), shown(planes=3)], Classes())
    titles = [axis.get_title() for axis in figures[0].axes]
    assert titles.count("view 1") == titles.count("view 3") == 2
    assert titles.count("plane 2") == 1


def test_network_input_has_one_scale_whatever_it_holds(figures: list[Figure]) -> None:
    sample = shown()
    panels.images([sample, replace(sample, planes=sample.planes / 100)], Classes())
    limits = [axis.images[0].get_clim() for axis in figures[0].axes if axis.get_title() == "plane 0"]
    assert limits == [(-2.5, 2.5)] * 2


def test_raw_pixels_run_from_their_least_to_their_greatest(figures: list[Figure]) -> None:
    sample = shown()
    panels.images([sample], Classes())
    drawn = figures[0].axes[0].images[0]
    assert drawn.get_clim() == (0, 1)
    assert float(drawn.get_array().min()) == 0
    assert float(drawn.get_array().max()) == 1
    low, high = sample.pixels.min(), sample.pixels.max()
    assert figures[0].axes[0].get_title() == f"row 3 (train)\nuint16 40 x 60, {low} to {high}"


def test_a_large_image_is_thinned_and_keeps_its_coordinates(figures: list[Figure]) -> None:
    panels.images([shown((3000, 1500))], Classes())
    drawn = figures[0].axes[0].images[0]
    assert max(drawn.get_array().shape) <= panels.LARGEST
    assert tuple(drawn.get_extent()) == (-0.5, 1499.5, 2999.5, -0.5)


def test_a_mask_is_seen_on_raw_and_network_input_in_its_place(figures: list[Figure]) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:50] = 2
    mask[0, 0] = 255
    plain = opened(panels.images([shown()], CLASSES))
    masked = opened(panels.images([replace(shown(), mask=mask)], CLASSES))
    assert (plain != masked).any(axis=2).sum() > 500
    raw, given = (figures[1].axes[number].images[1] for number in (0, 1))
    red, green, blue = panels._colour(1)
    for drawn in (raw, given):
        assert np.allclose(drawn.get_array()[15, 40], (red, green, blue, 0.35))
        assert np.allclose(drawn.get_array()[10, 40], (red, green, blue, 0.9))  # its edge
        assert drawn.get_array()[30, 10, 3] == 0
        assert np.allclose(drawn.get_array()[0, 0, :3], 0.6)  # ignored
    assert tuple(raw.get_extent()) == (-0.5, 59.5, 39.5, -0.5)
    assert tuple(given.get_extent()) == (-0.5, 47.5, 39.5, 7.5)  # inside the letterbox
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["nerve", "vessel", "cell", "nucleus"]


def test_boxes_follow_the_letterbox(figures: list[Figure]) -> None:
    boxes = Boxes(np.array([[0, 0, 60, 40], [10, 20, 30, 35]], np.float32), np.array([0, 1], np.int16))
    panels.images([replace(shown(), boxes=boxes)], CLASSES)
    raw, given = figures[0].axes[:2]
    assert raw.patches[0].get_bbox().extents.tolist() == [-0.5, -0.5, 59.5, 39.5]
    assert given.patches[0].get_bbox().extents.tolist() == [-0.5, 7.5, 47.5, 39.5]
    assert given.patches[1].get_bbox().extents.tolist() == [7.5, 23.5, 23.5, 35.5]
    assert [text.get_text() for text in raw.texts] == ["cell", "nucleus"]
    colours = [patch.get_edgecolor()[:3] for patch in raw.patches]
    assert colours == [panels._colour(3), panels._colour(4)]


def test_names_of_many_boxes_are_left_to_their_colours(figures: list[Figure]) -> None:
    corners = np.array([[number, 0, number + 5, 9] for number in range(panels.MOST_NAMES + 1)], np.float32)
    panels.images([replace(shown(), boxes=Boxes(corners, np.zeros(len(corners), np.int16)))], CLASSES)
    assert len(figures[0].axes[0].patches) == panels.MOST_NAMES + 1
    assert not figures[0].axes[0].texts


def test_histograms_show_the_window_and_what_is_made_of_it(figures: list[Figure]) -> None:
    panels.images([replace(shown(), ranges=((10.0, 20.0), (30.0, 40.0)))], Classes())
    stored, given = figures[0].axes[-2:]
    assert [line.get_xdata()[0] for line in stored.lines] == [10, 20, 30, 40]
    assert given.get_title().startswith("network input: ")
    assert figures[0].legends == []


def test_a_cut_has_the_proportions_of_the_patient(figures: list[Figure]) -> None:
    pixels = np.zeros((10, 30), np.int16)
    mask = np.zeros((10, 30), np.uint8)
    mask[2:4, 5:9] = 1
    cut = Cut("slice 5 of 20", pixels, (-100, 100), aspect=3.0, upside_down=True, mask=mask)
    panels.cuts([[cut, replace(cut, upside_down=False, mask=None)]], CLASSES)
    turned, upright = figures[0].axes
    assert turned.get_aspect() == upright.get_aspect() == 3
    assert turned.get_ylim() == (-0.5, 9.5)
    assert upright.get_ylim() == (9.5, -0.5)
    assert (len(turned.images), len(upright.images)) == (2, 1)
    assert turned.images[0].get_clim() == (-100, 100)


def test_a_picture_says_nothing_of_its_making() -> None:
    picture = Image.open(BytesIO(panels.images([shown()], Classes())))
    assert not {key.lower() for key in picture.info} & {"software", "author", "creation time", "title"}


def test_the_same_pictures_of_the_same_samples() -> None:
    assert panels.images([shown()], CLASSES) == panels.images([shown()], CLASSES)
