"""Rewards beside the sampling: the same numbers in the same order; groups that are lost."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from dgpo.algorithms import DGPO
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.training.collector import Collected, Collector
from families.tiny import sd3_small
from tiny_runs import PROMPTS, settings

LEVELS: Any = {"count": 1, "indices": (0, 2)}


class Watched:
    """Brightness plus the number of the call; remembers who called."""

    __name__ = "watched"

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.breaks: set[str] = set()

    def __call__(self, images: Any, prompts: list[str]) -> list[float]:
        self.calls.append((threading.current_thread().name, prompts))
        if self.breaks & set(prompts):
            raise ValueError("no answer")
        values = [float(torch.tensor(list(image.convert("L").tobytes())).sum()) for image in images]
        return [value + len(self.calls) for value in values]


@pytest.fixture(scope="module")
def policy() -> Policy:
    model = PipelineModel(sd3_small(), call={"height": 16, "width": 16})
    return Policy(model, Recipe.from_dict(settings()).lora, seed=0)


def run(
    policy: Policy, reward: Any, batch: int | None, overlap: bool | None, **term: Any
) -> Collected:
    rollout = {"batch": batch, "overlap_rewards": overlap}
    data = settings(group_size=4, groups_per_iteration=3, rollout=rollout)
    recipe = Recipe.from_dict({**data, "algorithm": DGPO(timesteps=LEVELS)})
    rows = [Prompt(text) for text in PROMPTS[:3]]
    return Collector(recipe, policy, load_rewards({reward: term or 1.0}), lambda _: rows)(0)


def test_overlapped_is_the_same_as_synchronous(policy: Policy) -> None:
    one, two = Watched(), Watched()
    apart, together = run(policy, one, 6, False), run(policy, two, 6, None)
    assert apart.batch is not None and together.batch is not None
    assert torch.equal(apart.batch.advantages, together.batch.advantages)
    assert torch.equal(apart.batch.x0, together.batch.x0)
    hidden = together.figures.pop("seconds_reward_hidden")
    assert hidden >= 0 and apart.figures == together.figures
    assert [prompts for _, prompts in one.calls] == [prompts for _, prompts in two.calls]
    assert [len(prompts) for _, prompts in one.calls] == [4, 8]  # whole groups
    assert {name for name, _ in one.calls} == {threading.current_thread().name}
    assert {name for name, _ in two.calls} == {"reward"}


def test_one_batch_is_one_call_in_place(policy: Policy) -> None:
    reward = Watched()
    found = run(policy, reward, None, None)
    assert [len(prompts) for _, prompts in reward.calls] == [12]
    assert "seconds_reward_hidden" not in found.figures


@pytest.mark.parametrize("overlap", [False, True])
def test_a_lost_group_is_left_out_and_counted(policy: Policy, overlap: bool) -> None:
    reward = Watched()
    reward.breaks = {PROMPTS[1]}
    with pytest.warns(UserWarning, match="no answer"):
        found = run(policy, reward, 4, overlap, on_error="skip_group")
    assert found.figures["groups_skipped"] == 1 and found.figures["groups_dropped"] == 0
    batch = found.batch
    assert batch is not None and batch.groups.count == 2 and batch.share == 1
    assert batch.positions.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert batch.prompts.size == 2
    reward.breaks = set(PROMPTS)
    with pytest.warns(UserWarning, match="no answer"):
        found = run(policy, reward, 4, overlap, on_error="skip_group")
    assert found.batch is None and found.figures["groups_skipped"] == 3
    with pytest.raises(UserError, match="no answer"):
        run(policy, reward, 4, overlap)


def test_recipes_of_several_rewards() -> None:
    rewards = {"redness": 1, "mine": {"use": "brightness", "weight": 0.5, "timeout": 3}}
    data = settings(rewards=rewards, combine="gdpo", algorithm={"advantage_std": "batch"})
    recipe = Recipe.from_dict(data)
    assert recipe.reward_weights == {"redness": 1.0, "mine": 0.5}
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert load_rewards(recipe.rewards).weights == recipe.reward_weights
    for changed, words in (
        ({"rewards": {"redness": {"timout": 1}}}, "did you mean rewards.redness.timeout"),
        ({"rewards": {"redness": {"weight": 0}}}, "weight of 0"),
        ({"rewards": {"redness": {"on_error": "zero"}}}, "rewards.redness.on_error"),
        ({"rewards": {"redness": "much"}}, "rewards.redness = 'much'"),
        ({"rewards": {"mine": {"use": "rednes"}}}, "rewards.mine.use: unknown reward"),
        ({"algorithm": {"advantage_std": "group"}}, "algorithm.advantage_std to batch"),
    ):
        with pytest.raises(UserError) as error:
            Recipe.from_dict({**data, **changed})
        assert words in str(error.value)
