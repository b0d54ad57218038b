import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stores import picture, write_store

from sslmed.commands.ingest import ingest
from sslmed.config import DataError
from sslmed.data.annotations.boxes import Boxes
from sslmed.data.annotations.components import boxes_around
from sslmed.data.annotations.writer import annotate
from sslmed.data.loading import Batch, Collate, Sample, ViewDataset, plain_loader
from sslmed.data.modality import MODALITIES, with_views
from sslmed.data.phantom_scans import write_scans
from sslmed.data.phantoms import write_phantoms
from sslmed.data.positives import Positives
from sslmed.data.sampling import StreamSampler
from sslmed.data.store import Store
from sslmed.data.targets import PADDING, boxes, packed

ROWS = 5
SHAPE = (64, 80)
XRAY = MODALITIES["xray"]
STILL: dict[str, Any] = {"crop": (1, 1), "aspect": (1, 1), "rotate": 0.0, "hflip": 0.0, "noise": 0.0, "blur": 0.0}
GIVEN: dict[int, list[tuple[float, float, float, float, int]]] = {
    0: [(10, 8, 30, 20, 1)],
    1: [],  # a negative
    3: [(0, 0, 16, 16, 0), (40, 32, 60, 64, 1), (50, 4.5, 70, 12.25, 0)],
}


