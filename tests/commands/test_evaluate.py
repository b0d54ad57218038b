"""``evaluate`` end to end on a tiny store: the table, the refusals, and what may and may not influence a score."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores

from sslmed import artifact
from sslmed.commands.evaluate import evaluate
from sslmed.config import DataError, MissingInputError, OutputExistsError, UsageError
from sslmed.data import splits
from sslmed.data.identity import SiteKey
from sslmed.data.modality import MODALITIES, in_words
from sslmed.data.store import LabelColumn, Store
from sslmed.evaluation import probes
from sslmed.evaluation.metrics import METRICS
from sslmed.models.backbones import BackboneConfig, build
from sslmed.supervised.arms import PRETRAINED
from sslmed.supervised.evaluated import EvaluateResult
from sslmed.supervised.starting import RANDOM

SITE = SiteKey(bytes(range(32)))
CONFIG = BackboneConfig(name="test_resnet", in_chans=1)
SIZE = 32
CLASSES = ("clear", "nodule")


def write_store(
    path: Path,
    *,
    patients: int = 60,
    modality: str = "xray",
    colour: bool = False,
    classes: tuple[str, ...] = CLASSES,
    test_labels: np.ndarray | None = None,
) -> Store:
    """One or two images a patient; a bright square marks the last class, so that any network can see it."""
    random = np.random.default_rng(0)
    scans, owners, labels, splits_of = [], [], [], []
    for patient in range(patients):
        label = patient // 3 % max(1, len(classes))
        for _ in range(1 + patient % 2):
            pixels = random.integers(0, 120, (40, 36, 3) if colour else (40, 36)).astype(np.uint8)
            pixels[10:20, 10:20] += np.uint8(60 * label)
            scans.append(stores.picture(pixels, SITE.content(pixels)))
            owners.append(SITE.patient(f"p{patient}"))
            labels.append(label)
            splits_of.append(splits.TEST if patient % 3 == 0 else splits.TRAIN)
    target, split = np.array(labels, np.int16), np.array(splits_of, np.uint8)
    if test_labels is not None:
        target[split == splits.TEST] = test_labels[: (split == splits.TEST).sum()]
    column = LabelColumn("finding", "class", classes)
    columns = [(column, target)] if classes else []
    return stores.write_store(path, scans, owners, modality=modality, key_id=SITE.id, split=split, labels=columns)


def write_model(
    folder: Path,
    store: Store,
    *,
    seed: int = 7,
    seen: tuple[str, ...] = ("train",),
    backbone: BackboneConfig = CONFIG,
    **changes: Any,
) -> Path:
    rows = store.rows(*seen)
    data = artifact.DataCard(
        fingerprint=store.fingerprint,
        key_id=changes.pop("key_id", store.key_id),
        split_digest=store.split_digest,
        images=len(rows),
        patients=len(np.unique(store.patients(rows))),
    )
    network = build(backbone, SIZE, seed)
    card = artifact.Card(
        backbone=backbone,
        num_features=network.num_features,
        size=SIZE,
        modality="xray",
        normalisation=in_words(MODALITIES["xray"]),
        method={"name": "simclr"},
        recipe={},
        data=data,
        steps=1,
        **changes,
    )
    artifact.write(folder, network.network, card, artifact.fingerprint(store, rows))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("evaluate") / "store")


@pytest.fixture(scope="module")
def model(store: Store) -> Path:
    run = store.path.parent / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    write_model(run / "artifact", store)
    return run


@pytest.fixture(scope="module")
def result(store: Store, model: Path) -> EvaluateResult:
    return evaluate(model, store.path, budgets="2%,20%,100%,k=3", seeds=2, replicates=100)


def test_every_arm_probe_metric_and_drawable_budget_has_a_row(result: EvaluateResult) -> None:
    found = {(row.budget, row.probe, row.arm, row.metric) for row in result.rows}
    budgets, names = ("20%", "100%", "k=3"), ("knn", "linear")
    wanted = {(b, p, a, m) for b in budgets for p in names for a in (RANDOM, PRETRAINED) for m in METRICS}
    assert found == wanted
    assert len(result.rows) == len(found)
    assert [part.budget for part in result.skipped] == ["2%"]
    assert "below one patient a class" in result.skipped[0].why
    for row in result.rows:
        assert (-1 if row.metric == "mcc" else 0) <= row.value.low <= row.value.high <= 2
        assert (row.difference is None) == (row.verdict is None) == (row.arm == RANDOM)
        assert row.patients == {"20%": 8, "100%": 40, "k=3": 6}[row.budget]
        assert row.draws == (1 if (row.budget, row.arm) == ("100%", PRETRAINED) else 2), "a random start a draw"
        assert math.isnan(row.draw_sd) == (row.draws == 1)


def test_differences_are_pretrained_less_random(result: EvaluateResult) -> None:
    for row in result.rows:
        if row.difference is not None:
            base = result.row(row.budget, row.probe, RANDOM, row.metric)
            assert row.difference.mean == pytest.approx(row.value.mean - base.value.mean)
            assert row.difference.low <= row.difference.high


def test_a_visible_class_is_found_with_all_labels(result: EvaluateResult) -> None:
    assert result.row("100%", "linear", RANDOM, "auroc").value.mean > 0.9


def test_it_says_who_was_seen_and_how_it_was_measured(result: EvaluateResult, store: Store, model: Path) -> None:
    assert (result.test_patients, result.test_images, result.seen) == (20, 30, 0)
    assert result.protocol["k"] == probes.K
    assert result.protocol["seeds"] == 2
    text = "\n".join(result.lines())
    assert "0 of 20 test patients were seen in pretraining" in text
    assert "skipped 2%: below one patient a class" in text
    assert result.next.startswith("sslmed finetune ")
    assert result.next.split("--data ")[1] == f"{store.path} --from {model} --out finetuned"


def test_files_hold_the_result(result: EvaluateResult, model: Path) -> None:
    assert result.out == str(model / "evaluation")
    assert sorted(path.name for path in (model / "evaluation").iterdir()) == ["evaluation.json", "evaluation.md"]
    content = json.loads((model / "evaluation" / "evaluation.json").read_text())
    assert content == result.as_dict() == json.loads(json.dumps(result.as_dict(), allow_nan=False))
    alone = next(row for row in content["rows"] if row["draws"] == 1)
    assert alone["draw_sd"] is None
    table = (model / "evaluation" / "evaluation.md").read_text()
    assert table.count("\n|") == len(result.rows) + 2


def test_lines_are_aligned(result: EvaluateResult) -> None:
    lines = result.lines()
    table = lines[lines.index("") + 1 :]
    table = table[: table.index("")]
    assert len(table) == 1 + 3 * 2
    assert len({line.index(part) for line in table for part in ("[", "probe") if part in line[:30]}) <= 2
    assert all(("shown" in line or "better" in line or "worse" in line) for line in table[1:])


def test_the_same_weights_differ_by_nothing_and_twice_gives_the_same(store: Store, tmp_path: Path) -> None:
    twin = write_model(tmp_path / "twin", store, seed=0)
    options: dict[str, Any] = {"budgets": "50%", "seeds": 1, "replicates": 100}  # the random start of seed 0
    first = evaluate(twin, store.path, **options)
    assert first.out == str(tmp_path / "twin-evaluation")
    for row in first.rows:
        if row.difference is not None:
            assert (row.difference.mean, row.difference.low, row.difference.high) == (0, 0, 0)
            assert row.verdict == "no difference shown (interval covers zero)"
    again = evaluate(twin, store.path, out=tmp_path / "again", **options)
    assert again.rows == first.rows


def test_test_labels_reach_no_probe(store: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test labels, the same scores: seen by comparing what the metrics receive."""
    shuffled = write_store(tmp_path / "store", test_labels=np.random.default_rng(1).integers(0, 2, 99))
    received: list[list[np.ndarray]] = []
    summarise = "sslmed.evaluation.comparison.summarise"
    monkeypatch.setattr(
        summarise, lambda arms, *_, **__: received.append([s for arm in arms.values() for s in arm]) or []
    )
    for number, each in enumerate((store, shuffled)):
        with pytest.raises(ValueError, match="max"):  # no rows: the stand-in summarises nothing
            evaluate(model, each.path, budgets="50%", seeds=2, replicates=100, out=tmp_path / f"out{number}")
    half = len(received) // 2
    for before, after in zip(received[:half], received[half:], strict=True):
        np.testing.assert_array_equal(before, after)


