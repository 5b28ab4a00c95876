"""Iteration after iteration, with pictures that are sampled ahead of their rewards."""

from __future__ import annotations

from typing import Any

from dgpo.algorithms.base import BaseAlgorithm
from dgpo.distributed.processes import ALONE, Processes
from dgpo.models.policy import Policy
from dgpo.prompts import PromptSampler
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet
from dgpo.training.collection import Collected, Sampled, sample, score


class Collector:
    """Collects what each iteration trains on.

    With ``rollout.ahead`` = N the pictures of the N iterations after it are sampled first, by the
    weights of the moment, so that rewards that take their time have something to look at while the
    policy is updated. What was sampled ahead is not saved: a run that goes on after a stop samples
    it anew.

    Args:
        policy: that makes the pictures.
        rewards: asked about them.
        algorithm: says what can teach.
        prompts: of each iteration.
        recipe: ``rollout``, the group's size, and the last iteration.
        scheduler: as of :func:`dgpo.training.collection.collect`.
        processes: of the run.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        algorithm: BaseAlgorithm,
        prompts: PromptSampler,
        recipe: Recipe,
        scheduler: Any,
        processes: Processes = ALONE,
    ) -> None:
        self._policy, self._rewards, self._algorithm = policy, rewards, algorithm
        self._prompts, self._recipe, self._scheduler = prompts, recipe, scheduler
        self._processes = processes
        self._sampled: dict[int, Sampled] = {}

    def __call__(self, iteration: int) -> Collected:
        """What an iteration trains on.

        Args:
            iteration: counted from 0; after an error the same one may be asked for again.

        Raises:
            UserError: as :func:`dgpo.training.collection.collect`.
        """
        last = min(iteration + self._recipe.rollout.ahead, self._recipe.train.iterations - 1)
        for one in range(iteration, last + 1):
            if one not in self._sampled:
                self._sampled[one] = self._sample(one)
        return score(self._sampled.pop(iteration), self._algorithm, self._recipe)

    def _sample(self, iteration: int) -> Sampled:
        return sample(
            self._policy,
            self._rewards,
            self._algorithm,
            self._prompts.at(iteration),
            self._recipe,
            iteration,
            self._scheduler,
            self._processes,
        )
