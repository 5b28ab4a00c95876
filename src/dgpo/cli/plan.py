"""The command `dgpo plan`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from dgpo.cli.checks import load_recipe
from dgpo.cli.options import Overrides, RecipeName


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    memory: Annotated[
        float | None, Option("--memory", min=0, metavar="GB", help="Refuse a run that needs more.")
    ] = None,
) -> None:
    """Say what a run will cost: parameters, passes, memory. No weights are loaded."""
    settings = load_recipe(recipe, overrides)
    from dgpo.models.load import quiet
    from dgpo.planning import make_plan

    quiet()
    made = make_plan(settings)
    print(made)
    if memory is not None:
        made.refuse_beyond(int(memory * 1e9))
