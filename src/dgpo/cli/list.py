"""`dgpo list`: the names that recipes and commands take, and which rewards are ready."""

from __future__ import annotations

from typing import Annotated

import typer

from dgpo import registry
from dgpo.cli.common import new_table
from dgpo.errors import UserError
from dgpo.recipe.files import recipe_names, summary
from dgpo.registry import Entry

KINDS = {kind if kind.endswith("s") else f"{kind}s": kind for kind in registry.TABLES}
"""The kinds of the registry by what the command calls them."""


def names(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join((*KINDS, 'recipes'))}]",
            help="One of them; default: all. Of rewards: which are ready, licences, ranges.",
        ),
    ] = None,
) -> None:
    """Show the names that recipes and commands take."""
    if kind == "rewards":
        rewards()
        return
    tables = {title: _about(registry.TABLES[own]) for title, own in KINDS.items()}
    tables["recipes"] = {name: summary(file) for name, file in recipe_names().items()}
    if kind is not None and kind not in tables:
        near = registry.nearest(kind, tables)
        raise UserError(f"nothing is called {kind!r}{near}; one of: {', '.join(tables)}")
    for title in [kind] if kind else tables:
        if kind is None:
            print(f"{title}:")
        indent = "" if kind else "  "
        rows = tables[title] or {"none built in": "name your own as FILE.py:ATTRIBUTE"}
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"{indent}{name:<{width}}  {text}".rstrip())


def _about(table: dict[str, Entry]) -> dict[str, str]:
    """Return a text for each entry: what it is, its paper, and what must be installed first."""
    return {
        name: entry.about
        + (f" (arXiv {entry.paper})" if entry.paper else "")
        + (f"; first: {todo}" if (todo := entry.missing()) else "")
        for name, entry in table.items()
    }


def rewards() -> None:
    """Show the table of rewards, those that are ready first."""
    from rich.text import Text

    todo = {name: entry.missing() for name, entry in registry.REWARDS.items()}
    console, table = new_table()
    table.add_column("reward", no_wrap=True)
    for title in ("ready", "range", "measures", "licence", "downloads"):
        table.add_column(title, overflow="fold")
    for name in sorted(todo, key=lambda name: bool(todo[name])):
        ready, entry = todo[name] or "yes", registry.REWARDS[name]
        cells = (name, ready, entry.range, entry.about, entry.licence, entry.weights)
        # Text: the brackets in `pip install 'dgpo[rewards]'` are no markup
        table.add_row(*map(Text, cells))
    console.print(table)
    ready = sum(not missing for missing in todo.values())
    console.print(f"\n{ready} of {len(todo)} ready; docs/rewards.md says what each needs")