def boxed(rows: list[tuple[float, float, float, float, int]]) -> Boxes:
    """Left, top, right, bottom, class."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    return Boxes(table[:, :4], table[:, 4].astype(np.int16))


def made(path: Path, given: dict[int, Any] | None = None, masks: dict[int, np.ndarray] | None = None) -> Store:
    """Five images, each with its own boxes painted into it."""
    stream = np.random.default_rng(0)
    scans = []
    for row in range(ROWS):
        pixels = stream.integers(0, 50, SHAPE).astype(np.uint8)
        for left, top, right, bottom, _ in (given or {}).get(row, ()):
            pixels[int(top) : int(bottom), int(left) : int(right)] = 200
        scans.append(picture(pixels, f"{row:064x}"))
    store = write_store(path / "store", scans, [f"{row // 2:032x}" for row in range(ROWS)])
    drawn = None if given is None else {row: boxed(rows) for row, rows in given.items()}
    masked = None if masks is None else list(masks.items())
    names = () if masks is None else ("background", "cell", "nerve")
    annotate(store.path, boxes=drawn, box_classes=("cell", "nerve"), masks=masked, mask_classes=names)
    return Store(store.path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made(tmp_path_factory.mktemp("boxes"), GIVEN)


def test_boxes_of_a_store(store: Store) -> None:
    target = boxes(store)
    assert (target.name, target.kind, target.classes, target.values) == ("boxes", "boxes", ("cell", "nerve"), None)
    assert target.known.tolist() == [True, True, False, True, False]
    expected = [[0, 1], [0, 0], [0, 0], [1, 1], [0, 0]]
    np.testing.assert_array_equal(target.presence(), np.array(expected, bool))
    for row in range(ROWS):
        found = target.of(row, store)
        assert isinstance(found, Boxes)
        np.testing.assert_array_equal(packed(found), np.array(GIVEN.get(row, []), np.float32).reshape(-1, 5))
    sent = pickle.dumps(target)
    assert len(sent) < 2000
    assert pickle.loads(sent).of(3, store).xyxy.tolist() == target.of(3, store).xyxy.tolist()  # noqa: S301


def test_boxes_packed() -> None:
    row = packed(boxed(GIVEN[3]))
    assert row.dtype == np.float32
    assert row.tolist() == [[0, 0, 16, 16, 0], [40, 32, 60, 64, 1], [50, 4.5, 70, 12.25, 0]]
    assert packed(boxed([])).shape == (0, 5)


def test_boxes_around_masks(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.uint8)
    mask[3:9, 4:10] = mask[30:40, 20:60] = 2
    mask[0, 0] = 255
    store = made(tmp_path, None, {0: mask, 3: np.zeros(SHAPE, np.uint8), 4: np.where(mask == 2, 1, mask)})
    target = boxes(store)
    assert (target.name, target.kind, target.classes) == ("boxes around masks", "boxes", ("cell", "nerve"))
    assert target.known.tolist() == [True, False, False, True, True]
    expected = [[0, 1], [0, 0], [0, 0], [0, 0], [1, 0]]
    np.testing.assert_array_equal(target.presence(), np.array(expected, bool))
    corners = [[4, 3, 10, 9], [20, 30, 60, 40]]
    assert target.of(0, store).xyxy.tolist() == target.of(4, store).xyxy.tolist() == corners
    assert target.of(0, store).classes.tolist() == [1, 1]
    assert target.of(4, store).classes.tolist() == [0, 0]
    for row in (1, 2, 3):
        assert len(target.of(row, store)) == 0


def test_boxes_that_were_drawn_come_before_masks(tmp_path: Path) -> None:
    store = made(tmp_path, GIVEN, {2: np.ones(SHAPE, np.uint8)})
    target = boxes(store)
    assert (target.name, target.known[2]) == ("boxes", False)
    assert len(target.of(2, store)) == 0


def test_a_store_without_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither boxes nor masks.* sslmed label STORE --boxes FILE\|DIR"):
        boxes(made(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no image of .*store has a box; add some .* sslmed label STORE --boxes"):
        boxes(made(tmp_path / "negatives", {0: [], 1: []}))
    blank = {0: np.zeros(SHAPE, np.uint8), 1: np.zeros(SHAPE, np.uint8)}
    with pytest.raises(DataError, match=r"no mask of .*store shows anything to lay a box around; .*--boxes"):
        boxes(made(tmp_path / "blank", None, blank))


# Batches.


def dataset(store: Store, views: int = 1, **options: Any) -> ViewDataset:
    modality = with_views(XRAY, STILL)
    arguments = {"size": (32, 40), "channels": 1, "seed": 0, "target": boxes(store)} | options
    return ViewDataset(store, modality, (modality.view,) * views, **arguments)


def batch(made: ViewDataset, *rows: int) -> Batch:
    stacked = Collate(0)([made[0, row] for row in rows])
    assert isinstance(stacked, Batch)
    return stacked


def test_boxes_of_a_batch_are_padded(store: Store) -> None:
    """Views of half the image's size."""
    found = batch(dataset(store), 0, 1, 2, 3)
    assert found.target.dtype == torch.float32
    assert found.target.shape == (4, 3, 5)
    blank = [0, 0, 0, 0, PADDING]
    assert PADDING == -1
    assert found.target[:3].tolist() == [[[5, 4, 15, 10, 1], blank, blank], [blank] * 3, [blank] * 3]
    assert found.target[3].tolist() == [[0, 0, 8, 8, 0], [20, 16, 30, 32, 1], [25, 2.25, 35, 6.125, 0]]
    assert batch(dataset(store), 1, 2).target.tolist() == [[blank], [blank]]
    sample = dataset(store)[0, 0]
    assert isinstance(sample, Sample)
    assert sample.target.shape == (1, 5)
    assert found.to("meta").target.dtype == torch.float32


def test_views_are_those_of_a_batch_without_boxes(store: Store) -> None:
    rows = range(ROWS)
    moving = with_views(XRAY, {"rotate": 5.0, "crop": (0.4, 0.8)})
    views = [
        batch(ViewDataset(store, moving, (moving.view,) * 2, 32, 1, 0, target), *rows).views
        for target in (boxes(store), None)
    ]
    assert all(torch.equal(one, two) for one, two in zip(*views, strict=True))


def test_boxes_are_those_of_the_first_view_whoever_the_others_are_of(store: Store) -> None:
    positives = Positives("patient", store, np.arange(ROWS), 5)
    moving = with_views(XRAY, {"rotate": 0.0, "crop": (0.4, 0.8)})
    arguments = (store, moving, (moving.view,) * 3, 32, 1, 0, boxes(store))
    alone, paired = ViewDataset(*arguments), ViewDataset(*arguments, positives)
    for row in (0, 3):
        one, two = alone[4, row], paired[4, row]
        assert isinstance(one, Sample)
        assert isinstance(two, Sample)
        assert torch.equal(one.target, two.target)
        assert torch.equal(one.views[0], two.views[0])
        assert not torch.equal(one.views[1], two.views[1])


