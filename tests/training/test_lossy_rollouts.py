"""Runs with inexact rollouts: what they train on, and the guard that looks at the distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dgpo.errors import UserError
from dgpo.recipe import Recipe
from dgpo.recipe.sections import GuardSettings
from dgpo.training.run_guards import Guards
from reliable import assert_same, reliable, stopping, tensors
from tiny_runs import PROMPTS, Calls, Spy, light, rows, trainer

CALL = {"height": 16, "width": 16}


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def rollout(**accelerate: Any) -> dict[str, Any]:
    return {"steps": 3, "call": CALL, "accelerate": accelerate or None}


def test_training_is_exact_around_rollouts(tmp_path: Path) -> None:
    """A cache that always computes makes the same pictures: all else must be as without it."""
    always = {"cache": "taylorseer", "cache_options": {"disable_cache_before_step": 99}}
    for name, setting in (("with", always), ("without", {})):
        trainer(tmp_path / name, rollout=rollout(**setting), train={"iterations": 2}).train()
    one, two = tensors(tmp_path / "with"), tensors(tmp_path / "without")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    first, second = rows(tmp_path / "with")
    assert first["rollout_distance"] == 0 and "rollout_distance" not in second
    assert first["reward_mean"] == rows(tmp_path / "without")[0]["reward_mean"]


def test_fewer_steps_train_the_noise_levels_of_all(tmp_path: Path) -> None:
    Spy.seen.clear()
    setting = rollout(steps=2, check_every=2)
    run = trainer(
        tmp_path,
        algorithm=Spy(timesteps={"count": 3, "indices": (0, 2)}),  # pyright: ignore
        rollout=setting,
        train={"iterations": 3},
        eval_dataset=PROMPTS,
    )
    with Calls(run.model.denoisers["transformer"]) as calls:
        run.evaluate()
    assert len(calls.sizes) == 3 == len(set(calls.timesteps))  # evaluations are exact
    run.train()
    levels = run.model.rollout(run.model.encode(["a"], guidance=False), steps=3).levels
    trained = {float(points.level.sigma) for points in Spy.seen}
    assert trained == {float(level.sigma) for level in levels} and len(trained) == 3
    assert [row.get("rollout_distance", 0) > 0 for row in rows(tmp_path)] == [True, False, True]
    # 8 pictures of 2 steps; a group of 4 by 2 steps and by 3; the policy at 3 levels, twice each
    passes = [row["forwards"] for row in rows(tmp_path)]
    check = 4 * (2 + 3)
    assert passes[0] - (passes[1] - passes[0]) == check
    first = rows(tmp_path)[0]
    assert 0 < first["seconds_rollout_check"] < first["seconds_rollout"]


def test_a_run_that_goes_on_is_the_same(tmp_path: Path) -> None:
    setting = {**rollout(steps=2, cache="taylorseer", check_every=2), "ahead": 1}
    settings: dict[str, Any] = {"rollout": setting, "checkpoint": {"every": 1}}
    reliable(tmp_path / "through", **settings).train()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reliable(tmp_path / "halves", reward=stopping(2, stop), **settings).train()
    reliable(tmp_path / "halves", resume=True, **settings).train()
    assert_same(tmp_path / "through", tmp_path / "halves")


def test_the_guard_warns_of_a_large_distance(tmp_path: Path) -> None:
    guards = Guards(GuardSettings(), 2, ())
    limit = GuardSettings().rollout_distance
    assert guards.iteration({}) == guards.iteration({"rollout_distance": limit}) == []
    (said,) = guards.iteration({"rollout_distance": 0.9})
    assert "0.90 spreads of a group away" in said and "rollout.accelerate" in said
    silent = Guards(GuardSettings(rollout_distance=0), 2, ())
    assert silent.iteration({"rollout_distance": 0.9}) == []


def test_it_is_refused_when_a_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rollout\.accelerate: cache = 'first_block'.*SD3Trans"):
        trainer(tmp_path, rollout=rollout(cache="first_block"))


def test_ranked_groups_and_servers_have_none() -> None:
    for other in ({"data": {"preferences": "x"}}, {"rollout": {"engine": "http://a:1"}}):
        setting = {"accelerate": {"steps": 2}, **other.get("rollout", {})}
        with pytest.raises(UserError, match=r"rollout\.accelerate"):
            Recipe.from_dict({**other, "rollout": setting})
