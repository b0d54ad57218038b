"""Every shipped recipe, by glob: a new file is tested without a line here."""

from pathlib import Path

import pytest

from sslmed import shipped as shelf
from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.pretrain import pretrain
from sslmed.data.modality import MODALITIES
from sslmed.data.phantom_scans import write_scans
from sslmed.data.store import Store
from sslmed.recipe import PretrainRecipe, dump, load
from sslmed.shipped import Shipped, shipped

TOP = Path(__file__).parents[2] / "recipes"


def test_all_files_are_found() -> None:
    assert {recipe.path.relative_to(shelf.folder()) for recipe in shipped()} == {
        path.relative_to(TOP) for path in TOP.rglob("*") if path.is_file()
    }


def test_an_installed_package_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "__file__", str(tmp_path / "shipped.py"))
    (tmp_path / "_recipes" / "xray").mkdir(parents=True)
    (tmp_path / "_recipes" / "xray" / "one.yaml").write_text("# the note\nmethod: {name: simclr}\n", encoding="utf-8")
    assert [(recipe.name, recipe.note) for recipe in shipped()] == [("xray/one", "the note")]


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_a_shipped_recipe(recipe: Shipped, tmp_path: Path) -> None:
    assert recipe.note, "the first line is a comment: what it is for, licence of the data it was tried on, score"
    loaded = load(recipe.name)
    copy = tmp_path / "resolved.yaml"
    copy.write_text(dump(loaded), encoding="utf-8")
    assert load(copy) == loaded


@pytest.fixture(scope="module")
def stores(phantom_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A store of each modality's own phantoms."""
    found = {"xray": phantom_store.path}
    for name in MODALITIES.keys() - found.keys():
        folder = tmp_path_factory.mktemp(name)
        drawn = write_scans(folder / "raw", name)
        found[name] = folder / "store"
        result = ingest(drawn.folder, found[name], modality=name, labels=drawn.labels)
        assert result.scans == drawn.scans, [skipped.reason for skipped in result.skipped]
    return found


@pytest.mark.parametrize("name", MODALITIES)
def test_every_modality_has_the_recipes_that_commands_point_to(name: str) -> None:
    assert {f"{name}/simclr_resnet18", f"{name}/classification"} <= {recipe.name for recipe in shipped()}


def test_every_shipped_recipe_runs_two_steps(stores: dict[str, Path], tmp_path: Path) -> None:
    settings = ["train.max_steps=2", "train.batch_size=8", "data.workers=0"]
    for each in shipped():
        recipe = load(each.name)
        out = tmp_path / each.name.replace("/", "-")
        if isinstance(recipe, PretrainRecipe):
            done = pretrain(each.name, stores[each.name.split("/")[0]], out, overrides=[*settings, "data.size=32"])
            assert done.steps == 2
        else:
            channels = int(Store(stores[each.name.split("/")[0]]).index.channels.max())
            small = [*settings, "backbone.name=test_resnet", f"backbone.in_chans={channels}", "data.size=32"]
            assert finetune(each.name, stores[each.name.split("/")[0]], out, overrides=small).best_step == 2
