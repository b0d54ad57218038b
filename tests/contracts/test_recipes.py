"""Every shipped recipe, by glob: a new file is tested without a line here."""

from pathlib import Path

import pytest

from sslmed import shipped as shelf
from sslmed.recipe import dump, load
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
