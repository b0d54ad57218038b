"""Fine-tuning on masks, and predicting them, end to end on drawn shapes."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import stores
import torch

from sslmed import artifact
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.predict import predict
from sslmed.config import DataError, UsageError
from sslmed.data.input import network_input, to_image
from sslmed.data.readers import read
from sslmed.data.readers.mask import read_masks
from sslmed.data.store import Store
from sslmed.data.writers import write_image, write_nifti
from sslmed.durable import sha256
from sslmed.evaluation import overlap
from sslmed.run import read_metrics
from sslmed.supervised.model import load

RECIPE = "xray/segmentation"
SMALL = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.batch_size=8",
    "train.precision=32",
    "optim.lr=3e-3",
    "stop.check_every=20",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stores.write_shapes(tmp_path_factory.mktemp("shapes") / "store")


@pytest.fixture(scope="module")
def tuned(shapes: Store) -> FinetuneResult:
    """Learnt in 60 steps. Read it, never change it."""
    overrides = (*SMALL, "train.max_steps=60", "views.crop=[0.8,1.0]", "head.ema=0.8")
    return finetune(RECIPE, shapes.path, shapes.path.parent / "tuned", overrides=overrides)


def pictures(folder: Path, count: int = 3) -> dict[str, np.ndarray]:
    """New pictures of shapes with their masks, by name."""
    stream, truth = np.random.default_rng(99), {}
    for number in range(count):
        pixels, mask = stores.shapes(stream, (56, 44 + 4 * number))
        truth[f"{number}.png"] = mask
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{number}.png", pixels)
    return truth


def test_shapes_are_learnt(tuned: FinetuneResult) -> None:
    assert (tuned.kind, tuned.classes, tuned.unit) == ("mask", stores.SHAPES, "px")
    assert tuned.test["dice"][0] > 0.6
    assert set(tuned.by_class) == {"disc", "bar"}
    assert tuned.by_class["disc"]["dice"][0] == pytest.approx(
        2 * tuned.test["dice"][0] - tuned.by_class["bar"]["dice"][0]
    )
    assert tuned.thresholds is None
    json.dumps(tuned.as_dict(), allow_nan=False)
    assert "hd95" in "\n".join(tuned.lines())


def test_the_score_is_that_of_the_overlaps_beside_it(tuned: FinetuneResult, shapes: Store) -> None:
    kept = overlap.read(Path(tuned.run))
    assert len(kept.row) == 6
    assert kept.patient.tolist() == shapes.patients(shapes.rows("test")).tolist()
    assert tuned.test["dice"][0] == pytest.approx(overlap.measures(stores.SHAPES)["dice"](kept, None))
    val = [line["val_dice"] for line in read_metrics(Path(tuned.run)) if "val_dice" in line]
    assert len(val) == 3
    assert max(val) > val[0]


def test_the_card(tuned: FinetuneResult) -> None:
    head = artifact.read_card(tuned.run).head
    assert head is not None
    assert (head.name, head.kind, head.values) == ("segmentation", "mask", (0, 1, 2))
    assert artifact.read_familiarity(tuned.run) is not None


def test_masks_of_new_pictures_lie_on_their_shapes(tuned: FinetuneResult, tmp_path: Path) -> None:
    truth = pictures(tmp_path / "new")
    result = predict(tuned.run, tmp_path / "new", tmp_path / "out", explain=True)
    with Path(result.out).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["file"] for line in lines] == sorted(truth)
    for line in lines:
        mask = read(tmp_path / "out" / "masks" / line["file"]).pixels
        assert mask.shape == truth[line["file"]].shape
        dice = overlap.dice(overlap.counts(truth[line["file"]], mask, 3))
        assert dice[1:].mean() > 0.5
        assert line["unit"] == "px"
        assert int(line["size:disc"]) == (mask == 1).sum()
        picture = read(tmp_path / "out" / "heat" / line["file"]).pixels
        assert picture.shape == (*mask.shape, 3)
    assert result.predicted == {"disc": 3, "bar": 3}
    assert len({path.name for path in (tmp_path / "out").iterdir()}) == 3


def test_the_store_and_a_file_give_the_same_mask(tuned: FinetuneResult, shapes: Store, tmp_path: Path) -> None:
    """A file goes through reader, intensity and letterbox by itself, and ends where the test row did."""
    rows = shapes.rows("test")
    (tmp_path / "new").mkdir()
    for row in rows.tolist():
        write_image(tmp_path / "new" / f"{row:03d}.png", shapes.pixels(row))
    predict(tuned.run, tmp_path / "new", tmp_path / "out")
    kept = overlap.read(Path(tuned.run))
    for at, row in enumerate(rows.tolist()):
        (scan,) = read_masks(tmp_path / "out" / "masks" / f"{row:03d}.png")
        truth = shapes.mask(row)
        assert truth is not None
        found = overlap.dice(overlap.counts(truth, scan.pixels, 3))
        np.testing.assert_allclose(found, kept.dice[at], rtol=1e-6)


def test_looking_several_times_is_the_mean_over_looks(tuned: FinetuneResult, tmp_path: Path) -> None:
    truth = pictures(tmp_path / "new")
    predict(tuned.run, tmp_path / "new", tmp_path / "plain")
    predict(tuned.run, tmp_path / "new", tmp_path / "out", tta=True)
    applied = load(tuned.run).with_looks().applied
    assert [look.scale for look in applied.looks] == [1, 0.95, 0.9]
    masks = {part: [read(tmp_path / part / "masks" / name).pixels for name in truth] for part in ("plain", "out")}
    for name, mask in zip(truth, masks["out"], strict=True):
        pixels = read(tmp_path / "new" / name).pixels
        image = network_input(pixels, applied.policy.intensity(pixels), applied.policy, applied.size, applied.channels)
        with torch.inference_mode():
            scores = [look.back(applied.head(look.there(image[None]))) for look in applied.looks]
        mean = sum(each[0] for each in scores) / len(scores)
        np.testing.assert_array_equal(mask, to_image(mean, pixels.shape, applied.size).argmax(dim=0))
    assert any((one != other).any() for one, other in zip(masks["plain"], masks["out"], strict=True))


# Tiles.


def test_tiles_train_and_predict_at_the_images_own_resolution(tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store", size=(72, 80))
    overrides = (*SMALL, "train.max_steps=40", "head.input=tiles")
    result = finetune(RECIPE, store.path, tmp_path / "run", overrides=overrides)
    assert result.test["dice"][0] > 0.5
    truth = pictures(tmp_path / "new", count=1)
    write_image(tmp_path / "new" / "small.png", np.full((20, 50), 100, np.uint8))
    found = predict(result.run, tmp_path / "new", tmp_path / "out")
    assert read(tmp_path / "out" / "masks" / "0.png").pixels.shape == truth["0.png"].shape
    ((name, reason),) = found.skipped
    assert name == "small.png"
    assert "20 x 50 pixels, smaller than the model's tiles of 32 x 32" in reason


# Volumes.


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NIfTI volumes of growing discs in a turned, anisotropic grid, with masks beside them."""
    folder, stream = tmp_path_factory.mktemp("volumes") / "source", np.random.default_rng(3)
    folder.mkdir()
    affine = np.array([[0, 0, -1.5, 20], [0, 2.0, 0, -10], [3.0, 0, 0, 5], [0, 0, 0, 1.0]])
    for part in ("images", "labels"):
        (folder / part).mkdir()
    rows = ["file,patient,split"]
    for number in range(10):
        slices = [stores.shapes(stream) for _ in range(5)]
        pixels = np.stack([picture for picture, _ in slices]).astype(np.int16)
        name = f"{number}.nii.gz"
        write_nifti(folder / "images" / name, pixels, affine=affine)
        write_nifti(folder / "labels" / name, np.stack([mask for _, mask in slices]), affine=affine)
        rows.append(f"images/{name},p{number},{('train', 'train', 'train', 'val', 'test')[number % 5]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    ingest(
        folder,
        folder.parent / "store",
        modality="mri",
        labels=folder / "labels.csv",
        masks=folder / "labels",
        mask_classes=stores.SHAPES,
    )
    return folder


