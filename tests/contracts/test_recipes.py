"""Every shipped recipe, by glob: a new file is tested without a line here."""

from pathlib import Path

import pytest

from sslmed import shipped as shelf
from sslmed.commands.finetune import finetune
from sslmed.commands.ingest import ingest
from sslmed.commands.pretrain import pretrain
from sslmed.data.modality import MODALITIES
from sslmed.data.phantom_scans import PhantomScans, write_scans
from sslmed.data.phantoms import Phantoms, write_phantoms
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


class Stores:
    """A store of each modality's own phantoms, labelled and with masks; made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, modality: str) -> Path:
        path = self.folder / modality / "store"
        if not path.exists():
            drawn: Phantoms | PhantomScans
            if modality == "xray":
                drawn = write_phantoms(self.folder / modality / "raw", patients=40, masks=True)
            else:
                drawn = write_scans(self.folder / modality / "raw", modality, masks=True)
            result = ingest(drawn.folder, path, modality=modality, labels=drawn.labels, masks=drawn.masks)
            assert result.scans == (drawn.images if isinstance(drawn, Phantoms) else drawn.scans)
            labelled = [count for name, count in result.labels["finding"].items() if name != "(blank)"]
            assert result.masks == sum(labelled), "whatever has a label has a mask"
            assert {problem.code for problem in result.problems} <= {"image_without_mask"}
        return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return Stores(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize("name", MODALITIES)
def test_every_modality_has_the_recipes_that_commands_point_to(name: str) -> None:
    names = {f"{name}/{each}" for each in ("simclr_resnet18", "classification", "segmentation")}
    assert names <= {recipe.name for recipe in shipped()}


@pytest.mark.parametrize("recipe", shipped(), ids=lambda recipe: recipe.name)
def test_it_runs_two_steps(recipe: Shipped, stores: Stores, tmp_path: Path) -> None:
    store = stores(recipe.name.split("/")[0])
    small = ["train.max_steps=2", "train.batch_size=8", "data.workers=0", "data.size=32", "train.precision=32"]
    if isinstance(load(recipe.name), PretrainRecipe):
        assert pretrain(recipe.name, store, tmp_path / "run", overrides=small).steps == 2
    else:
        channels = int(Store(store).index.channels.max())
        network = ["backbone.name=test_resnet", f"backbone.in_chans={channels}"]
        done = finetune(recipe.name, store, tmp_path / "run", overrides=[*small, *network])
        assert done.best_step == 2
