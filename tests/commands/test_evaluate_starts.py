"""``evaluate`` with more starts, and fine-tuned: one table, equal budgets, paired by patient."""

import json
from pathlib import Path

import numpy as np
import pytest
import stores
from safetensors.torch import save_file

from sslmed import artifact
from sslmed.commands.evaluate import evaluate
from sslmed.commands.finetune import finetune
from sslmed.commands.pretrain import PretrainResult
from sslmed.config import DataError, MissingInputError, OutputExistsError, UsageError
from sslmed.data.modality import in_words, named
from sslmed.data.store import Store
from sslmed.evaluation import overlap, predictions
from sslmed.models.backbones import BackboneConfig, build
from sslmed.run import read
from sslmed.supervised import study
from sslmed.supervised.evaluated import EvaluateResult

TUNE = (
    "data.workers=0",
    "train.max_steps=2",
    "train.batch_size=8",
    "train.precision=32",
    "stop.check_every=2",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight file of the network, from somewhere else."""
    path = tmp_path_factory.mktemp("weights") / "foreign.safetensors"
    network = build(BackboneConfig(name="test_resnet"), 32, seed=5).network
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def fine_tuned(
    phantom_store: Store, pretrained: PretrainResult, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> EvaluateResult:
    """Three starts, two budgets, two seeds. Read it, never change it."""
    out = tmp_path_factory.mktemp("study") / "out"
    return evaluate(
        pretrained.run,
        phantom_store.path,
        beside=[weights],
        recipe="xray/classification",
        overrides=TUNE,
        budgets="k=2,100%",
        seeds=2,
        replicates=100,
        out=out,
    )


def test_probes_stand_beside_every_start(
    phantom_store: Store, pretrained: PretrainResult, weights: Path, tmp_path: Path
) -> None:
    beside = [weights, pretrained.artifact]
    found = evaluate(
        pretrained.run, phantom_store.path, beside=beside, budgets="100%", seeds=1, replicates=100, out=tmp_path / "out"
    )
    names = {row.arm for row in found.rows}
    assert names == {"random", "pretrained", "foreign.safetensors", "artifact"}
    twin = found.row("100%", "linear", "artifact", "auroc")
    assert twin.value == found.row("100%", "linear", "pretrained", "auroc").value, "the same weights"
    assert found.seen_by["foreign.safetensors"] is None
    lines = "\n".join(found.lines())
    assert "foreign.safetensors: cannot tell whether pretraining has seen them" in lines
    with pytest.raises(DataError, match=r"cannot tell .* \(foreign\.safetensors\)"):
        evaluate(pretrained.run, phantom_store.path, beside=beside, strict=True, out=tmp_path / "strict")


def test_every_cell_is_a_run_equal_in_all_but_its_start(fine_tuned: EvaluateResult, phantom_store: Store) -> None:
    runs = Path(fine_tuned.out) / study.RUNS
    arms = ("random", "pretrained", "foreign.safetensors")
    assert {path.name for path in runs.iterdir()} == {
        f"{a}-{b}-{s}" for a in arms for b in ("k=2", "100%") for s in (0, 1)
    }
    cards = {arm: artifact.read_card(runs / f"{arm}-k=2-1") for arm in arms}
    recipes = [{key: value for key, value in card.recipe.items() if key != "backbone"} for card in cards.values()]
    assert recipes[0] == recipes[1] == recipes[2]
    assert len({card.data.patients for card in cards.values()}) == 1
    assert read(runs / "random-k=2-0")["start_weights"] == "random"
    assert len({read(runs / f"{arm}-k=2-0")["start_weights"] for arm in arms}) == 3


def test_the_table_is_of_the_runs(fine_tuned: EvaluateResult, phantom_store: Store) -> None:
    row = fine_tuned.row("k=2", study.FINETUNED, "pretrained", "auroc")
    runs = [Path(fine_tuned.out) / study.RUNS / f"pretrained-k=2-{seed}" for seed in (0, 1)]
    values = [read(run)["result"]["test"]["auroc"][0] for run in runs]
    assert row.value.mean == pytest.approx(np.mean(values))
    assert (row.patients, row.draws) == (4, 2)
    assert row.difference is not None
    base = fine_tuned.row("k=2", study.FINETUNED, "random", "auroc").value
    assert row.difference.mean == pytest.approx(row.value.mean - base.mean)
    content = json.loads((Path(fine_tuned.out) / "evaluation.json").read_text())
    assert len(content["rows"]) == len(fine_tuned.rows)
    assert predictions.read(runs[0]).same_test(predictions.read(runs[1]))
    assert "each fine-tuned by the same recipe" in "\n".join(fine_tuned.lines())


def test_thresholds_of_a_run_count_in_the_table(fine_tuned: EvaluateResult) -> None:
    runs = [Path(fine_tuned.out) / study.RUNS / f"random-100%-{seed}" for seed in (0, 1)]
    values = [read(run)["result"]["test"]["balanced_accuracy"][0] for run in runs]
    row = fine_tuned.row("100%", study.FINETUNED, "random", "balanced_accuracy")
    assert row.value.mean == pytest.approx(np.mean(values))


def test_it_goes_on_where_it_was(
    phantom_store: Store, pretrained: PretrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"recipe": "xray/classification", "overrides": TUNE, "budgets": "k=1", "seeds": 1, "replicates": 100}
    out = tmp_path / "out"
    conclude = study.conclude

    def once(job: object, run: object, start: str, tuned: object) -> object:
        if start != "random":
            raise KeyboardInterrupt
        return conclude(job, run, start, tuned)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(study, "conclude", once)
        with pytest.raises(KeyboardInterrupt):
            evaluate(pretrained.run, phantom_store.path, out=out, **options)
    first = (out / study.RUNS / "random-k=1-0" / "run.json").stat().st_mtime_ns
    with pytest.raises(OutputExistsError, match="go on with it by --resume"):
        evaluate(pretrained.run, phantom_store.path, out=out, **options)
    found = evaluate(pretrained.run, phantom_store.path, out=out, resume=True, **options)
    assert {row.arm for row in found.rows} == {"random", "pretrained"}
    assert (out / "evaluation.md").is_file()
    assert (out / study.RUNS / "random-k=1-0" / "run.json").stat().st_mtime_ns == first, "a finished run is not touched"


def test_masks_from_random_and_a_file(weights: Path, tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store")
    model = write_backbone(tmp_path / "model", store)
    found = evaluate(
        model,
        store.path,
        beside=[weights],
        recipe="xray/segmentation",
        overrides=TUNE,
        budgets="k=3",
        seeds=1,
        replicates=100,
        out=tmp_path / "out",
    )
    assert found.kind == "mask"
    row = found.row("k=3", study.FINETUNED, "foreign.safetensors", "dice:disc")
    assert row.verdict is not None
    kept = overlap.read(tmp_path / "out" / study.RUNS / "foreign.safetensors-k=3-0")
    assert row.value.mean == pytest.approx(overlap.measures(stores.SHAPES)["dice:disc"](kept, None))
    assert "Dice, disc" in (tmp_path / "out" / "evaluation.md").read_text()
    assert "Dice with 95 % intervals of masks" in "\n".join(found.lines())


def write_backbone(folder: Path, store: Store) -> Path:
    config = BackboneConfig(name="test_resnet")
    backbone, rows = build(config, 32, seed=7), store.rows("train")
    card = artifact.Card(
        backbone=config,
        num_features=backbone.num_features,
        size=32,
        modality="xray",
        normalisation=in_words(named("xray")),
        method={"name": "simclr"},
        recipe={},
        data=artifact.describe(store, rows),
        steps=1,
    )
    artifact.write(folder, backbone.network, card, artifact.fingerprint(store, rows))
    return folder


def test_masks_without_labels_are_compared_by_fine_tuning(tmp_path: Path) -> None:
    store = stores.write_shapes(tmp_path / "store")
    with pytest.raises(DataError, match=r"has masks but no labels.*\n?.*--recipe xray/segmentation"):
        evaluate(write_backbone(tmp_path / "model", store), store.path)


def test_what_does_not_go_together(
    phantom_store: Store, pretrained: PretrainResult, tuned_run: str, tmp_path: Path
) -> None:
    data, out = phantom_store.path, tmp_path / "out"
    with pytest.raises(UsageError, match="give --recipe too"):
        evaluate(pretrained.run, data, overrides=["train.max_steps=2"], out=out)
    with pytest.raises(UsageError, match="--target is for probes"):
        evaluate(pretrained.run, data, recipe="xray/classification", target="finding", out=out)
    with pytest.raises(UsageError, match="--seeds is 0"):
        evaluate(pretrained.run, data, seeds=0, out=out)
    with pytest.raises(MissingInputError, match="no run, artifact or weight file at absent"):
        evaluate(pretrained.run, data, beside=["absent"], out=out)
    with pytest.raises(DataError, match="fine-tuned with labels"):
        evaluate(pretrained.run, data, beside=[tuned_run], out=out)
    assert not out.exists()


@pytest.fixture(scope="module")
def tuned_run(phantom_store: Store, pretrained: PretrainResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("tuned-start") / "run"
    return finetune("xray/classification", phantom_store.path, out, start=pretrained.run, overrides=TUNE).run
