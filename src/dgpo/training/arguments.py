"""What a :class:`dgpo.trainer.Trainer` is given beside a recipe, written into the recipe.

The recipe in a run folder is what was run: names and files as they were given, functions by the
path under which they can be imported, and nothing for data that has no name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dgpo.algorithms.base import BaseAlgorithm
from dgpo.errors import UserError
from dgpo.models.load import Precision
from dgpo.recipe import Recipe


def is_pipeline(model: Any) -> bool:
    """Whether ``model`` is a pipeline itself rather than what a recipe calls one."""
    return model is not None and not isinstance(model, (str, Path))


def full_recipe(
    recipe: Recipe | str | Path | Mapping[str, Any] | None,
    *,
    model: Any = None,
    algorithm: BaseAlgorithm | None = None,
    reward_funcs: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> Recipe:
    """The recipe with what was given beside it put in, validated as a whole.

    Raises:
        UserError: as :meth:`Recipe.from_dict`.
    """
    if isinstance(recipe, (str, Path)):
        recipe = Recipe.load(recipe)
    elif isinstance(recipe, Mapping):
        recipe = Recipe.from_dict(recipe)
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"recipe = {recipe!r:.80}: give a Recipe, its name or file, or nested dicts"
        )
    if is_pipeline(model) and not isinstance(getattr(model, "components", None), Mapping):
        kind = type(model).__name__
        raise UserError(f"model: {kind} is no diffusers pipeline; give one, or a name or folder")
    given: dict[str, Any] = {}
    if is_pipeline(model):
        # from_pretrained keeps a Path as a Path
        given["model"] = str(getattr(model.config, "_name_or_path", None) or type(model).__name__)
        precision = str(getattr(model, "dtype", "")).removeprefix("torch.")
        if precision in get_args(Precision):
            given["precision"] = precision
    elif model is not None:
        given["model"] = str(model)
    if algorithm is not None:
        given["algorithm"] = algorithm
    if reward_funcs is not None:
        given["rewards"] = _named(reward_funcs)
    sources = {"train": train_dataset, "eval": eval_dataset}
    prompts = {key: _source(value) for key, value in sources.items() if value is not None}
    if prompts:
        given["prompts"] = {**dict(recipe.prompts), **prompts}
    # the fields as they are, not their plain data: an algorithm may be of a class without a path
    return Recipe.from_dict({**dict(recipe), **given}) if given else recipe


def _named(rewards: Any) -> dict[str, float]:
    if isinstance(rewards, Mapping):
        return {_path(reward): weight for reward, weight in rewards.items()}
    if isinstance(rewards, str) or callable(rewards):
        rewards = [rewards]
    return {_path(reward): 1.0 for reward in rewards}


def _path(reward: Any) -> str:
    if isinstance(reward, str):
        return reward
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _source(prompts: Any) -> str | None:
    return str(prompts) if isinstance(prompts, (str, Path)) else None
