"""Every recipe of the package loads, and they run on a tiny pipeline."""

import pytest

from benchmark_files import benchmark
from dgpo import Recipe, Trainer
from dgpo.comparison.plan import protocol
from dgpo.recipe.files import recipe_names
from dgpo.registry import REWARDS, resolve
from dgpo.rewards.settings import used
from families.tiny import build

NAMES = sorted(recipe_names())
REAL = [name for name in NAMES if name.startswith("sd35m")]
COMPARED = [name for name in NAMES if name.startswith("pocket-geneval-")]


def test_there_are_the_recipes_that_the_readme_speaks_of():
    assert {"pocket-geneval", "pocket-ocr", "sd35m-geneval", "sd35m-ocr"} <= set(NAMES)
    assert len(REAL) == 12


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_and_round_trips(name):
    recipe = Recipe.load(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_their_rewards_are_built_in():
    for name in NAMES:
        recipe = Recipe.load(name)
        named = {used(term) or own for own, term in recipe.rewards.items()}
        for reward in (*named, *recipe.eval.metrics):
            assert reward in REWARDS or callable(resolve("reward", reward)), name
    assert Recipe.load("sd35m-geneval").rewards == {"geneval": 1.0}


@pytest.mark.parametrize("task", ["geneval", "ocr", "pickscore"])
def test_a_recipe_for_24_gb_trains_what_the_other_one_trains(task):
    small, large = (Recipe.load(f"sd35m-{task}{of}").to_dict() for of in ("-24gb", ""))
    assert small.pop("memory") != large.pop("memory")
    assert small["train"].pop("micro_batch") == small["group_size"]
    large["train"].pop("micro_batch")
    assert {**small, "run": None} == {**large, "run": None}


def test_the_methods_share_all_that_a_fair_comparison_needs():
    of_the_page = {name for group in benchmark("comparison").GROUPS for name in group}
    assert {"pocket-geneval", *COMPARED} >= of_the_page and len(of_the_page) >= 13
    ours, turbo = Recipe.load("pocket-geneval"), Recipe.load("pocket-geneval-turbo")
    for name in COMPARED:
        other = Recipe.load(name)
        assert protocol(other) == protocol(ours), name
        for key in ("rewards", "group_size", "groups_per_iteration", "lora"):
            assert getattr(other, key) == getattr(ours, key), (name, key)
        # who samples without guidance and is scored with it is scored on what it never saw (LOG.md)
        assert other.rollout.guidance_scale == ours.rollout.guidance_scale, name
        assert other.rollout.steps in (ours.rollout.steps, turbo.rollout.steps), name


@pytest.mark.parametrize("name", [*REAL, *COMPARED])
def test_a_recipe_trains_a_tiny_sd3_for_two_iterations(name, tmp_path):
    recipe = Recipe.load(
        name,
        [
            f"run.dir={tmp_path / 'run'}",
            "rewards={redness: 1.0}",
            "eval={metrics: [], every: 0, steps: 2}",
            "rollout.call={height: 32, width: 32, max_sequence_length: 8}",
            "group_size=2",
            "groups_per_iteration=4",
            "train.iterations=2",
            "train.micro_batch=2",
            "samples.count=0",
        ],
    )
    prompts = ["a photo of cat", "red dog", "blue house"]
    trainer = Trainer(
        model=build("sd3"), train_dataset=prompts, eval_dataset=prompts, recipe=recipe
    )
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert trainer.iteration == 2
    moved = [
        not bool((a == b).all()) for a, b in zip(before, trainer.policy.parameters(), strict=True)
    ]
    assert any(moved)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
