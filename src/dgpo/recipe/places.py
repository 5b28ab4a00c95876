"""The files and folders that a recipe names, so that a run finds them again from anywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dgpo.prompts.datasets import PREFIX
from dgpo.recipe.recipe import Recipe
from dgpo.registry import MODELS, PROMPTS

_FOLDERS = ("run.dir", "memory.prompt_cache", "data.preferences")
"""What is always a folder, whether it is there yet or not."""
_GIVEN: dict[str, Mapping[str, Any]] = {
    "model": MODELS,
    "prompts.train": PROMPTS,
    "prompts.eval": PROMPTS,
}
"""Files and folders, unless a name of the registry is meant."""


def placed(recipe: Recipe) -> Recipe:
    """Return a recipe whose relative paths are absolute, seen from the current folder.

    These are the folders and prompt files that it names, files of the user's own code
    (``file.py:name``), and files among the options of rewards. The name of a reward stays what it
    was, since its figures carry it.
    """
    data = {name: _placed(value, name) for name, value in recipe.model_dump().items()}
    rewards = {name: _reward(name, data["rewards"][name]) for name in data["rewards"]}
    return Recipe.from_dict({**data, "rewards": rewards, "algorithm": recipe.algorithm})


def _placed(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _placed(own, f"{key}.{name}") for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_placed(own, key) for own in value]
    if not isinstance(value, str):
        return value
    if key in _FOLDERS:
        return _absolute(value)
    if key in _GIVEN:
        return value if value in _GIVEN[key] else _code(_data_set(value))
    if key.startswith("rewards.") and ".options." in key:
        return _there(value, os.path.isfile)
    # a metric's name is looked up, and its figures carry it
    return value if key == "eval.metrics" else _code(value)


def _reward(name: str, how: Any) -> Any:
    place = _code(name)
    if place == name or (isinstance(how, Mapping) and how.get("use")):
        return how
    return {**(how if isinstance(how, Mapping) else {"weight": how}), "use": place}


def _data_set(text: str) -> str:
    name, mark, query = text.removeprefix(PREFIX).partition("?")
    if text.startswith(PREFIX):
        return f"{PREFIX}{_there(name)}{mark}{query}"
    return _there(text)


def _code(text: str) -> str:
    file, colon, name = text.rpartition(":")
    return f"{_there(file, os.path.isfile)}{colon}{name}" if file.endswith(".py") else text


def _there(text: str, exists: Callable[[str], bool] = os.path.exists) -> str:
    return _absolute(text) if exists(os.path.expanduser(text)) else text


def _absolute(text: str) -> str:
    return str(Path(os.path.expanduser(text)).absolute())
