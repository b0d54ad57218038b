"""Where masks and heat maps of predictions lie, and what several looks and unusual images come to.

A network that has learnt nothing says where things lie by a rule: what is brighter than the middle is class 1.
"""

import csv
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import stores
import tifffile
import torch
from dicoms import make_dataset

from sslmed import artifact
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.predict import PredictResult, predict
from sslmed.data import splits
from sslmed.data.annotations.writer import annotate
from sslmed.data.modality import named
from sslmed.data.phantom_scans import tile
from sslmed.data.readers import read, read_series
from sslmed.data.shards.tables import NewScan
from sslmed.data.sources.facing import facing
from sslmed.data.store import Store
from sslmed.data.writers import write_image
from sslmed.heads.segmentation import Segmentation

SMALL = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.precision=32",
)
SIZE = (24, 32)  # the longer side is that of the input: nothing is resized on the way there and back
Tuned = Callable[[str], str]


def corner(size: tuple[int, int] = SIZE, low: float = 60, high: float = 200) -> np.ndarray:
    """Bright in the upper left and nowhere else: it tells every flip and turn."""
    pixels = np.full(size, low, np.int16)
    pixels[2:8, 4:18] = high
    return pixels


def picture(size: tuple[int, int] = SIZE) -> np.ndarray:
    return corner(size).astype(np.uint8)


@pytest.fixture(scope="module")
def tuned_on(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The run of a segmentation model of a modality, two steps old; made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def run(modality: str) -> str:
        if modality not in made:
            pixels = corner(low=-500, high=500) if modality == "ct" else picture()
            noisy = [pixels + np.random.default_rng(each).integers(0, 20, SIZE, pixels.dtype) for each in range(8)]
            scans = [NewScan(each, named(modality).intensity(each), f"{at:064x}") for at, each in enumerate(noisy)]
            split = np.array([splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST] * 2, np.uint8)
            patients = [f"{patient:032x}" for patient in range(8)]
            store = stores.write_store(folder / modality, scans, patients, modality=modality, split=split)
            mask = (pixels > 100).astype(np.uint8)
            annotate(store.path, masks=[(row, mask) for row in range(8)], mask_classes=("dark", "bright"))
            result = finetune(f"{modality}/segmentation", store.path, folder / f"{modality}_run", overrides=SMALL)
            made[modality] = result.run
        return made[modality]

    return run


@pytest.fixture
def by_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = Segmentation.logits

    def logits(head: Segmentation, features: Any) -> torch.Tensor:
        if torch.is_grad_enabled():  # it is trained as ever
            return learnt(head, features)
        image = features[0].mean(dim=1)
        return torch.stack([-image, image], dim=1)

    monkeypatch.setattr(Segmentation, "logits", logits)


def table(result: PredictResult) -> list[dict[str, str]]:
    with Path(result.out).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Masks lie as their files lie.


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize(
    ("orientation", "flipped"),
    [
        ([1, 0, 0, 0, 1, 0], (False, False, False)),
        ([-1, 0, 0, 0, 1, 0], (False, False, True)),
        ([1, 0, 0, 0, -1, 0], (False, True, False)),
        ([-1, 0, 0, 0, -1, 0], (False, True, True)),
    ],
)
def test_a_slice_that_was_flipped_gets_a_mask_as_its_file_lies(
    orientation: list[int], flipped: tuple[bool, ...], tuned_on: Tuned, tmp_path: Path
) -> None:
    pixels = corner(low=-500, high=500)
    place = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [3, 4, 5], "PixelSpacing": [0.5, 2]}
    make_dataset(pixels, Modality="CT", RescaleSlope=1, RescaleIntercept=0, **place).save_as(tmp_path / "a.dcm")
    assert facing(read(tmp_path / "a.dcm")).flipped == flipped
    result = predict(tuned_on("ct"), tmp_path / "a.dcm", tmp_path / "out", explain=True)
    mask = read(tmp_path / "out" / "masks" / "a.png").pixels
    np.testing.assert_array_equal(mask, pixels > 0)
    overlay = read(tmp_path / "out" / "heat" / "a.png").pixels
    assert overlay.shape == (*SIZE, 3)
    coloured = overlay.min(axis=2) != overlay.max(axis=2)
    np.testing.assert_array_equal(coloured, pixels > 0)
    (line,) = table(result)
    assert (line["unit"], float(line["size:bright"])) == ("mm2", (pixels > 0).sum())  # 0.5 mm x 2 mm


