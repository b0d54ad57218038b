"""Findings from a table to a model's answers, what its heat maps explain, and training with very little."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stores
import torch
from safetensors.torch import load_file

from sslmed.commands import predict as command
from sslmed.commands.finetune import FinetuneResult, finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.predict import predict
from sslmed.config import DataError
from sslmed.data import splits
from sslmed.data.intensity import Intensity
from sslmed.data.readers import read
from sslmed.data.shards.format import LabelColumn
from sslmed.data.shards.tables import NewScan
from sslmed.data.store import Store
from sslmed.data.views import Pixels
from sslmed.data.writers import write_image, write_nifti
from sslmed.evaluation import metrics
from sslmed.recipe import load_finetune
from sslmed.run import read_metrics
from sslmed.supervised import explained
from sslmed.supervised.model import Model, load
from sslmed.supervised.scoring import LabelScorer

RECIPE = "xray/classification"
SMALL = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "train.batch_size=8",
    "train.max_steps=4",
    "train.precision=32",
    "stop.check_every=2",
)
SIDES = ("train", "train", "val", "test")
PATIENTS = 56  # of which 14 are in the test: 8 of one site, 6 of the other


def drawn(number: int, left: int, right: int) -> np.ndarray:
    """Finding "a" is bright on the left, "b" on the right."""
    pixels = np.random.default_rng(number).integers(40, 80, (28, 36), dtype=np.uint8)
    pixels[6:20, 3:12] += 120 * np.uint8(left)
    pixels[6:20, 24:33] += 120 * np.uint8(right)
    return pixels


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Pictures of two findings, some of them blank, ingested with their table."""
    folder = tmp_path_factory.mktemp("findings")
    (folder / "images").mkdir()
    lines = [["file", "patient", "split", "label:a", "label:b", "meta:site"]]
    for number in range(PATIENTS):
        of_side = number // 4
        left, right = of_side % 2, of_side // 2 % 2
        write_image(folder / "images" / f"{number:02d}.png", drawn(number, left, right))
        told = ["" if of_side % 7 == 5 else str(left), "" if of_side % 7 == 6 else str(right)]
        lines.append([f"{number:02d}.png", f"p{number}", SIDES[number % 4], *told, "near" if of_side < 8 else "far"])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    ingest(folder / "images", folder / "store", modality="xray", labels=folder / "labels.csv")
    return Store(folder / "store")


@pytest.fixture(scope="module")
def run(store: Store) -> FinetuneResult:
    """Four steps. Read it, never change it."""
    return finetune(RECIPE, store.path, store.path.parent / "run", overrides=SMALL)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four new pictures, of every combination."""
    folder = tmp_path_factory.mktemp("new")
    for number in range(4):
        write_image(folder / f"{number}.png", drawn(100 + number, number % 2, number // 2))
    return folder


def table(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# The run.


def test_the_result(run: FinetuneResult) -> None:
    assert (run.kind, run.target, run.classes) == ("findings", "a, b", ("a", "b"))
    assert set(run.by_class) == {"a", "b"}
    assert run.test["auroc"][0] == pytest.approx(np.mean([run.by_class[name]["auroc"][0] for name in "ab"]))
    assert run.test_images == 14
    assert run.thresholds is not None
    assert len(run.thresholds) == 2


def test_the_predictions_beside_it(run: FinetuneResult, store: Store) -> None:
    lines = table(Path(run.run) / "test_predictions.csv")
    columns = [f"{what}:{name}" for what in ("target", "probability", "called") for name in "ab"]
    assert set(lines[0]) == {"row", "patient", *columns}
    rows = store.rows("test")
    words = {-1: "", 0: "0", 1: "1"}
    for at, name in enumerate("ab"):
        truth = store.target(name)[rows]
        assert {-1, 0, 1} == set(truth.tolist())
        assert [line[f"target:{name}"] for line in lines] == [words[value] for value in truth.tolist()]
        scores = np.array([float(line[f"probability:{name}"]) for line in lines])
        assert run.thresholds is not None
        assert [line[f"called:{name}"] for line in lines] == [str(int(s >= run.thresholds[at])) for s in scores]
        known = truth >= 0
        auroc = metrics.METRICS["auroc"](truth[known], np.stack([1 - scores, scores], axis=1)[known])
        assert run.by_class[name]["auroc"][0] == pytest.approx(float(auroc))


def test_subgroups_of_a_meta_column(run: FinetuneResult) -> None:
    assert [(each.column, each.name, each.patients, each.images) for each in run.subgroups] == [
        ("site", "far", 6, 6),
        ("site", "near", 8, 8),
    ]
    assert all(set(each.scores) == set(run.test) for each in run.subgroups)
    page = (Path(run.run) / "test_scores.md").read_text()
    assert "## By class" in page
    _, after = page.split("## By site")
    assert "| far (6 of 6 patients) | " in after
    assert "| near (8 of 8 patients) | " in after


# What it says of new pictures.


def with_thresholds(patch: pytest.MonkeyPatch, *cuts: float) -> None:
    """Any model that ``predict`` loads calls from these on."""

    def other(path: str | Path) -> Model:
        model = load(path)
        return replace(model, about=model.about.model_copy(update={"thresholds": cuts}))

    patch.setattr(command, "load", other)


def test_findings_are_called_by_the_thresholds_of_the_card(
    run: FinetuneResult, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = predict(run.run, new, tmp_path / "first")
    cuts = load(run.run).about.thresholds
    assert cuts == pytest.approx(run.thresholds)
    scores = [[float(line[f"probability:{name}"]) for name in "ab"] for line in table(result.out)]
    for line, each in zip(table(result.out), scores, strict=True):
        assert line["predicted"] == "; ".join(n for n, s, cut in zip("ab", each, cuts or (), strict=True) if s >= cut)
    # Between the second and third of each, so that each is called in two.
    middles = [float(np.median([each[at] for each in scores])) for at in range(2)]
    for cuts, words in (
        (middles, ["; ".join(n for n, s, cut in zip("ab", each, middles, strict=True) if s >= cut) for each in scores]),
        ([0.0, 0.0], ["a; b"] * 4),
        ([2.0, 2.0], [""] * 4),
    ):
        with monkeypatch.context() as patch:
            with_thresholds(patch, *cuts)
            result = predict(run.run, new, tmp_path / str(cuts[0]))
        assert [line["predicted"] for line in table(result.out)] == words
        called = {name: sum(name in each.split("; ") for each in words) for name in "ab"}
        assert result.predicted == {name: count for name, count in called.items() if count}


# What the heat maps explain.


@pytest.fixture
def explains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The labels that heat maps were made of, in order."""
    labels: list[int] = []
    heat_on = command.heat_on

    def noted(model: Model, pixels: Pixels, intensity: Intensity, label: int) -> Pixels:
        labels.append(label)
        return heat_on(model, pixels, intensity, label)

    monkeypatch.setattr(command, "heat_on", noted)
    return labels