@pytest.mark.parametrize("slices", [1, 3])
def test_volumes_are_put_together_again(slices: int, volumes: Path, tmp_path: Path) -> None:
    overrides = (*SMALL, f"data.slices={slices}", f"backbone.in_chans={slices}", "train.max_steps=20")
    result = finetune("mri/segmentation", volumes.parent / "store", tmp_path / "run", overrides=overrides)
    assert result.unit == "mm"
    assert result.test_patients == 2
    kept = overlap.read(Path(result.run))
    assert len(kept.row) == 2, "a volume is one unit"
    found = predict(result.run, volumes / "images" / "4.nii.gz", tmp_path / "out")
    assert (found.scans, found.images) == (1, 5)
    source = nibabel.load(volumes / "images" / "4.nii.gz")
    made = nibabel.load(tmp_path / "out" / "masks" / "4.nii.gz")
    assert made.shape == source.shape
    np.testing.assert_array_equal(made.affine, source.affine)
    truth = np.asarray(nibabel.load(volumes / "labels" / "4.nii.gz").dataobj).astype(np.uint8)
    same = overlap.dice(overlap.counts(truth, np.asarray(made.dataobj).astype(np.uint8), 3))
    store = Store(volumes.parent / "store")
    test = store.index.scan[store.rows("test")]
    at = int(np.flatnonzero(kept.row == test[0])[0])
    assert np.allclose(same, kept.dice[at], atol=1e-3, equal_nan=True), "the file's mask is the one that was scored"


