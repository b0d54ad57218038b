"""``sslmed recipes``: the recipes that come with the package, and whether one of your own is right."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sslmed.config import DiskError, OutputExistsError
from sslmed.durable import write_atomically
from sslmed.shipped import Shipped, find, shipped


@dataclass(frozen=True)
class Listing:
    """The shipped recipes."""

    recipes: tuple[Shipped, ...]
    next: str

    def lines(self) -> list[str]:
        """For people: name and note, a recipe a line."""
        width = max((len(recipe.name) for recipe in self.recipes), default=0)
        return [f"{recipe.name:{width}}  {recipe.note}".rstrip() for recipe in self.recipes]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "recipes": [
                {"name": recipe.name, "path": str(recipe.path), "note": recipe.note} for recipe in self.recipes
            ],
            "next": self.next,
        }


@dataclass(frozen=True)
class Shown:
    """A recipe's text: as it stands, or with every default when it was checked."""

    recipe: str
    text: str
    next: str

    def lines(self) -> list[str]:
        """For people: the YAML."""
        return self.text.splitlines()

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


@dataclass(frozen=True)
class Copied:
    """Where a copy of a recipe was written."""

    recipe: str
    file: str
    next: str

    def lines(self) -> list[str]:
        """For people."""
        return [f"{self.recipe} copied to {self.file}"]

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def ls() -> Listing:
    """Every shipped recipe with its note."""
    return Listing(tuple(shipped()), "sslmed recipes show NAME")


def show(recipe: str | Path) -> Shown:
    """The text of a recipe, comments included.

    Raises:
        UsageError: no such name.
        MissingInputError: no such file.
    """
    name = shlex.quote(Path(recipe).name)
    name = name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
    text = find(recipe).read_text(encoding="utf-8")
    return Shown(str(recipe), text, f"sslmed recipes copy {shlex.quote(str(recipe))} my_{name}")


def copy(recipe: str | Path, file: str | Path) -> Copied:
    """Copy a recipe to change it.

    Raises:
        OutputExistsError: ``file`` is there already.
        DiskError: it cannot be written.
        UsageError: no such recipe.
    """
    text, file = find(recipe).read_text(encoding="utf-8"), Path(file)
    if file.exists():
        raise OutputExistsError(f"{file} exists already and stays as it is; give another file name")
    if not file.parent.is_dir():
        raise DiskError(f"cannot write {file}: there is no folder {file.parent}; make it first")
    with write_atomically(file) as partial:
        partial.write_text(text, encoding="utf-8")
    return Copied(str(recipe), str(file), f"sslmed recipes check {shlex.quote(str(file))}")


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> Shown:
    """The recipe with every default, when it is right.

    Raises:
        UsageError: what is wrong with it.
        MissingInputError: no such file.
    """
    from sslmed.recipe import dump, load  # here, because it brings torch, which the others do without

    checked = load(recipe, overrides)
    start = {"pretrain": "", "finetune": " --from RUN"}[checked.verb]
    words = shlex.join([str(recipe), *overrides])
    return Shown(str(recipe), dump(checked), f"sslmed {checked.verb} {words} --data STORE{start} --out NEW_RUN")
