"""Recipes of any content, planned: what they will cost, or one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given

from dgpo.errors import UserError
from dgpo.planning import Machine, Plan, make_plan
from dgpo.recipe import Recipe
from dgpo.recipe.files import PACKAGED, apply_overrides
from dgpo.registry import MODELS
from fuzz.parts import PROFILE, value_or_error
from fuzz.test_recipes import mutated

LONG = "x" * 5000
ON_HUB = {
    str(yaml.safe_load(file.read_text()).get("model", "pocket")) for file in PACKAGED.glob("*.yaml")
} - set(MODELS)
"""Models of the packaged recipes that are not asked for here."""


def planned(data: dict[str, Any]) -> Plan | None:
    """The plan of `dgpo plan`, printed too; None for one clear error."""

    def plan() -> Plan:
        recipe = Recipe.from_dict(data)
        if recipe.model in ON_HUB:
            recipe = recipe.model_copy(update={"model": "pocket"})
        made = make_plan(recipe, Machine("cuda"))
        assert str(made) and made.memory.peak > 0 and made.counts.forwards > 0
        return made

    return value_or_error(plan)


@PROFILE
@given(data=mutated())
def test_changed_settings_are_planned_or_refused(data: dict[str, Any]) -> None:
    planned(data)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=~nobody-at-all/x", "model: '~nobody-at-all/x' is no name of a folder"),
        (f"model={LONG}", "is no name of a folder: .*too long"),
        (f"model={LONG}.py:make", "model: no file .*too long"),
        ("model=~nobody-at-all/x.py:make", "model: no file"),
        ("model=json:dumps", "model 'json:dumps' raised TypeError"),
        ("model=json:decoder", "model 'json:decoder' raised TypeError"),
        ("model=builtins:dict", "makes {}, and not a diffusers pipeline"),
        ("eval.metrics=[~nobody-at-all/x.py:score]", "reward: no file"),
        (f"eval.metrics=[{LONG}.py:score]", "reward: no file .*too long"),
        (f"lora.rank={10**30}", "lora.rank = 1000.*16384"),
        (f"rollout.steps={10**30}", "rollout.steps = 1000.*10000"),
        (f"eval.steps={10**30}", "eval.steps = 1000.*10000"),
        ("rollout.call.height=tall", "rollout.call.height = 'tall'"),
        ("rollout.call.width=[32]", "rollout.call.width"),
        ("rollout.call.height=0", "rollout.call.height = 0"),
        (f"rollout.call.height={10**30}", "rollout.call.height = 1000"),
        ("rollout.call.num_frames=1.5", "rollout.call.num_frames = 1.5"),
    ],
    ids=lambda value: value[:40],
)
def test_odd_values_are_one_error(override: str, words: str) -> None:
    data = yaml.safe_load((PACKAGED / "pocket-geneval-turbo.yaml").read_text())
    changed = apply_overrides(data, [override])
    with pytest.raises(UserError, match=f"(?s){words}") as error:
        make_plan(Recipe.from_dict(changed), Machine("cuda"))
    assert "Traceback" not in str(error.value)


def test_a_strength_that_is_none_is_refused() -> None:
    from types import SimpleNamespace

    from dgpo.planning.plan import _strength

    def call(strength: float = 0.6) -> None: ...

    pipe = SimpleNamespace(__call__=call)
    assert _strength(Recipe(), pipe) == 0.6
    for odd in ("x", None, float("nan"), 2, -1, [0.5]):
        recipe = Recipe.from_dict({"rollout": {"call": {"strength": odd}}})
        with pytest.raises(UserError, match=r"rollout\.call\.strength"):
            _strength(recipe, pipe)