# Resumed, and refused.


def test_a_resumed_run_ends_with_the_same_weights(
    shapes: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (*SMALL, "train.max_steps=9", "train.save_every_steps=2", "head.ema=0.9", "head.probe_steps=3")
    whole = finetune(RECIPE, shapes.path, tmp_path / "whole", overrides=overrides)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    from sslmed.heads.segmentation import Segmentation

    step, count = Segmentation.loss, iter(range(1, 99))
    with monkeypatch.context() as patch:
        patch.setattr(Segmentation, "loss", lambda *each: killed() if next(count) == 6 else step(*each))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            finetune(RECIPE, shapes.path, tmp_path / "part", overrides=overrides)
    resumed = finetune(RECIPE, shapes.path, tmp_path / "part", overrides=overrides, resume=True)
    for name in ("model.safetensors", "head.safetensors"):
        assert sha256(Path(resumed.artifact) / name) == sha256(Path(whole.artifact) / name)
    assert resumed.test == whole.test


def test_masks_of_another_size_never_come_into_a_store(shapes: Store, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for number in range(4):
        write_image(tmp_path / "images" / f"{number}.png", np.full((30, 30), number, np.uint8))
        side = 20 if number == 2 else 30
        write_image(tmp_path / "masks" / f"{number}.png", np.ones((side, side), np.uint8))
    result = ingest(tmp_path / "images", tmp_path / "store", modality="xray", masks=tmp_path / "masks")
    (problem,) = result.problems
    assert "2.png" in problem.file


def test_an_artifact_of_another_modality_is_refused(tuned: FinetuneResult, volumes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="trained on 1-channel xray; the store holds 1-channel mri"):
        finetune(
            "mri/segmentation",
            volumes.parent / "store",
            tmp_path / "run",
            start=tuned.run,
            overrides=("data.workers=0",),
        )


def test_a_transformer_needs_no_other_recipe(shapes: Store, tmp_path: Path) -> None:
    vit = ("backbone.name=test_vit", "data.size=64", "backbone.patch=8", "train.max_steps=2", "head.layer_decay=0.7")
    result = finetune(RECIPE, shapes.path, tmp_path / "run", overrides=(*SMALL, *vit, "data.size=64"))
    assert 0 <= result.test["dice"][0] <= 1


def test_labels_cannot_be_asked_of_segmentation(shapes: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="segmentation learns the store's masks"):
        finetune(RECIPE, shapes.path, tmp_path / "run", overrides=(*SMALL, "data.target=finding"))
