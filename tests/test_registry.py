"""Names: found, not found, and of the user's own."""

import importlib.util
import subprocess
import sys

import pytest
from PIL import Image

import dgpo.algorithms
from commands import run
from dgpo import registry
from dgpo.errors import UserError
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.recipe.plain_yaml import parse_yaml
from dgpo.rewards import load_rewards


def test_a_registered_name_gives_its_object():
    from dgpo.rewards.shipped.stand_in import redness

    assert registry.resolve("reward", "redness") is redness


def test_a_path_is_accepted_everywhere():
    import math

    assert registry.resolve("reward", "math:sqrt") is math.sqrt
    assert registry.resolve("prompts", "collections:OrderedDict.fromkeys")(["a"]) == {"a": None}


def test_a_file_is_accepted_and_loaded_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("calls = []\ndef score(images, prompts):\n    return [1.0] * len(images)\n")
    first = registry.resolve("reward", f"{file}:score")
    assert first([None], ["a"]) == [1.0]
    assert registry.resolve("reward", f"{file}:score") is first


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pocket_genevl", ["pocket_genevl", "did you mean 'pocket_geneval'", "redness", ".py"]),
        ("dgpo.rewards.shipped.stand_in:rednes", ["rednes", "did you mean 'redness'"]),
        ("no_such_module:score", ["no_such_module"]),
        ("/no/such/file.py:score", ["/no/such/file.py"]),
    ],
)
def test_an_unknown_name_says_what_would_work(name, words):
    with pytest.raises(UserError) as error:
        registry.resolve("reward", name)
    for word in words:
        assert word in str(error.value)


def test_the_registry_imports_nothing_heavy():
    code = (
        "import sys, dgpo.registry, dgpo.cli; assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_file_that_fails_is_not_kept_half_loaded(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("raise RuntimeError('in the file')\n")
    for _ in range(2):
        with pytest.raises(UserError, match=r"RuntimeError: in the file \(broken.py, line 1\)"):
            registry.resolve("reward", f"{file}:score")


def test_the_file_has_one_line_an_entry_and_no_name_twice():
    text = registry.FILE.read_text(encoding="utf-8")
    data = parse_yaml(text, "registry.yaml")  # refuses a key that is given twice
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(lines) == sum(map(len, data.values())) > 60
    assert data.keys() - {"moved"} == registry.TABLES.keys()


@pytest.mark.parametrize("kind", registry.TABLES)
def test_every_entry_leads_to_an_object_and_says_what_it_is(kind):
    for name, entry in registry.TABLES[kind].items():
        assert callable(registry.resolve(kind, name)) or kind == "benchmark"
        assert entry.about, name


def test_modules_that_have_moved_are_found_by_their_former_names():
    from dgpo.rewards.shipped.stand_in import redness

    for old, new in registry.MOVED.items():
        assert importlib.util.find_spec(new) and not importlib.util.find_spec(old)
    assert registry.resolve("reward", "dgpo.rewards.stand_in:redness") is redness
    human = registry.resolve("reward", "dgpo.rewards.human:HumanReward")
    assert human.__module__ == "dgpo.ranking.human"
    with pytest.raises(UserError, match=r"stand_in has no 'rednes' \(did you mean 'redness'\?\)"):
        registry.resolve("reward", "dgpo.rewards.stand_in:rednes")


def test_a_recipe_of_before_the_move_loads_and_its_reward_is_asked():
    old = "dgpo.rewards.stand_in:redness"
    recipe = Recipe.from_dict({"rewards": {old: 1.0, "red": {"use": old}}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe and old in recipe.rewards
    scores = load_rewards(recipe.rewards)([Image.new("RGB", (2, 2), "red")], [Prompt("a")]).by_name
    assert float(scores[old]) == float(scores["red"]) == 1.0


def test_a_kind_without_entries_takes_a_path_and_says_so():
    assert registry.resolve("callback", "math:sqrt")(4.0) == 2.0
    assert registry.known("callback", "mine.py:Quiet") and not registry.known("callback", "quiet")
    with pytest.raises(UserError, match=r"unknown callback 'quiet'; name your own as package"):
        registry.resolve("callback", "quiet")


TINY = """
from typing import ClassVar
from dgpo.algorithms import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.rwr import RWR

class Tiny(RWR):
    '''It is reward-weighted regression by another name.'''
    name: ClassVar[str] = "tiny"
    contract: ClassVar[Contract] = Contract(terms={"temperature": 0.7})
"""


def test_a_built_in_algorithm_is_one_file_and_one_line(tmp_path, monkeypatch):
    """Lists, imports, recipes, tables of docs and the rows of the contract tests follow."""
    from algorithms import table
    from algorithms.test_contract import test_the_order_of_samples_changes_nothing
    from tools import docs_tables

    (tmp_path / "dgpo_tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    entry = registry.Entry("dgpo_tiny:Tiny", about="a tiny one", paper="2501.1", points="forward")
    monkeypatch.setitem(registry.ALGORITHMS, "tiny", entry)

    listed = run("list", "algorithms").output.splitlines()
    assert "tiny           a tiny one (arXiv 2501.1)" in listed
    from dgpo.algorithms import Tiny  # pyright: ignore

    assert Tiny.name == "tiny" and "Tiny" in dir(dgpo.algorithms)
    recipe = Recipe.from_dict({"algorithm": {"name": "tiny", "temperature": 2}})
    assert isinstance(recipe.algorithm, Tiny)
    assert recipe.to_dict()["algorithm"]["name"] == "tiny"
    row = table.forward()["tiny"]
    assert isinstance(row.algorithm, Tiny) and row.algorithm.temperature == 0.7
    assert list(row.learns) == ["default"]
    test_the_order_of_samples_changes_nothing(row)
    assert "| `tiny` | a tiny one |" in docs_tables.algorithms()
    assert "`rwr`, `tiny`" in docs_tables.settings().replace("`best_of_n`, ", "")


def test_a_built_in_reward_is_one_function_and_one_line(monkeypatch):
    from tools import docs_tables

    path = "dgpo.rewards.shipped.stand_in:redness"
    entry = registry.Entry(path, about="how red", range="-1 to 1", weights="3 GB")
    monkeypatch.setitem(registry.REWARDS, "red", entry)
    (line,) = [x for x in run("list", "rewards").output.splitlines() if x.startswith("red ")]
    assert "how red" in line and "3 GB" in line and " yes " in line
    assert "| `red` | how red |" in docs_tables.rewards()
    assert Recipe.from_dict({"rewards": {"red": 1.0}}).rewards == {"red": 1.0}


def test_an_algorithm_that_is_not_there_is_told_with_the_nearest():
    with pytest.raises(ImportError, match="FlowGRP"):
        exec("from dgpo.algorithms import FlowGRP")
    with pytest.raises(AttributeError, match=r"'FlowGRP' \(did you mean 'FlowGRPO'"):
        _ = dgpo.algorithms.FlowGRP
    assert {"AWM", "DGPO", "Algorithm"} <= set(dir(dgpo.algorithms))