def test_boxes_of_tiles_lie_where_their_views_are_bright(store: Store) -> None:
    modality = with_views(XRAY, STILL)
    tiled = ViewDataset(store, modality, (modality.view,), 32, 1, 0, boxes(store), tile=True)
    seen = 0
    for epoch in range(12):
        sample = tiled[epoch, 3]
        assert isinstance(sample, Sample)
        for left, top, right, bottom, _ in sample.target.tolist():
            view = sample.views[0][0]
            assert view[int(top) : int(bottom), int(left) : int(right)].min() > view.mean()
            seen += 1
    assert seen > 5


def test_whole_images_carry_no_boxes(store: Store) -> None:
    (found,) = plain_loader(store, np.arange(ROWS), 32, XRAY, channels=1)
    assert found.target.tolist() == [-1] * ROWS


# Phantoms.


def taken(folder: Path, modality: str, **given: Any) -> Store:
    result = ingest(folder, folder.parent / f"{folder.name}-{'-'.join(given)}", modality=modality, **given)
    assert {problem.code for problem in result.problems} <= {"image_without_boxes", "image_without_mask"}
    return Store(result.path)


def test_phantoms_have_the_boxes_of_their_masks(tmp_path: Path) -> None:
    drawn = write_phantoms(tmp_path / "raw", patients=6, masks=True, boxes=True)
    boxed = taken(drawn.folder, "xray", labels=drawn.labels, boxes=drawn.boxes)
    masked = taken(drawn.folder, "xray", labels=drawn.labels, masks=drawn.masks, mask_classes=("clear", "nodule"))
    one, two = boxes(boxed), boxes(masked)
    assert (one.name, two.name) == ("boxes", "boxes around masks")
    assert one.classes == two.classes == ("nodule",)
    np.testing.assert_array_equal(one.known, boxed.target("finding") >= 0)
    np.testing.assert_array_equal(one.known, two.known)
    np.testing.assert_array_equal(one.presence(), two.presence())
    np.testing.assert_array_equal(one.presence()[:, 0], boxed.target("finding") == 1)
    for row in range(len(boxed)):
        np.testing.assert_array_equal(packed(one.of(row, boxed)), packed(two.of(row, masked)))


@pytest.mark.parametrize("modality", ["ultrasound", "histology"])
def test_boxes_of_phantom_pictures(modality: str, tmp_path: Path) -> None:
    drawn = write_scans(tmp_path / "raw", modality, patients=4, boxes=True)
    store = taken(drawn.folder, modality, labels=drawn.labels, boxes=drawn.boxes)
    target = boxes(store)
    assert target.classes == ("lesion",)
    assert target.known.all()
    np.testing.assert_array_equal(target.presence()[:, 0], store.target("finding") == 1)


def test_boxes_around_the_masks_of_a_phantom_volume(tmp_path: Path) -> None:
    drawn = write_scans(tmp_path / "raw", "ct", patients=2, masks=True)
    store = taken(drawn.folder, "ct", labels=drawn.labels, masks=drawn.masks, mask_classes=("clear", "lesion"))
    target = boxes(store)
    assert (target.name, target.classes) == ("boxes around masks", ("lesion",))
    assert target.known.all()
    for row in range(len(store)):
        mask = store.mask(row)
        assert mask is not None
        found = target.of(row, store)
        assert len(found) == target.presence()[row, 0] == mask.any()
        assert packed(found).tolist() == packed(boxes_around(mask)).tolist()
    assert 2 < target.presence().sum() < 12
    ct = MODALITIES["ct"]
    sampler = StreamSampler(np.flatnonzero(target.presence()[:, 0]), 2, steps=1, seed=0)
    views = ViewDataset(store, ct, (ct.view,), 64, 1, 0, target)
    assert batch(views, *(row for _, row in next(iter(sampler)))).target.shape == (2, 1, 5)
