"""`dgpo list`: the names that recipes and commands take, and which rewards are ready."""

from __future__ import annotations

from typing import Annotated

import typer

from dgpo import registry
from dgpo.errors import UserError
from dgpo.recipe.files import recipe_names, summary
from dgpo.reward_facts import FACTS, Facts

PIPED_WIDTH = 160
"""Columns of the table where the output is no terminal."""


def names(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[models|algorithms|rewards|benchmarks|prompts|recipes]",
            help="One of them; default: all. Of rewards: which are ready, licences, ranges.",
        ),
    ] = None,
) -> None:
    """Show the names that recipes and commands take."""
    tables = {
        "models": registry.MODELS,
        "algorithms": registry.ALGORITHMS,
        "rewards": registry.REWARDS,
        "benchmarks": registry.BENCHMARKS,
        "prompts": registry.PROMPTS,
        "recipes": {name: summary(file) for name, file in recipe_names().items()},
    }
    if kind is not None and kind not in tables:
        near = registry.nearest(kind, tables)
        raise UserError(f"nothing is called {kind!r}{near}; one of: {', '.join(tables)}")
    if kind == "rewards":
        rewards()
        return
    for title in [kind] if kind else tables:
        if kind is None:
            typer.echo(f"{title}:")
        indent = "" if kind else "  "
        width = max(map(len, tables[title]), default=0)
        for name, text in tables[title].items():
            typer.echo(f"{indent}{name:<{width}}  {text}".rstrip())


def rewards() -> None:
    """The table of rewards: those that are ready first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    rows = [(name, FACTS.get(name, Facts("", ""))) for name in registry.REWARDS]
    todo = {name: facts.missing() for name, facts in rows}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("reward", no_wrap=True)
    for title in ("ready", "range", "measures", "licence", "downloads"):
        table.add_column(title, overflow="fold")
    for name, facts in sorted(rows, key=lambda row: bool(todo[row[0]])):
        ready = todo[name] or "yes"
        cells = (name, ready, facts.range, facts.about, facts.licence, facts.weights)
        # Text: the brackets in `pip install 'dgpo[rewards]'` are no markup
        table.add_row(*map(Text, cells))
    console.print(table)
    ready = sum(not missing for missing in todo.values())
    console.print(f"\n{ready} of {len(rows)} ready; docs/rewards.md says what each needs")
