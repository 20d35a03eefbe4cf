"""halfbyte recipes."""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli.terminal import out, write_json


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Show this one; or a recipe file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON instead of a table or YAML.")] = False,
) -> None:
    """List the recipes that come with halfbyte, or show one with every default written out.

    \b
    halfbyte recipes
    halfbyte recipes gptq-w4a16 > mine.yaml     to start one of your own
    """
    # The recipes know their methods, which import PyTorch: the help must not wait for it.
    from halfbyte.cli import tables
    from halfbyte.recipe import Recipe, shipped

    if name is None:
        known = {each: Recipe.load(each) for each in shipped()}
        if json:
            write_json([recipe.model_dump(mode="json") for recipe in known.values()], Path("-"))
        else:
            out.print(tables.recipes(known))
        return
    recipe = Recipe.load(name)
    if json:
        write_json(recipe.model_dump(mode="json"), Path("-"))
    else:
        typer.echo(recipe.dump(), nl=False)
