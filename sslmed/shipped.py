"""The recipes that come with the package, found by name without reading them (so that listing them needs no torch)."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from sslmed.config import MissingInputError, UsageError


@dataclass(frozen=True)
class Shipped:
    """One recipe of the package. ``name`` is MODALITY/METHOD_BACKBONE; ``note`` is the first line of its file."""

    name: str
    path: Path
    note: str


def folder() -> Path:
    """Where the recipes lie: inside the installed package, or at the top of a source checkout."""
    package = Path(__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> list[Shipped]:
    """Every recipe of the package, sorted by name."""
    home = folder()
    return [
        Shipped(path.relative_to(home).with_suffix("").as_posix(), path, _note(path))
        for path in sorted(home.glob("*/*.yaml"))
    ]


def find(source: str | Path) -> Path:
    """The file of a recipe, given as a path or as a shipped name.

    Raises:
        MissingInputError: the path of a YAML file that does not exist.
        UsageError: no such name.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise MissingInputError(f"there is no recipe file {path}; sslmed recipes ls shows those that need none")
    names = {recipe.name: recipe.path for recipe in shipped()}
    if str(source) in names:
        return names[str(source)]
    near = difflib.get_close_matches(str(source), names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "sslmed recipes ls shows the names."
    raise UsageError(f"'{source}' is neither a recipe file nor a shipped recipe; {hint}")


def _note(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.removeprefix("#").strip() if first.startswith("#") else ""