def test_seen_patients_are_counted_and_refused_when_strict(store: Store, tmp_path: Path) -> None:
    leaky = write_model(tmp_path / "leaky", store, seen=("train", "test"))
    options: dict[str, Any] = {"budgets": "100%", "seeds": 1, "replicates": 100}
    found = evaluate(leaky, store.path, **options)
    assert found.seen == 20
    assert "20 of 20 test patients were seen in pretraining" in "\n".join(found.lines())
    with pytest.raises(DataError, match="20 test patients were seen"):
        evaluate(leaky, store.path, strict=True, out=tmp_path / "strict", **options)
    assert not (tmp_path / "strict").exists()


def test_another_sites_key_gives_cannot_tell(store: Store, tmp_path: Path) -> None:
    foreign = write_model(tmp_path / "foreign", store, key_id="ffffffff")
    found = evaluate(foreign, store.path, budgets="100%", seeds=1, replicates=100)
    assert found.seen is None
    assert "cannot tell" in "\n".join(found.lines())
    with pytest.raises(DataError, match="cannot tell"):
        evaluate(foreign, store.path, strict=True, out=tmp_path / "strict")


def test_strict_passes_what_is_clean(store: Store, model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budgets": "100%", "seeds": 1, "replicates": 100, "out": tmp_path / "out"}
    assert evaluate(model, store.path, strict=True, **options).seen == 0


def test_a_store_that_does_not_fit_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "photos", modality="photo", colour=True)
    with pytest.raises(DataError, match="backbone was trained on 1-channel xray; the store holds 3-channel photo"):
        evaluate(model, other.path)


