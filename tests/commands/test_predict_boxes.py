"""Boxes of new files, end to end.

A network that has learnt nothing says where things lie by a rule: there is a box around what is brighter than the
middle. Only the last test is of what was learnt.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import tifffile
import torch
from dicoms import make_dataset

from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.label import label
from sslmed.commands.predict import PredictResult, predict
from sslmed.data import splits
from sslmed.data.annotations.writer import annotate
from sslmed.data.modality import named
from sslmed.data.readers import read
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store
from sslmed.data.writers import write_image, write_nifti
from sslmed.evaluation.explain import LABEL_COLOURS
from sslmed.heads.localization import Localization
from sslmed.supervised import model as models

RECIPE = "histology/localization"
SMALL = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.batch_size=4",
    "train.max_steps=2",
    "train.precision=32",
    "head.width=8",
    "head.depth=0",
)
SIZE = (24, 32)  # the longer side is that of the input: nothing is resized on the way there and back
Tuned = Callable[[str], str]


def corner(low: float = 60, high: float = 200) -> np.ndarray:
    """Bright in the upper left and nowhere else: left 4, top 2, right 18, bottom 8."""
    pixels = np.full(SIZE, low, np.int16)
    pixels[2:8, 4:18] = high
    return pixels


def picture() -> np.ndarray:
    return corner().astype(np.uint8)


@pytest.fixture(scope="module")
def tuned_on(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The run of a localization model of a modality, two steps old; made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def run(modality: str) -> str:
        if modality not in made:
            pixels = corner(-500, 500) if modality == "ct" else picture()
            noisy = [pixels + np.random.default_rng(each).integers(0, 20, SIZE, pixels.dtype) for each in range(8)]
            scans = [NewScan(each, named(modality).intensity(each), f"{at:064x}") for at, each in enumerate(noisy)]
            split = np.array([splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST] * 2, np.uint8)
            patients = [f"{patient:032x}" for patient in range(8)]
            store = stores.write_store(folder / modality, scans, patients, modality=modality, split=split)
            mask = (pixels > 100).astype(np.uint8)
            annotate(store.path, masks=[(row, mask) for row in range(8)], mask_classes=("dark", "bright"))
            made[modality] = finetune(RECIPE, store.path, folder / f"{modality}_run", overrides=SMALL).run
        return made[modality]

    return run


@pytest.fixture
def by_brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """One box around all that is brighter than the middle, of the score 0.75; thresholds are 0.5."""

    def boxes(_: Localization, features: Any) -> torch.Tensor:
        found = torch.tensor([[0.0, 0, 0, 0, 0, -1]]).repeat(len(features[0]), 1, 1)
        for number, image in enumerate(features[0].mean(dim=1)):
            rows, columns = torch.nonzero(image > 0.5 * (image.min() + image.max()), as_tuple=True)
            if image.max() - image.min() > 1.5:
                edges = [int(each) for each in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
                found[number, 0] = torch.tensor([*edges, 0.75, 0])
        return found

    load = models.load

    def plain(path: Any) -> models.Model:
        loaded = load(path)
        return replace(loaded, about=loaded.about.model_copy(update={"thresholds": (0.5,)}))

    monkeypatch.setattr(Localization, "predict", boxes)
    monkeypatch.setattr("sslmed.commands.predict.load", plain)


def lines(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def corners(line: dict[str, str]) -> list[float]:
    return [float(line[edge]) for edge in ("left", "top", "right", "bottom")]


def coco(result: PredictResult) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(result.boxes).with_suffix(".json").read_text())
    return content


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize("tta", [False, True])
def test_pictures(tta: bool, tuned_on: Tuned, tmp_path: Path) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    write_image(tmp_path / "new" / "deep" / "a.png", picture())
    write_image(tmp_path / "new" / "b.png", np.ascontiguousarray(picture()[::-1]))
    write_image(tmp_path / "new" / "c.png", np.full(SIZE, 100, np.uint8))
    result = predict(tuned_on("xray"), tmp_path / "new", tmp_path / "out", explain=True, tta=tta)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "boxes.csv",
        "boxes.json",
        "heat",
        "predictions.csv",
    ]
    assert result.boxes == str(tmp_path / "out" / "boxes.csv")
    found = {line["file"]: line for line in lines(result.boxes)}
    assert sorted(found) == ["b.png", "deep/a.png"]
    if not tta:
        assert corners(found["deep/a.png"]) == [4, 2, 18, 8]
        assert corners(found["b.png"]) == [4, 16, 18, 22]
    else:  # smaller looks find it within a pixel or two, and suppression leaves one
        np.testing.assert_allclose(corners(found["deep/a.png"]), [4, 2, 18, 8], atol=2)
    table = {line["file"]: line for line in lines(result.out)}
    assert [name for name in table["b.png"] if ":" in name] == ["boxes:bright", "highest:bright"]
    assert [(table[name]["boxes:bright"], table[name]["highest:bright"]) for name in sorted(table)] == [
        ("1", "0.750000"),
        ("0", ""),
        ("1", "0.750000"),
    ]
    assert (result.predicted, result.found, result.holding, result.weak) == ({"bright": 2}, {"bright": 2}, 2, False)
    said = result.lines()
    assert said[:2] == ["predicted 3 images", "found 2 bright in 2 of 3 scans"]
    assert f"boxes: {result.boxes}" in said
    assert f"pictures: {result.heat}" in said
    json.dumps(result.as_dict())
    drawn = read(tmp_path / "out" / "heat" / "deep" / "a.png").pixels
    assert drawn.shape == (*SIZE, 3)
    assert (drawn == LABEL_COLOURS[0]).all(axis=2).any()
    assert not (read(tmp_path / "out" / "heat" / "c.png").pixels == LABEL_COLOURS[0]).all(axis=2).any()


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, 1, 0], [1, 0, 0, 0, -1, 0]])
def test_a_slice_that_was_flipped_has_boxes_as_its_file_lies(
    orientation: list[int], tuned_on: Tuned, tmp_path: Path
) -> None:
    place = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [3, 4, 5], "PixelSpacing": [0.5, 2]}
    dataset = make_dataset(corner(-500, 500), Modality="CT", RescaleSlope=1, RescaleIntercept=0, **place)
    dataset.save_as(tmp_path / "a.dcm")
    (line,) = lines(predict(tuned_on("ct"), tmp_path / "a.dcm", tmp_path / "out").boxes)
    assert corners(line) == [4, 2, 18, 8]
    names = ("left_mm", "top_mm", "right_mm", "bottom_mm", "width_mm", "height_mm")
    assert [float(line[name]) for name in names] == [8, 1, 36, 4, 28, 3]
    assert (line["slice_first"], line["depth_mm"]) == ("", "")


@pytest.mark.usefixtures("by_brightness")
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_boxes_of_a_nifti_volume_lie_on_its_voxels(
    signs: tuple[int, int, int], tuned_on: Tuned, tmp_path: Path
) -> None:
    voxels = np.full((6, *SIZE), -500, np.int16)  # (k, j, i)
    voxels[[1, 2, 4], 2:8, 4:18] = 500
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.array([2.0, 0.5, 3.0]) * signs)[:, ::-1]  # of (k, j, i)
    write_nifti(tmp_path / "v.nii.gz", voxels, affine=affine)
    result = predict(tuned_on("ct"), tmp_path / "v.nii.gz", tmp_path / "out", explain=True)
    (line,) = lines(result.boxes)
    assert corners(line) == [4, 2, 18, 8]
    assert (line["slice_first"], line["slice_last"]) == ("2", "5")
    assert [float(line[name]) for name in ("width_mm", "height_mm", "depth_mm")] == [28, 3, 12]
    content = coco(result)
    assert [image["file_name"] for image in content["images"]] == [f"v.nii.gz#{at}" for at in range(1, 7)]
    assert sorted((each["image_id"], each["object"]) for each in content["annotations"]) == [(2, 1), (3, 1), (5, 1)]
    assert lines(result.out)[0]["boxes:bright"] == "1"
    assert result.predicted == {"bright": 1}
    assert result.lines()[0] == "predicted 1 scans of their 6 images, slices and frames"
    assert (tmp_path / "out" / "heat" / "v.png").is_file()


@pytest.mark.usefixtures("by_brightness")
def test_frames_of_a_clip_are_linked_too(tuned_on: Tuned, tmp_path: Path) -> None:
    frames = np.stack([np.roll(picture(), number, axis=1) for number in range(3)])
    tifffile.imwrite(tmp_path / "cine.tif", frames, photometric="minisblack")
    result = predict(tuned_on("ultrasound"), tmp_path / "cine.tif", tmp_path / "out")
    (line,) = lines(result.boxes)
    assert (line["slice_first"], line["slice_last"], line["left_mm"]) == ("1", "3", "")
    assert corners(line) == [4, 2, 20, 8]


@pytest.mark.usefixtures("by_brightness")
def test_the_boxes_can_be_given_to_a_store_of_the_same_images(tuned_on: Tuned, tmp_path: Path) -> None:
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for number in range(4):
        write_image(tmp_path / "new" / "deep" / f"{number}.png", np.roll(picture(), number, axis=0))
    write_image(tmp_path / "new" / "none.png", np.full(SIZE, 100, np.uint8))
    result = predict(tuned_on("xray"), tmp_path / "new", tmp_path / "out")
    ingest(tmp_path / "new", tmp_path / "store", modality="xray")
    labelled = label(tmp_path / "store", boxes=Path(result.boxes).with_suffix(".json"))
    assert labelled.problems == ()
    store = Store(tmp_path / "store")
    assert store.box_classes == ("bright",)
    with (tmp_path / "store.private" / "key_table.csv").open(newline="") as file:
        rows = {line["file"]: int(line["sample"]) for line in csv.DictReader(file)}
    for number in range(4):
        boxes = store.boxes(rows[f"deep/{number}.png"])
        assert boxes is not None
        assert boxes.xyxy.tolist() == [[4, 2 + number, 18, 8 + number]]
    none = store.boxes(rows["none.png"])
    assert none is not None
    assert len(none) == 0


def test_without_the_rule_the_cards_threshold_decides(
    tuned_on: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real head, two steps old: with a threshold of 0 all that it finds is written."""
    write_image(tmp_path / "a.png", picture())
    own = predict(tuned_on("xray"), tmp_path / "a.png", tmp_path / "own")
    monkeypatch.setattr(models.Model, "kept", lambda _, found: found)
    every = predict(tuned_on("xray"), tmp_path / "a.png", tmp_path / "every")
    scores = [float(line["score"]) for line in lines(every.boxes)]
    assert len(scores) > 1
    assert scores == sorted(scores, reverse=True)
    assert lines(every.out)[0]["highest:bright"] == lines(own.out)[0]["highest:bright"] == f"{scores[0]:.6f}"
    cuts = models.load(tuned_on("xray")).about.thresholds
    assert cuts is not None
    assert len(lines(own.boxes)) == sum(each["score"] >= cuts[0] for each in coco(every)["annotations"])


def test_boxes_from_labels_alone_say_so(phantom_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [each for each in SMALL if not each.startswith("head.depth")]
    run = finetune("xray/weak_localization", phantom_store.path, tmp_path / "run", overrides=overrides).run
    write_image(tmp_path / "a.png", picture())
    monkeypatch.setattr(models.Model, "kept", lambda _, found: found)
    result = predict(run, tmp_path / "a.png", tmp_path / "out", explain=True)
    (line,) = lines(result.out)
    assert list(line)[3:8] == [
        "predicted",
        "probability:clear",
        "probability:nodule",
        "boxes:nodule",
        "highest:nodule",
    ]
    found = lines(result.boxes)
    assert len(found) == int(line["boxes:nodule"]) == result.found["nodule"] > 0
    assert {each["weak"] for each in found} == {"yes"}
    assert coco(result)["info"]["weak"] is True
    said = result.lines()
    assert said[0].startswith("predicted 1 images: ")
    assert "weak: boxes come from class labels alone; expect rough outlines" in said
    assert (tmp_path / "out" / "heat" / "a.png").is_file()
    assert result.weak