def turned_jpeg(path: Path, pixels: np.ndarray) -> None:
    """Displayed a quarter turn clockwise (EXIF orientation 6)."""
    write_image(path, pixels)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, 6, 0) + b"\0\0\0\0"
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:])


def turned_tiff(path: Path, pixels: np.ndarray) -> None:
    tifffile.imwrite(path, pixels, photometric="minisblack", extratags=[(274, 3, 1, 6, True)])


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize(("suffix", "write"), [(".jpg", turned_jpeg), (".tif", turned_tiff)])
def test_a_turned_picture_gets_a_mask_as_it_is_displayed(
    suffix: str, write: Callable[[Path, np.ndarray], None], tuned_on: Tuned, tmp_path: Path
) -> None:
    write(tmp_path / f"a{suffix}", picture())
    predict(tuned_on("xray"), tmp_path / f"a{suffix}", tmp_path / "out", explain=True)
    mask = read(tmp_path / "out" / "masks" / "a.png").pixels
    np.testing.assert_array_equal(mask, np.rot90(picture() > 130, -1))
    assert read(tmp_path / "out" / "heat" / "a.png").pixels.shape == (SIZE[1], SIZE[0], 3)


@pytest.mark.usefixtures("by_brightness")
def test_a_clip_becomes_a_folder_of_a_mask_a_frame(tuned_on: Tuned, tmp_path: Path) -> None:
    frames = np.stack([np.roll(picture(), 3 * number, axis=0) + 5 * number for number in range(4)]).astype(np.uint8)
    (tmp_path / "new").mkdir()
    tifffile.imwrite(tmp_path / "new" / "cine.tif", frames, photometric="minisblack")
    write_image(tmp_path / "new" / "still.png", picture())
    result = predict(tuned_on("ultrasound"), tmp_path / "new", tmp_path / "out", explain=True)
    assert (result.scans, result.images) == (2, 5)
    folder = tmp_path / "out" / "masks"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert names == ["cine/0001.png", "cine/0002.png", "cine/0003.png", "cine/0004.png", "still.png"]
    for number, frame in enumerate(frames, start=1):
        np.testing.assert_array_equal(read(folder / "cine" / f"{number:04d}.png").pixels, frame > 130)
    assert sorted(path.name for path in (tmp_path / "out" / "heat").iterdir()) == ["cine.png", "still.png"]
    assert [(line["file"], line["unit"]) for line in table(result)] == [("cine.tif", "px"), ("still.png", "px")]


