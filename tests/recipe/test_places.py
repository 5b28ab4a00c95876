"""Relative paths of a recipe become absolute; names stay names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo.algorithms.dgpo import DGPO
from dgpo.recipe import Recipe
from dgpo.recipe.places import placed
from dgpo.rewards.settings import used

HERE: dict[str, Any] = {
    "model": "models/mine",
    "prompts": {"train": "one.txt", "eval": "datasets:table.csv?column=a"},
    "rewards": {
        "score.py:red": 2.0,
        "mine": {"use": "score.py:red", "options": {"weights": "w.bin", "mode": "w", "n": 3}},
        "brightness": 1.0,
    },
    "eval": {"metrics": ["score.py:red"], "scheduler": "score.py:Fine"},
    "memory": {"prompt_cache": "cache"},
    "run": {
        "dir": "runs/x",
        "callbacks": ["score.py:Stop"],
        "loggers": ["csv", {"score.py:Lines": {}}],
    },
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("one.txt", "table.csv", "score.py", "w.bin", "pocket", "pocket-geneval/train"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_are_absolute(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = placed(Recipe.from_dict(HERE))
    code = f"{here}/score.py"
    assert recipe.model == str(here / "models" / "mine")
    assert recipe.prompts.train == str(here / "one.txt")
    assert recipe.prompts.eval == f"datasets:{here}/table.csv?column=a"
    assert {name: used(how) for name, how in recipe.rewards.items()} == {
        "score.py:red": f"{code}:red",
        "mine": f"{code}:red",
        "brightness": "",
    }
    assert recipe.reward_weights == Recipe.from_dict(HERE).reward_weights
    assert recipe.to_dict()["rewards"]["mine"]["options"] == {
        "weights": str(here / "w.bin"),
        "mode": "w",
        "n": 3,
    }
    assert recipe.eval.metrics == ["score.py:red"] and recipe.eval.scheduler == f"{code}:Fine"
    assert recipe.memory.prompt_cache == str(here / "cache")
    assert recipe.data.preferences is None
    assert (recipe.run.dir, recipe.run.callbacks) == (str(here / "runs/x"), [f"{code}:Stop"])
    monkeypatch.chdir("/")
    assert placed(recipe) == recipe


def test_names_stay_names(here: Path) -> None:
    """A folder or file may have the name of a model or set, or of nothing at all."""
    given = {
        "model": "pocket",
        "prompts": {"train": "pocket-geneval/train", "eval": "no/such.txt"},
        "rewards": {"redness": 1.0, "no.py:f": 1.0},
        "run": {"name": "one.txt", "dir": str(here)},
    }
    recipe = Recipe.from_dict(given)
    assert placed(recipe) == recipe
    algorithm = DGPO(beta=3)
    assert placed(Recipe(algorithm=algorithm)).algorithm is algorithm
    home = placed(Recipe.from_dict({"run": {"dir": "~/runs/x"}}))
    assert home.run.dir == str(Path.home() / "runs/x")