def test_a_fine_tuned_backbone_is_refused(store: Store, tmp_path: Path) -> None:
    head = artifact.HeadCard(name="classification", target="finding", classes=CLASSES, config={})
    tuned = write_model(tmp_path / "tuned", store, head=head)
    with pytest.raises(DataError, match="fine-tuned with labels"):
        evaluate(tuned, store.path)


def test_what_is_there_is_not_overwritten(result: EvaluateResult, store: Store, model: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="evaluation"):
        evaluate(model, store.path)
    with pytest.raises(OutputExistsError):
        evaluate(model, store.path, out=tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgets": "much"}, "not a budget"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"replicates": 10}, "at least 100"),
        ({"size": 4}, "--size is 4"),
        ({"size": (32, 4)}, "--size is 4"),
        ({"workers": -1}, "--workers is -1"),
        ({"target": "sex"}, "finding"),
    ],
)
def test_wrong_options(store: Store, model: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate(model, store.path, out=tmp_path / "out", **options)


def test_another_size_where_the_network_allows_it(store: Store, model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"budgets": "100%", "seeds": 1, "replicates": 100, "size": 48}
    assert evaluate(model, store.path, out=tmp_path / "out", **options).protocol["size"] == 48
    wide = evaluate(model, store.path, out=tmp_path / "wide", **(options | {"size": (32, 48)}))
    assert json.loads((tmp_path / "wide" / "evaluation.json").read_text())["protocol"]["size"] == [32, 48]
    assert wide.protocol["size"] == (32, 48)
    fixed = write_model(tmp_path / "vit", store, backbone=BackboneConfig(name="test_vit3", in_chans=1))
    with pytest.raises(UsageError, match="test_vit3 takes images of 32 x 32 pixels; --size 48 x 48"):
        evaluate(fixed, store.path, **options)


def test_missing_inputs(store: Store, model: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError):
        evaluate(tmp_path / "nowhere", store.path)
    with pytest.raises(MissingInputError):
        evaluate(model, tmp_path / "nowhere")


def test_labels_that_no_score_can_be_made_of(store: Store, model: Path, tmp_path: Path) -> None:
    bare = write_store(tmp_path / "bare", classes=())
    with pytest.raises(DataError, match=r"no labels.*sslmed label .*--labels CSV"):
        evaluate(model, bare.path, out=tmp_path / "out")
    single = write_store(tmp_path / "single", test_labels=np.zeros(99, np.int16))
    with pytest.raises(DataError, match="test patients have clear"):
        evaluate(model, single.path, out=tmp_path / "out")
    with pytest.raises(DataError, match="no budget can be drawn"):
        evaluate(model, store.path, budgets="1%,k=99", out=tmp_path / "out")


def test_three_classes_one_of_them_absent_from_test(model: Path, tmp_path: Path) -> None:
    labels = np.arange(99) % 2
    three = write_store(tmp_path / "three", patients=61, classes=("a", "b", "c"), test_labels=labels)
    found = evaluate(model, three.path, budgets="100%", seeds=1, replicates=100, out=tmp_path / "out")
    assert found.notes == ("note: no test patient is c",)
    assert all(np.isfinite(row.value.mean) for row in found.rows), "never a silent nan"
    assert "mean over classes" in found.lines()[0]


def test_a_damaged_artifact_is_refused(store: Store, tmp_path: Path) -> None:
    damaged = write_model(tmp_path / "damaged", store)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="damaged"):
        evaluate(damaged, store.path)