def places(bright: np.ndarray, affine: np.ndarray) -> set[tuple[float, ...]]:
    """Where in the patient the voxels are that are bright, mm."""
    found = np.argwhere(bright) @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(np.round(each, 3).tolist()) for each in found}


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0]])
def test_a_series_becomes_a_volume_in_its_place(orientation: list[int], tuned_on: Tuned, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for number in range(3):
        make_dataset(
            np.roll(corner(low=-500, high=500), 2 * number, axis=1),
            Modality="CT",
            SeriesInstanceUID="1.2.3",
            RescaleSlope=1,
            RescaleIntercept=0,
            ImageOrientationPatient=orientation,
            PixelSpacing=[0.5, 0.25],
            ImagePositionPatient=[-10, 20, 3 * number],
        ).save_as(tmp_path / "new" / f"{number}.dcm")
    result = predict(tuned_on("ct"), tmp_path / "new", tmp_path / "out")
    assert (result.scans, result.images) == (1, 3)
    series = read_series(sorted((tmp_path / "new").glob("*.dcm")))
    assert series.affine is not None
    made = nibabel.load(tmp_path / "out" / "masks" / "0.nii.gz")
    if orientation[0] == 1:
        np.testing.assert_allclose(made.affine, series.affine[:, [2, 1, 0, 3]], atol=1e-5)
    found = places(np.asarray(made.dataobj) == 1, made.affine)
    assert found == places(series.pixels > 0, series.affine)
    assert float(table(result)[0]["size:bright"]) == pytest.approx((series.pixels > 0).sum() * 3 * 0.5 * 0.25)


# Large originals of a store of smaller images.


@pytest.mark.usefixtures("by_brightness")
def test_masks_of_shrunk_images_come_back_at_the_originals_size(tmp_path: Path) -> None:
    large = np.kron(corner((40, 48)), np.ones((2, 2), np.int16)).astype(np.uint8)
    rows = ["file,patient,split"]
    for number in range(8):
        noisy = large + np.random.default_rng(number).integers(0, 20, large.shape, np.uint8)
        for folder, pixels in (("images", noisy), ("masks", (large > 130).astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_image(tmp_path / folder / f"{number}.png", pixels)
        rows.append(f"{number}.png,p{number},{('train', 'train', 'val', 'test')[number % 4]}")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(rows) + "\n")
    ingest(
        tmp_path / "images",
        tmp_path / "store",
        modality="xray",
        labels=tmp_path / "images" / "labels.csv",
        masks=tmp_path / "masks",
        mask_classes=("dark", "bright"),
        size=40,
    )
    assert Store(tmp_path / "store").pixels(0).shape == (40, 48)
    overrides = (*SMALL, "head.input=tiles")
    result = finetune("xray/segmentation", tmp_path / "store", tmp_path / "run", overrides=overrides)
    head = artifact.read_card(result.run).head
    assert head is not None
    assert head.shrunk_to == 40
    other = np.ascontiguousarray(large[::-1])
    (tmp_path / "new").mkdir()
    write_image(tmp_path / "new" / "a.png", large)
    write_image(tmp_path / "new" / "a.jpg", other)
    found = predict(result.run, tmp_path / "new", tmp_path / "out")
    assert [line["file"] for line in table(found)] == ["a.jpg", "a.png"]
    masks = [read(path).pixels for path in sorted((tmp_path / "out" / "masks").iterdir())]
    np.testing.assert_array_equal(masks, [other > 130, large > 130])  # a.png, and a.png.png beside it


# What is unlike anything known.


def written(folder: Path, *pictures: np.ndarray) -> Path:
    folder.mkdir()
    for number, pixels in enumerate(pictures):
        write_image(folder / f"{number}.png", pixels)
    return folder


def test_pictures_of_another_kind_are_unusual(tuned: FinetuneResult, tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    noise = stream.integers(0, 256, (96, 96), dtype=np.uint8)
    stripes = np.tile(np.array([0, 0, 255, 255], np.uint8), (96, 24))
    cells = [tile(stream, lesion).pixels.mean(axis=2).astype(np.uint8) for lesion in (False, True)]
    result = predict(tuned.run, written(tmp_path / "new", noise, stripes, *cells), tmp_path / "out")
    assert [line["unusual"] for line in table(result)] == ["yes"] * 4
    assert all(float(line["unlikeness"]) > 1 for line in table(result))
    assert result.unusual == ("0.png", "1.png", "2.png", "3.png")
    (warning,) = [line for line in result.lines() if line.startswith("warning: ")]
    assert "4 of 4 scans look unlike the images that this model was trained on (such as 0.png)" in warning


def test_training_images_are_not_unusual(
    tuned: FinetuneResult, phantom_store: Store, phantom_images: Path, tmp_path: Path
) -> None:
    train = set(phantom_store.rows("train").tolist())
    with (phantom_images.parent / "store.private" / "key_table.csv").open(newline="") as file:
        names = [line["file"] for line in csv.DictReader(file) if int(line["sample"]) in train]
    (tmp_path / "new").mkdir()
    for name in names[:20]:
        shutil.copy(phantom_images / name, tmp_path / "new")
    result = predict(tuned.run, tmp_path / "new", tmp_path / "out")
    assert result.scans == 20
    assert {line["unusual"] for line in table(result)} == {"no"}
    assert result.unusual == ()
    assert not [line for line in result.lines() if "warning" in line]


def test_without_anything_known_nothing_is_said(
    tuned: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "read_familiarity", lambda _: None)
    new = written(tmp_path / "new", np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    result = predict(tuned.run, new, tmp_path / "out")
    assert result.unusual is None
    assert "unusual" not in table(result)[0]
