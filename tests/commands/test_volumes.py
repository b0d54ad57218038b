"""CT volumes through every command: windows and slices are the same input everywhere."""

import csv
from pathlib import Path

import numpy as np
import pytest

from sslmed import artifact
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.predict import predict
from sslmed.commands.pretrain import plan, pretrain
from sslmed.config import DataError, UsageError
from sslmed.data.modality import MODALITIES, in_words, with_windows
from sslmed.data.phantom_scans import SHAPE, write_scans
from sslmed.data.store import Store
from sslmed.data.writers import write_nifti
from sslmed.evaluation import predictions

WINDOWS = ("lung", (40.0, 400.0))
PRETRAIN = (
    "backbone.name=test_resnet",
    "data.size=32",
    "data.workers=0",
    "data.windows=[lung, [40, 400]]",
    "data.slices=3",
    "backbone.in_chans=6",
    "train.max_steps=3",
    "train.batch_size=16",
    "monitor.knn_every=1",
)
FINETUNE = ("data.workers=0", "train.max_steps=4", "train.batch_size=16", "stop.check_every=2", "optim.lr=1e-3")
RECIPE = "ct/simclr_resnet18"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scans(tmp_path_factory.mktemp("ct") / "raw", "ct").folder


@pytest.fixture(scope="module")
def store(raw: Path) -> Store:
    ingest(raw, raw.parent / "store", modality="ct", labels=raw / "labels.csv")
    return Store(raw.parent / "store")


@pytest.fixture(scope="module")
def run(store: Store) -> Path:
    out = store.path.parent / "run"
    pretrain(RECIPE, store.path, out, overrides=PRETRAIN)
    return out


@pytest.fixture(scope="module")
def tuned(store: Store, run: Path) -> Path:
    out = store.path.parent / "tuned"
    finetune("ct/classification", store.path, out, start=run, overrides=FINETUNE)
    return out


def test_the_cards_say_how_an_image_becomes_channels(run: Path, tuned: Path) -> None:
    for folder in (run, tuned):
        card = artifact.read_card(folder)
        assert (card.windows, card.slices, card.backbone.in_chans) == (WINDOWS, 3, 6)
        assert card.normalisation == in_words(with_windows(MODALITIES["ct"], WINDOWS))
        readme = (artifact.resolve(folder) / "README.md").read_text()
        assert "6-channel (3 neighbouring slices) ct images" in readme
        assert "-500/1500; 40/400 HU" in readme


def test_evaluate_takes_them_from_the_card(store: Store, run: Path, tmp_path: Path) -> None:
    found = evaluate(run, store.path, out=tmp_path / "out", budgets="100%", seeds=1, replicates=100)
    assert {row.arm for row in found.rows} == {"pretrained", "random"}


def test_predict_gives_a_line_a_scan_with_the_mean_over_its_slices(
    store: Store, raw: Path, tuned: Path, tmp_path: Path
) -> None:
    result = predict(tuned, raw / "scans", tmp_path / "out")
    assert (result.scans, result.images) == (16, 16 * SHAPE[0])
    assert "16 scans by the mean over their 192 images, slices and frames" in result.lines()[0]
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        lines = {line["file"]: line for line in csv.DictReader(file)}
    with (store.path.parent / "store.private" / "key_table.csv").open(newline="") as file:
        name_of = {int(line["sample"]): line["file"] for line in csv.DictReader(file)}
    kept = predictions.read(tuned)
    assert len(kept.row) > 1, "one a scan: what is tested is what is predicted"
    for row, scores in zip(kept.row, kept.scores, strict=True):
        line = lines[Path(name_of[int(row)]).name]
        assert int(line["images"]) == SHAPE[0]
        assert float(line["probability:lesion"]) == pytest.approx(float(scores[1]), abs=2e-5)


def test_predict_skips_what_is_no_hu_by_its_reason(raw: Path, tuned: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.nii.gz").write_bytes((raw / "scans" / "001-1.nii.gz").read_bytes())
    windowed = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    write_nifti(source / "bad.nii.gz", windowed, affine=np.diag([1.0, 1, 1, 1]))
    result = predict(tuned, source, tmp_path / "out")
    assert result.scans == 1
    ((name, reason),) = result.skipped
    assert name == "bad.nii.gz"
    assert "no Hounsfield units" in reason


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.windows=[bone]", r'data\.windows is \["bone"\], but .* was trained with \["lung", \[40\.0, 400\.0\]\]'),
        ("data.slices=1", r"data\.slices is 1, but .* was trained with 3; remove data\.slices"),
    ],
)
def test_a_recipe_that_says_otherwise_than_the_card_is_refused(
    setting: str, words: str, store: Store, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        finetune("ct/classification", store.path, tmp_path / "out", start=run, overrides=[*FINETUNE, setting])
    same = [*FINETUNE, "data.slices=3", "data.windows=[lung, [40, 400]]"]
    assert finetune("ct/classification", store.path, tmp_path / "out", start=run, overrides=same).best_step > 0


def test_channels_that_do_not_fit_are_named(store: Store) -> None:
    with pytest.raises(UsageError, match=r"3 slices x 2 windows; set backbone\.in_chans=6"):
        plan(RECIPE, store.path, overrides=[*PRETRAIN, "backbone.in_chans=3"])
    start = [*FINETUNE, "backbone.name=test_resnet", "data.slices=3"]
    with pytest.raises(UsageError, match=r"3 slices; set backbone\.in_chans=3"):
        finetune("ct/classification", store.path, store.path.parent / "none", overrides=start)


def test_windows_of_another_modality_are_refused(phantom_store: Store) -> None:
    with pytest.raises(UsageError, match=r"data\.windows is for ct"):
        plan("xray/simclr_resnet18", phantom_store.path, overrides=["data.windows=[lung]"])


def test_an_artifact_that_was_normalised_otherwise_is_refused(
    store: Store, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "in_words", lambda _: "another formula")
    with pytest.raises(DataError, match=r"normalised by .*;\nthis sslmed normalises them by another formula"):
        evaluate(run, store.path, out=tmp_path / "out")
