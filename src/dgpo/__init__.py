"""Post-train diffusion and flow models with any reward, by Direct Group Preference Optimization.

The public names are imported when they are first used, so that ``import dgpo`` is quick::

    from dgpo import DGPO, Recipe, Trainer, load_pocket
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgpo.algorithms.dgpo import DGPO
    from dgpo.errors import UserError
    from dgpo.exporting import export
    from dgpo.models.loras import load_lora
    from dgpo.pocket import load_pocket
    from dgpo.prompts import Prompt
    from dgpo.recipe import Recipe
    from dgpo.rewards import Reward
    from dgpo.trainer import Trainer
    from dgpo.training.callbacks import Callback

__all__ = [
    "DGPO",
    "Callback",
    "Prompt",
    "Recipe",
    "Reward",
    "Trainer",
    "UserError",
    "export",
    "load_lora",
    "load_pocket",
]

_HOMES = {
    "Callback": "dgpo.training.callbacks",
    "DGPO": "dgpo.algorithms.dgpo",
    "Prompt": "dgpo.prompts",
    "Recipe": "dgpo.recipe",
    "Reward": "dgpo.rewards",
    "Trainer": "dgpo.trainer",
    "UserError": "dgpo.errors",
    "export": "dgpo.exporting",
    "load_lora": "dgpo.models.loras",
    "load_pocket": "dgpo.pocket",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dgpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
