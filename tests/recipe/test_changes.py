"""What differs between the recipe of a run and the one by which it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.changes import FIXED, changes, changes_of_run, refuse_changes, told_changes
from dgpo.recipe.places import placed
from dgpo.settings import key_tree


def between(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return changes(Recipe.from_dict(old).to_dict(), Recipe.from_dict(new).to_dict())


def test_every_key_that_differs_is_said() -> None:
    found = between(
        {"train": {"iterations": 2}, "rewards": {"redness": 1}, "rollout": {"call": {"height": 8}}},
        {"train": {"iterations": 3}, "rewards": {"brightness": 1}, "samples": {"count": 0}},
    )
    assert told_changes(found).splitlines() == [
        "  rewards.redness: 1.0 -> null",
        "  rewards.brightness: null -> 1.0",
        "  rollout.call.height: 8 -> null",
        "  train.iterations: 2 -> 3",
        "  samples.count: 16 -> 0",
    ]
    refuse_changes(found, "run")
    assert between({"seed": 3}, {"seed": 3}) == {}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ({"lora": {"alpha": 8}}, {"lora": {"alpha": 800}}, "lora.alpha: 8.0 -> 800.0"),
        ({"lora": {"rank": 4}}, {"lora": {"rank": 8}}, "lora.rank: 4 -> 8"),
        ({"lora": {"rank": 4}}, {"lora": None}, 'lora: {"rank": 4, "alpha": 128.0'),
        ({}, {"algorithm": "awm"}, "algorithm.name: dgpo -> awm"),
        ({}, {"precision": "bfloat16"}, "precision: float32 -> bfloat16"),
        ({}, {"seed": 1}, "seed: 0 -> 1"),
    ],
)
def test_what_gives_tensors_their_meaning_is_refused(old: Any, new: Any, line: str) -> None:
    with pytest.raises(UserError, match=r"^resume: what is saved in runs/a ") as refused:
        refuse_changes(between(old, {**new, "group_size": 2}), "runs/a")
    said = str(refused.value)
    assert f"  {line}" in said and "runs/a/recipe.yaml" in said and "group_size" not in said


def test_the_fixed_keys_are_keys() -> None:
    assert set(FIXED) <= {*key_tree(Recipe), "algorithm.name"}


def test_the_recipe_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("a")
    recipe = Recipe.from_dict({"prompts": {"train": "one.txt"}, "run": {"dir": "run"}})
    assert changes_of_run(recipe) == {}
    Path("run").mkdir()
    file = Path("run/recipe.yaml")
    for earlier in (recipe, placed(recipe)):  # earlier versions kept paths as they were said
        file.write_text(earlier.to_yaml())
        assert changes_of_run(recipe) == changes_of_run(placed(recipe)) == {}
    other = recipe.model_copy(update={"seed": 3})
    assert changes_of_run(other) == {"seed": (0, 3)}
    # a recipe that only the program understands that made it is compared as it is written
    text = recipe.to_yaml().replace("name: dgpo", "name: mine:Method.<locals>.Inner", 1)
    file.write_text(text)
    assert changes_of_run(recipe)["algorithm.name"] == ("mine:Method.<locals>.Inner", "dgpo")
