"""Recipes that were changed at random: a plan that can be written down and read back, or one
clear error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.files import PACKAGED, apply_overrides
from dgpo.recipe.plain_yaml import MOST_NODES, parse_yaml
from dgpo.settings import key_tree
from fuzz.parts import NASTY, PROFILE, VALUES, changed_bytes, value_or_error

FILES = sorted(PACKAGED.glob("*.yaml"))
KEYS = sorted({*key_tree(Recipe), "algorithm.name", "algorithm.beta", "algorithm.timesteps.count"})


def plan(folder: Path, text: bytes, overrides: list[str]) -> Recipe | None:
    file = folder / "recipe.yaml"
    file.write_bytes(text)
    recipe = value_or_error(lambda: Recipe.load(file, overrides))
    if recipe is None:
        return None
    written = recipe.to_yaml()
    again = Recipe.from_dict(yaml.safe_load(written.encode("utf-8")))
    assert again == recipe and again.to_yaml() == written
    assert recipe.images_per_iteration >= 2 and recipe.updates_per_iteration >= 1
    assert all(math.isfinite(weight) and weight for weight in recipe.reward_weights.values())
    return recipe


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A packaged recipe in which a few keys were lost, misspelt, moved or given other values."""
    data = yaml.safe_load(draw(st.sampled_from(FILES)).read_text())
    for _ in range(draw(st.integers(1, 4))):
        place, here = data, draw(st.sampled_from(["value", "lose", "misspell", "add", "known"]))
        while True:
            sections = [k for k, v in place.items() if isinstance(v, dict) and v]
            if not sections or draw(st.booleans()):
                break
            place = place[draw(st.sampled_from(sections))]
        key = draw(st.sampled_from(sorted(place, key=str))) if place else "x"
        if here == "value":
            place[key] = draw(VALUES)
        elif here == "lose":
            place.pop(key, None)
        elif here == "misspell":
            place[draw(st.text(min_size=1, max_size=12))] = place.pop(key, 1)
        elif here == "add":
            place[draw(st.sampled_from(KEYS)).rpartition(".")[2]] = draw(VALUES)
        else:
            _set(data, draw(st.sampled_from(KEYS)).split("."), draw(VALUES))
    return data


def _set(data: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        if not isinstance(data.get(part), dict):
            data[part] = {}
        data = data[part]
    data[path[-1]] = value


@PROFILE
@given(data=mutated())
def test_changed_settings(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _folder(tmp_path_factory)
    plan(folder, yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "replace"), [])
    value_or_error(lambda: Recipe.from_dict(data))


@PROFILE
@given(data=st.data())
def test_changed_files(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = data.draw(st.sampled_from(FILES)).read_bytes()
    plan(_folder(tmp_path_factory), data.draw(changed_bytes(text)), [])


@PROFILE
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(KEYS) | st.text(max_size=20),
            VALUES.map(lambda v: v if isinstance(v, str) else json.dumps(v)) | st.text(max_size=20),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_changed_overrides(
    pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = [f"{key}={value}" for key, value in pairs]
    plan(_folder(tmp_path_factory), FILES[0].read_bytes(), words)


def _folder(factory: pytest.TempPathFactory) -> Path:
    place = factory.getbasetemp() / "recipes"
    place.mkdir(exist_ok=True)
    return place


def test_every_key_takes_every_odd_value_or_refuses_it() -> None:
    base = yaml.safe_load(FILES[0].read_text())
    outcomes = []
    for key in KEYS:
        for value in NASTY:
            data = json.loads(json.dumps(base))
            _set(data, key.split("."), value)
            outcomes.append(value_or_error(lambda data=data: Recipe.from_dict(data)) is None)
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [*a]", "contains itself"),
        ("a: " + "[" * 1500, "nested too deeply"),
        ("a: !!binary aGk=", "'binary' is no plain value"),
        ("a: !!set {x}", "'set' is no plain value"),
        ("a: !!python/object/apply:os.system [id]", "no plain value"),
        ('a: "\\0"', "line 1: '\\x00'"),
        ('b: 1\na: "\\ud800"', "line 2: '\\ud800'"),
        ("a: !!int x", "not YAML"),
        (
            "\n".join(
                ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
                + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
            ),
            f"more than {MOST_NODES} values",
        ),
    ],
)
def test_yaml_beyond_plain_data_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_yaml(text, "f")
    assert words in str(error.value)


def test_yaml_that_is_plain_data_is_read() -> None:
    text = "a: &x {b: 3e-4}\nc: *x\nd: {<<: *x, e: 2001-01-01}\nf: 2025-10-08T10:00:00"
    assert parse_yaml(text, "f") == {
        "a": {"b": 3e-4}, "c": {"b": 3e-4}, "d": {"b": 3e-4, "e": "2001-01-01"},
        "f": "2025-10-08T10:00:00",
    }  # fmt: skip
    with pytest.raises(UserError, match="KEY=VALUE"):
        apply_overrides({}, [".".join("a" * 5000) + "=1"])
