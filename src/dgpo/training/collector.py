"""Iteration after iteration, with pictures that are sampled ahead of their rewards."""

from __future__ import annotations

import json
from typing import Any

from dgpo.algorithms.base import BaseAlgorithm
from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.models.policy import Policy
from dgpo.prompts import PromptSampler
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet
from dgpo.training.collection import Collected, Sampled, sample, score, show_again
from dgpo.training.prefetched import Pending, Prefetched, pack, unpack

_CHANGES_NO_PICTURE = {"ahead", "batch", "overlap_rewards", "engine"}
"""Of ``rollout``."""


class Collector:
    """Collects what each iteration trains on.

    With ``rollout.ahead`` = N the pictures of the N iterations after it are sampled first, by the
    weights of the moment, so that rewards that take their time have something to look at while the
    policy is updated. A checkpoint keeps them: the weights that have made them are gone.

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
        processes: Processes = SINGLE,
    ) -> None:
        self._policy, self._rewards, self._algorithm = policy, rewards, algorithm
        self._prompts, self._recipe, self._scheduler = prompts, recipe, scheduler
        self._processes = processes
        self._sampled: dict[int, Sampled] = {}
        self._pending: dict[int, Pending] = {}
        """What earlier weights have made, until the iteration after its own."""

    def __call__(self, iteration: int) -> Collected:
        """What an iteration trains on.

        Args:
            iteration: counted from 0; after an error the same one may be asked for again.

        Raises:
            UserError: as :func:`dgpo.training.collection.collect`.
        """
        # what this iteration has sampled before an error is sampled again, by the same weights:
        # the figures of the iteration then count it as if there had been no error
        self._pending = self._kept(iteration)
        self._sampled = {n: made for n, made in self._sampled.items() if n in self._pending}
        last = min(iteration + self._recipe.rollout.ahead, self._recipe.train.iterations - 1)
        for one in range(iteration, last + 1):
            if one in self._sampled:
                continue
            if one in self._pending:
                self._sampled[one] = self._show_again(one, self._pending[one])
                continue
            made = self._sampled[one] = self._sample(one)
            if one > iteration:
                self._pending[one] = Pending(made.rollout, made.seconds, iteration)
        return score(self._sampled.pop(iteration), self._algorithm, self._recipe)

    def pending(self, iteration: int) -> Prefetched:
        """What a checkpoint has to keep beside the weights. Collective.

        Args:
            iteration: the next one.
        """
        kept = self._kept(iteration)
        shares = {one: self._share(one) for one in kept}
        return pack(kept, shares, {one: self._made_for(one) for one in kept})

    def restore(self, packed: Prefetched) -> list[str]:
        """Go on with what a checkpoint has kept. Pictures of other prompts or settings than the
        recipe's are left aside, and sampled when their iteration comes.

        Returns:
            a sentence if some were.
        """
        device, other = self._policy.model.device, []
        for iteration in map(int, packed.facts):
            if packed.facts[str(iteration)]["made_for"] != self._made_for(iteration):
                other.append(iteration + 1)
                continue
            self._pending[iteration] = unpack(packed, iteration, self._share(iteration), device)
        if not other:
            return []
        which = ", ".join(map(str, other))
        return [
            f"left aside: what was sampled ahead for iteration {which} has other prompts or rollout"
            " settings than the recipe"
        ]

    def _kept(self, iteration: int) -> dict[int, Pending]:
        """What was sampled before an iteration, for it and for later ones."""
        kept = self._pending.items()
        return {one: pending for one, pending in kept if pending.during < iteration <= one}

    def _share(self, iteration: int) -> Assignment:
        groups = len(self._prompts.at(iteration))
        return Assignment.of(groups, self._recipe.group_size, 1, self._processes)

    def _made_for(self, iteration: int) -> Any:
        """What the pictures of an iteration depend on beside the weights, as JSON reads it back."""
        recipe = self._recipe
        rollout = recipe.rollout.model_dump(mode="json", exclude=_CHANGES_NO_PICTURE)
        asked = [prompt.text for prompt in self._prompts.at(iteration)]
        facts = {"prompts": asked, "group_size": recipe.group_size, "seed": recipe.seed}
        return json.loads(json.dumps({**facts, "rollout": rollout}))

    def _show_again(self, iteration: int, pending: Pending) -> Sampled:
        return show_again(
            self._policy,
            self._rewards,
            self._algorithm,
            self._prompts.at(iteration),
            self._recipe,
            pending.made,
            pending.seconds,
            self._processes,
        )

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
