"""What is kept of the pictures of an iteration, and whose pictures they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dgpo.algorithms import DGPO, Algorithm, BestOfN, DiffusionDPO, DiffusionNFT
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.policy import Policy
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.training.batch import Batch
from dgpo.training.collector import Collector
from dgpo.training.forward_rounds import ForwardRounds
from dgpo.training.updater import Updater
from families.tiny import sd3_small
from tiny_runs import PROMPTS, Calls, settings

SIZE, COUNT = 6, 3
LEVELS: Any = {"count": 1, "indices": (0, 2)}
SCORES = [[0.1, 0.4, 0.7, 0.1, 0.7, 0.2], [0.5] * SIZE, [0.3, 0.2, 0.3, 0.3, 0.3, 0.3]]


class Case:
    """A tiny model, and rewards with ties that leave the second of three groups without spread."""

    def __init__(self, algorithm: Algorithm, **changes: Any) -> None:
        data = settings(group_size=SIZE, groups_per_iteration=COUNT, **changes)
        self.recipe = Recipe.from_dict({**data, "algorithm": algorithm})
        self.model = PipelineModel(sd3_small(), call=self.recipe.rollout.call)
        self.policy = Policy(self.model, self.recipe.lora, seed=0)

    def reward(self, images: Any, prompts: list[str]) -> list[float]:
        return [score for group in SCORES for score in group]

    def collect(self, iteration: int = 0) -> Batch:
        prompts = [Prompt(text) for text in PROMPTS[:COUNT]]
        rewards = load_rewards([self.reward])
        found = Collector(self.recipe, self.policy, rewards, lambda _: prompts)(iteration)
        assert found.batch is not None and found.figures["groups_dropped"] == 1
        return found.batch


@pytest.mark.parametrize(
    ("algorithm", "size"),
    [
        (DiffusionDPO(timesteps=LEVELS), 2),
        (BestOfN(top_k=3, timesteps=LEVELS), 3),
        (BestOfN(top_k=SIZE, timesteps=LEVELS), SIZE),
        (DGPO(timesteps=LEVELS, equal_groups="skip"), SIZE),
    ],
    ids=["pairs", "top 3", "all", "whole groups"],
)
def test_a_part_of_each_group_is_kept(algorithm: Algorithm, size: int) -> None:
    case = Case(algorithm)
    batch = case.collect()
    assert batch.groups.size == size and batch.groups.count == 2
    assert batch.groups.index.tolist() == [0] * size + [1] * size
    assert batch.total == COUNT * size and batch.share == pytest.approx(2 / 3)
    assert (batch.positions // SIZE).tolist() == [0] * size + [2] * size
    assert len(batch.x0) == len(batch.advantages) == 2 * size
    assert batch.conditioning(torch.arange(2 * size)).size == 2 * size
    if size == SIZE:
        return
    assert (batch.advantages != 0).all()
    kept = {2: ([0, 2], [0, 1]), 3: ([1, 2, 4], [0, 2, 3])}[size]  # of equals the first
    assert batch.positions.tolist() == kept[0] + [2 * SIZE + place for place in kept[1]]


@pytest.mark.parametrize("algorithm", [DiffusionDPO(timesteps=LEVELS), BestOfN(timesteps=LEVELS)])
def test_the_noise_of_a_group_does_not_depend_on_what_is_kept(algorithm: Algorithm) -> None:
    case, whole = Case(algorithm), Case(DGPO(timesteps=LEVELS, equal_groups="skip"))
    part, everything = case.collect(), whole.collect()
    noises = [
        ForwardRounds(c.policy, c.recipe)._noise(batch, 0, 0)
        for c, batch in ((case, part), (whole, everything))
    ]
    size = part.groups.size
    assert len(noises[0].flatten(1).unique(dim=0)) == 2  # one for each group that is left
    for group in (0, 1):
        mine = noises[0][group * size : (group + 1) * size]
        theirs = noises[1][group * SIZE]
        assert torch.equal(mine, theirs.expand_as(mine))
    assert torch.equal(part.x0, everything.x0[torch.isin(everything.positions, part.positions)])


@pytest.mark.parametrize(
    ("algorithm", "passes"),
    [
        (DiffusionDPO(timesteps=LEVELS), [4, 4]),  # the reference and the policy, two pairs
        (BestOfN(timesteps=LEVELS), [2]),  # no snapshot is declared, so none is asked
        (DGPO(timesteps=LEVELS, clip=None, kl=0, reference="ema"), [12, 12]),
    ],
)
def test_what_is_not_trained_or_declared_costs_no_forward_pass(
    algorithm: Algorithm, passes: list[int]
) -> None:
    case = Case(algorithm)
    batch = case.collect()
    updater = Updater(case.policy, case.recipe)
    case.model.has_guidance(batch.prompts)
    with Calls(case.model.denoisers["transformer"]) as calls:
        updater.update(batch, 0)
    assert calls.sizes == passes


def test_more_than_a_group_cannot_be_trained() -> None:
    with pytest.raises(UserError, match=r"group_size = 6.*trains 7 images"):
        Case(BestOfN(top_k=7, timesteps=LEVELS))


@pytest.mark.parametrize(
    ("algorithm", "switch", "whose"),
    [
        (DGPO(timesteps=LEVELS), None, ["policy", "policy"]),
        (DGPO(timesteps=LEVELS), 1, ["policy", "old"]),
        (DiffusionNFT(timesteps=LEVELS), None, ["old", "old"]),
    ],
)
def test_whose_pictures_are_collected(
    algorithm: Algorithm, switch: int | None, whose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(algorithm, rollout={"switch_to_old_after": switch})
    seen: list[str] = []
    right = Policy.rolling

    @contextmanager
    def rolling(self: Policy, weights: Any = "policy") -> Iterator[None]:
        seen.append(weights)
        with right(self, weights):
            yield

    monkeypatch.setattr(Policy, "rolling", rolling)
    for iteration in (0, 1):
        case.collect(iteration)
    assert seen == whose
