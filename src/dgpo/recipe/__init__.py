"""Recipes: their settings, their files, and the errors for wrong ones.

The classes are imported when they are first used, so that finding a recipe's file loads no
algorithm.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo.recipe.recipe import Recipe
    from dgpo.recipe.sections import LoraSettings

__all__ = ["LoraSettings", "Recipe"]
_HOMES = {"LoraSettings": "dgpo.recipe.sections", "Recipe": "dgpo.recipe.recipe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
