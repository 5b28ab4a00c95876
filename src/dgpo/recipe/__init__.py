"""Recipes: their settings, files, and what is said of wrong ones.

``Recipe`` is imported when it is first used: finding a recipe's file loads no algorithms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo.recipe.recipe import Recipe
    from dgpo.recipe.sections import LoraSettings

__all__ = ["LoraSettings", "Recipe"]


def __getattr__(name: str) -> Any:
    if name == "Recipe":
        from dgpo.recipe.recipe import Recipe

        return Recipe
    if name == "LoraSettings":
        from dgpo.recipe.sections import LoraSettings

        return LoraSettings
    raise AttributeError(f"module 'dgpo.recipe' has no attribute {name!r}")
