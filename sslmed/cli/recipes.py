"""``sslmed recipes``: list, show, copy and check."""

from pathlib import Path
from typing import Annotated

import typer

from sslmed.cli.options import Json, Overrides, Recipe
from sslmed.cli.showing import show

recipes_app = typer.Typer(help="List, show, copy and check recipes.", no_args_is_help=True)


@recipes_app.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from sslmed.commands import recipes

    show(recipes.ls(), as_json)


@recipes_app.command("show")
def recipesshow(recipe: Recipe, as_json: Json = False) -> None:
    """Print a recipe."""
    from sslmed.commands import recipes

    show(recipes.show(recipe), as_json)


@recipes_app.command("copy")
def recipes_copy(
    recipe: Recipe,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that does not exist yet.")],
    as_json: Json = False,
) -> None:
    """Copy a recipe to change it."""
    from sslmed.commands import recipes

    show(recipes.copy(recipe, file), as_json)


@recipes_app.command("check")
def recipes_check(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what is wrong with a recipe, or print it with every default."""
    from sslmed.commands import recipes

    show(recipes.check(recipe, overrides or ()), as_json)
