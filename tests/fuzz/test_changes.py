"""Runs that go on with changed settings: each change is told, or refused by one clear error."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dgpo.recipe import Recipe
from dgpo.recipe.changes import FIXED, changes, refuse_changes, told_changes
from dgpo.recipe.files import PACKAGED, apply_overrides, override, read_recipe
from dgpo.settings import key_tree
from fuzz.parts import PROFILE, SCALARS, value_or_error

BASES = [read_recipe(file) for file in sorted(PACKAGED.glob("*.yaml"))]
KEYS = [*key_tree(Recipe), "algorithm.name", "algorithm.beta", "rewards.redness", "run.dir"]
OTHER = {"algorithm.name": "awm", "precision": "bfloat16", "seed": 7, "lora": None}
LIKELY = st.sampled_from([None, 1, 2, 3, 0.5, True, "auto", ["to_q"], "a #2", "2024", "on", {}])


@st.composite
def resumed(draw: st.DrawFn) -> tuple[Recipe, Recipe] | None:
    """A recipe, and the one by which its run goes on; None where that one is refused as such."""
    base = draw(st.sampled_from(BASES))
    items = []
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from([*KEYS, *OTHER, *FIXED]))
        usual = st.just(OTHER[key]) if key in OTHER else LIKELY
        items.append(override(key, draw(usual | LIKELY | SCALARS)))
    old = Recipe.from_dict(base)
    new = value_or_error(lambda: Recipe.from_dict(apply_overrides(base, items)))
    return None if new is None else (old, new)


@PROFILE
@given(both=resumed())
def test_changed_settings(both: tuple[Recipe, Recipe] | None) -> None:
    if both is None:
        return
    old, new = (recipe.to_dict() for recipe in both)
    found = changes(old, new)
    # what is told leads from the one to the other, so that nothing is left out
    made = deepcopy(old)
    for key, (_, has) in found.items():
        _put(made, key, has)
    assert _full(made) == _full(new)
    assert changes(new, old) == {key: (has, had) for key, (had, has) in found.items()}
    assert changes(new, new) == {} and bool(found) == (old != new)
    assert all(f"  {key}: " in told_changes(found) for key in found)
    fixed = [key for key in found if key in FIXED]
    said = value_or_error(lambda: refuse_changes(found, "runs/a") or "goes on")
    assert (said is None) == bool(fixed)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    # a key of a free section may hold dots itself
    inner = data.get(head)
    if rest and isinstance(inner, dict):
        _put(inner, rest, value)
    else:
        data[key] = value


def _full(data: Any) -> Any:
    """The data without what is null, which stands for a key that is not there."""
    if not isinstance(data, dict):
        return data
    return {key: _full(value) for key, value in data.items() if value is not None}
