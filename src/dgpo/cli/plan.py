"""`dgpo plan`: what a recipe will cost, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A file, a recipe's name, or the run.json of a run folder."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as group_size=24."),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0, metavar="GB", help="Refuse a run that needs more."),
    ] = None,
) -> None:
    """Say what a run will cost: parameters, passes, memory; no weights are loaded."""
    from dgpo.recipe import Recipe

    settings = Recipe.load(recipe, overrides or [])
    from dgpo.models.load import quiet

    quiet()
    from dgpo.planning import make_plan

    made = make_plan(settings)
    typer.echo(str(made))
    if memory is not None:
        made.refuse_beyond(int(memory * 1e9))
