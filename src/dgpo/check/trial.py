"""Two iterations of training, to try out a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgpo.algorithms.dgpo import DGPO
from dgpo.core.timesteps import TimestepChoice
from dgpo.errors import UserError
from dgpo.models.policy import Policy
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import load_rewards
from dgpo.rewards.shipped.stand_in import level
from dgpo.training.batch import Batch
from dgpo.training.collector import Collector
from dgpo.training.updater import Updater, rounds_of

_STEPS = 3


def two_iterations(
    policy: Policy, prompts: Sequence[Prompt], levels: int, lr: float = 1e-3
) -> list[tuple[float, float]]:
    """Train two iterations, each on rollouts of the weights as they are by then.

    Args:
        policy: what is trained.
        prompts: a group each.
        levels: how many noise levels a rollout has. All are trained, so that every expert is.
        lr: the learning rate of the two steps.

    Returns:
        For each iteration DGPO's objective on the points of that iteration, before and after the
        update.

    Raises:
        UserError: the samples of all groups are alike.
    """
    # scaled as in the paper, the loss is the objective itself: log 2 at the start
    algorithm = DGPO(loss_scale="paper", timesteps=TimestepChoice(count=levels, indices=None))
    recipe = Recipe.from_dict(
        {
            "group_size": 3,
            "groups_per_iteration": 2,
            "rollout": {"steps": _STEPS},
            # without momentum, so that a step goes down on its own points whatever came before
            "train": {"iterations": 2, "lr": lr, "betas": (0.0, 0.999)},
            "algorithm": {"name": "dgpo", **algorithm.model_dump()},
        }
    )
    collect = Collector(recipe, policy, load_rewards(level), lambda iteration: prompts)
    updater, rounds = Updater(policy, recipe), rounds_of(policy, recipe)

    def objective(batch: Batch, iteration: int) -> float:
        with torch.no_grad():
            terms = [(t.loss.item(), t.share) for one in rounds(batch, iteration) for t in one]
        return sum(loss * share for loss, share in terms) / sum(share for _, share in terms)

    losses: list[tuple[float, float]] = []
    for iteration in range(2):
        batch = collect(iteration).batch
        if batch is None:
            raise UserError("the samples of a group are all alike: there is nothing to compare")
        before = objective(batch, iteration)
        updater.update(batch, iteration)
        losses.append((before, objective(batch, iteration)))
    return losses
