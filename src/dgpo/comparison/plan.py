"""Which runs a comparison consists of, and whether it would be fair."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.files import find_recipe, override

OWNED = {"seed": "use --seeds N", "run.dir": "use --out DIR"}
"""Settings that a comparison sets itself, and what sets them."""


@dataclass(frozen=True)
class Run:
    """One training run: a recipe with a seed, in a folder of its own.

    Args:
        name: the recipe's name.
        seed: the seed.
        recipe: the recipe with seed, folder and budget.
        command: the command that trains the same run on its own.
    """

    name: str
    seed: int
    recipe: Recipe
    command: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.run.dir)


def protocol(recipe: Recipe) -> dict[str, Any]:
    """Return what must be equal for two held-out scores to be comparable, by the recipe's keys."""
    own = recipe.eval_sampling
    return {
        "model": recipe.model,
        "precision": recipe.precision,
        "memory.vae_precision": recipe.memory.vae_precision or recipe.precision,
        "prompts.train": recipe.prompts.train,
        "prompts.eval": recipe.prompts.eval,
        "eval.metrics": list(recipe.eval.metrics or recipe.rewards),
        "eval.steps": own.steps,
        "eval.guidance_scale": own.guidance_scale,
        "eval.limit": recipe.eval.limit,
        "eval.scheduler": own.scheduler,
        "rollout.call": recipe.rollout.call,
    }


def lag(recipe: Recipe) -> float:
    """Return how many iterations the evaluated weights lag behind the trained ones.

    The slow average remembers ``every / (1 - decay^moves)`` optimiser steps. With ``ema.warmup`` it
    remembers fewer at first.
    """
    ema = recipe.ema
    return ema.every / (1 - ema.decay**ema.moves) / recipe.updates_per_iteration


def plan(
    sources: Sequence[str],
    seeds: int,
    out: Path,
    budget: float | None = None,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """Plan all runs in the order in which they are made: every recipe with seed 0, then seed 1.

    Args:
        sources: files or names of recipes.
        seeds: the number of seeds, which count from 0.
        out: the folder of the comparison; a run's folder is ``NAME-seedK`` in it.
        budget: the training minutes of each run, instead of ``train.max_minutes``.
        overrides: settings to change in all recipes, each ``a.b=c``.

    Raises:
        UserError: a recipe is wrong or named twice, an override belongs to the comparison, or the
            recipes differ in what must be equal.
    """
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key in OWNED:
            raise UserError(f"override {item!r}: dgpo compare sets {key} itself; {OWNED[key]}")
        if key == "train.max_minutes" and budget is not None:
            raise UserError(f"override {item!r}: --budget sets it; give one of the two")
    names = [find_recipe(source).stem for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"recipe {name!r} is named twice: give the files different names")

    def run(source: str, name: str, seed: int) -> Run:
        own = {"seed": seed, "run.dir": str(out / f"{name}-seed{seed}")}
        own |= {} if budget is None else {"train.max_minutes": budget}
        items = [*overrides, *(override(key, value) for key, value in own.items())]
        command = shlex.join(["dgpo", "train", source, *items])
        return Run(name, seed, Recipe.load(source, items), command)

    pairs = list(zip(sources, names, strict=True))
    runs = [run(source, name, seed) for seed in range(seeds) for source, name in pairs]
    _refuse_unfair(runs[: len(pairs)])
    return runs


def _refuse_unfair(runs: Sequence[Run]) -> None:
    first, *others = runs
    wanted = protocol(first.recipe)
    if wanted["prompts.eval"] is None:
        raise UserError(
            f"recipe {first.name!r}: prompts.eval is missing: name the prompts to compare on"
        )
    lines = [
        f"  {key}: {first.name} has {wanted[key]!r}, {other.name} has {value!r}"
        for other in others
        for key, value in protocol(other.recipe).items()
        if value != wanted[key]
    ]
    if lines:
        raise UserError(
            "these recipes cannot be compared, since their prompts or evaluations differ:\n"
            + "\n".join(lines)
            + "\nmake them equal in the files, or in all by an override such as eval.steps=10"
        )
