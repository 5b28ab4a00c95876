"""The comparison of docs/results.md: its recipes may be compared, and train the same thing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmark_files import BENCHMARKS, benchmark
from benchmarks.variants import read_variants, write_recipes
from dgpo.comparison.plan import plan


@pytest.fixture(scope="module")
def comparison() -> ModuleType:
    return benchmark("comparison")


def test_all_train_the_same_layers_on_the_same_pictures(
    comparison: ModuleType, tmp_path: Path
) -> None:
    names = [name for group in comparison.GROUPS for name in group]
    runs = plan(names, 1, tmp_path)  # refuses what cannot be compared
    assert len(runs) == len(set(names)) >= 6
    for run in runs:
        recipe, first = run.recipe, runs[0].recipe
        assert recipe.lora == first.lora and recipe.reward_weights == first.reward_weights
        assert (recipe.group_size, recipe.groups_per_iteration) == (16, 8)


def test_who_is_called_alike_differs_in_the_method_alone(
    comparison: ModuleType, tmp_path: Path
) -> None:
    """DGPO, DiffusionNFT and AWM: rollouts, levels and steps are the same."""
    dgpo, *others = (run.recipe for run in plan(comparison.GROUPS[0], 1, tmp_path))
    for other in others:
        assert other.algorithm.timesteps == dgpo.algorithm.timesteps
        assert (other.rollout, other.ema, other.eval) == (dgpo.rollout, dgpo.ema, dgpo.eval)
        own = {"lr", "max_grad_norm"}
        assert other.train.model_dump(exclude=own) == dgpo.train.model_dump(exclude=own)


def test_every_search_has_the_same_budget(tmp_path: Path) -> None:
    """Four settings each, the recipe's among them."""
    files = sorted((BENCHMARKS / "search").glob("*.yaml"))
    assert len(files) == 5
    for file in files:
        variants = read_variants(file)
        assert [v.set for v in variants.variants.values()].count([]) == 1
        assert len(write_recipes(variants, tmp_path / file.stem)) == 4  # refuses equal ones