def pictures(folder: Path, new: Path) -> list[np.ndarray]:
    """The heat maps, each of its picture's own size."""
    heat = sorted((folder / "heat").iterdir())
    assert [path.name for path in heat] == [path.name for path in sorted(new.iterdir())]
    found = [read(path).pixels for path in heat]
    assert [each.shape for each in found] == [(*read(path).pixels.shape, 3) for path in sorted(new.iterdir())]
    assert {each.dtype.name for each in found} == {"uint8"}
    return found


@pytest.mark.parametrize(
    ("cuts", "among"), [((2.0, 0.0), [1]), ((0.0, 2.0), [0]), ((0.0, 0.0), [0, 1]), ((2, 2), [0, 1])]
)
def test_the_likeliest_called_finding_is_explained(
    cuts: tuple[float, float],
    among: list[int],
    run: FinetuneResult,
    new: Path,
    explains: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_thresholds(monkeypatch, *cuts)
    result = predict(run.run, new, tmp_path / "out", explain=True)
    pictures(tmp_path / "out", new)
    scores = [[float(line[f"probability:{name}"]) for name in "ab"] for line in table(result.out)]
    assert explains == [max(among, key=lambda label: each[label]) for each in scores]


@pytest.mark.parametrize(("cut", "label"), [(0.0, 1), (2.0, 0)])
def test_the_called_class_is_explained_not_the_likeliest(
    cut: float,
    label: int,
    tuned: FinetuneResult,
    new: Path,
    explains: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_thresholds(monkeypatch, 1 - cut, cut)
    result = predict(tuned.run, new, tmp_path / "out", explain=True)
    pictures(tmp_path / "out", new)
    assert result.predicted == {("clear", "nodule")[label]: 4}
    assert explains == [label] * 4


def of_slices(path: Path) -> Store:
    """Volumes of two classes, a patient each."""
    scans = [
        NewScan(volume(number), Intensity(0, 255, 100, 50), f"{number:064x}", kind="volume") for number in range(16)
    ]
    sides = (splits.TRAIN, splits.TRAIN, splits.VAL, splits.TEST)
    return stores.write_store(
        path,
        scans,
        [f"{number:032x}" for number in range(16)],
        modality="mri",
        split=np.repeat(np.array([sides[number % 4] for number in range(16)], np.uint8), 4),
        labels=[
            (LabelColumn("side", "class", ("left", "right")), np.repeat(np.arange(16) // 4 % 2, 4).astype(np.int16))
        ],
    )


def volume(number: int) -> np.ndarray:
    """Four slices (H, W) that differ."""
    return np.random.default_rng(number).integers(40, 200, (4, 20, 24), dtype=np.uint8)


def test_of_neighbouring_slices_the_middle_one_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = of_slices(tmp_path / "store")
    overrides = (*SMALL, "data.slices=3", "backbone.in_chans=3", "train.max_steps=2")
    result = finetune("mri/classification", store.path, tmp_path / "run", overrides=overrides)
    (tmp_path / "new").mkdir()
    pixels = volume(99)
    write_nifti(tmp_path / "new" / "volume.nii", pixels.astype(np.int16), affine=np.diag([3.0, 1, 1, 1])[[2, 1, 0, 3]])
    write_image(tmp_path / "new" / "picture.png", pixels[0])
    monkeypatch.setattr(explained, "heat_maps", lambda *given: torch.zeros(1, *given[2].shape[2:]))
    shown: list[Pixels] = []
    heat_on = command.heat_on

    def noted(model: Model, seen: Pixels, intensity: Intensity, label: int) -> Pixels:
        shown.append(seen)
        return heat_on(model, seen, intensity, label)

    monkeypatch.setattr(command, "heat_on", noted)
    found = predict(result.run, tmp_path / "new", tmp_path / "out", explain=True)
    assert (found.scans, found.images) == (2, 5)
    assert [path.name for path in sorted((tmp_path / "out" / "heat").iterdir())] == ["picture.png", "volume.png"]
    for name, seen in zip(("picture", "volume"), shown, strict=True):
        made = read(tmp_path / "out" / "heat" / f"{name}.png").pixels
        assert seen.shape == made.shape == (20, 24, 3)
        assert (made == made[..., :1]).all(), "grey, not three slices as three colours"
        order = np.argsort(seen[..., 1].ravel(), kind="stable")
        assert (np.diff(made[..., 0].ravel()[order].astype(int)) >= 0).all(), "the middle slice"
    assert not (shown[1] == shown[1][..., :1]).all()


# Little to learn from.


def scripted(patch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    """Val says these at the checks, in order; the last goes on."""
    said = iter(scores)
    patch.setattr(LabelScorer, "val", lambda _: next(said))


def test_a_patience_shorter_than_the_probe_still_trains_the_backbone(
    store: Store, run: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("data.workers=0", "train.precision=32", "train.batch_size=8", "train.max_steps=8", "optim.lr=1e-2")
    probe = ("head.probe_steps=5", "stop.patience=1", "stop.check_every=1")
    scripted(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1, 0.6, 0.7, 0.8])
    result = finetune(RECIPE, store.path, tmp_path / "run", start=run.run, overrides=(*overrides, *probe))
    assert [line["step"] for line in read_metrics(Path(result.run)) if "val_auroc" in line] == list(range(1, 9))
    assert result.best_step == 8
    before, after = (load_file(Path(each) / "artifact" / "model.safetensors") for each in (run.run, result.run))
    changed = [name for name in before if name.endswith("weight") and not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if name.endswith("weight")]


def test_patience_counts_once_the_probe_is_over(
    store: Store, run: FinetuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("data.workers=0", "train.precision=32", "train.batch_size=8", "train.max_steps=8")
    probe = ("head.probe_steps=3", "stop.patience=2", "stop.check_every=1")
    scripted(monkeypatch, [0.5, 0.4, 0.3, 0.2, 0.1])
    result = finetune(RECIPE, store.path, tmp_path / "run", start=run.run, overrides=(*overrides, *probe))
    assert [line["step"] for line in read_metrics(Path(result.run)) if "val_auroc" in line] == [1, 2, 3, 4, 5]
    assert result.best_step == 1


def test_one_image_is_too_few(tmp_path: Path) -> None:
    shapes = stores.write_shapes(tmp_path / "store")
    with pytest.raises(DataError, match=r"one labelled train image is not enough.* larger labels\.budget") as caught:
        finetune("xray/segmentation", shapes.path, tmp_path / "run", overrides=(*SMALL, "labels.budget=k=1"))
    assert caught.value.exit_code == 65
    assert not (tmp_path / "run").exists()


def test_parts_of_a_step_keep_two_images(store: Store, tmp_path: Path) -> None:
    wanted = ("train.batch_size=64", "train.accumulate=32", "labels.budget=k=2", "train.max_steps=2")
    result = finetune(RECIPE, store.path, tmp_path / "run", overrides=(*SMALL, *wanted))
    assert 4 <= result.train_images < 16
    kept = load_finetune(Path(result.run) / "recipe.yaml").train
    assert kept.accumulate == result.train_images // 2
    assert kept.batch_size == 2 * kept.accumulate
    assert finetune(RECIPE, store.path, tmp_path / "run", overrides=(*SMALL, *wanted), resume=True).test == result.test
    again = finetune(Path(result.run) / "recipe.yaml", store.path, tmp_path / "again")
    assert again.test == result.test
