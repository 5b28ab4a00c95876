"""What differs between the recipe of a run and the recipe by which it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dgpo.errors import UserError
from dgpo.recipe.files import read_recipe
from dgpo.recipe.places import placed
from dgpo.recipe.recipe import Recipe

FIXED = ("precision", "algorithm.name", "lora", "lora.rank", "lora.alpha", "seed")
"""The keys that give saved weights, averages and moments their meaning. The model is known by its
weights, and the layers of the LoRA by its tensors (``auto`` may find those that a list names). Both
are compared themselves."""
Changes = dict[str, tuple[Any, Any]]
"""The earlier and the new value by dotted key; None for a key that is not there."""


def changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Changes:
    """Return what differs between two recipes as plain data.

    >>> changes({"train": {"lr": 0.1}, "seed": 0}, {"train": {"lr": 0.2}, "seed": 0})
    {'train.lr': (0.1, 0.2)}
    """
    found: Changes = {}
    for name in {**old, **new}:
        key, had, has = f"{above}{name}", old.get(name), new.get(name)
        if isinstance(had, Mapping) and isinstance(has, Mapping):
            found |= changes(had, has, f"{key}.")
        elif had != has:
            found[key] = (had, has)
    return found


def changes_of_run(recipe: Recipe) -> Changes:
    """Return what differs from the recipe in the run folder ``run.dir``, where there is one.

    Raises:
        UserError: the recipe there cannot be read.
    """
    file = Path(recipe.run.dir) / "recipe.yaml"
    if not file.is_file():
        return {}
    old = read_recipe(file)
    with suppress(UserError):  # it may name what only the program had that began the run
        old = placed(Recipe.from_dict(old)).to_dict()
    return changes(old, placed(recipe).to_dict())


def told_changes(found: Changes) -> str:
    """Return a line for each change: ``key: old -> new``.

    >>> told_changes({"lora": (None, {"rank": 4}), "run.name": ("a", "b")})
    '  lora: null -> {"rank": 4}\\n  run.name: a -> b'
    """
    return "\n".join(f"  {key}: {_said(had)} -> {_said(has)}" for key, (had, has) in found.items())


def refuse_changes(found: Changes, folder: object) -> None:
    """Refuse changes of what gives the saved tensors of a run their meaning.

    Args:
        found: what differs from the recipe of the run.
        folder: the run folder.

    Raises:
        UserError: there are such changes; the message holds the earlier and the new values.
    """
    fixed = {key: values for key, values in found.items() if key in FIXED}
    if fixed:
        raise UserError(
            f"resume: what is saved in {folder} was trained with other settings than those given "
            f"now:\n{told_changes(fixed)}\nGo on by the run's own recipe, {folder}/recipe.yaml, "
            "without these changes, or start anew in another run.dir"
        )


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    # two long paths differ at their ends
    return text if len(text) <= 200 else f"{text[:60]}...{text[-137:]}"
