"""Collect: groups of pictures by a deterministic sampler, their rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import monotonic

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.core.seeds import stream
from dgpo.errors import UserError
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.text import Conditioning
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet


@dataclass(frozen=True)
class Batch:
    """What one iteration trains on: the groups in which rewards differ.

    Args:
        x0: [B, ...] clean samples in the denoiser's input space, whole groups, group after group.
        prompts: conditioning, one row a GROUP, with the negative prompt if a loss wants guidance.
        levels: the rollout's own schedule.
        advantages: [B].
        groups: group of each row.
        places: [B], the position of each row among all pictures of the iteration.
        total: number of pictures of the iteration that would be trained if every group had spread.
    """

    x0: Tensor
    prompts: Conditioning
    levels: list[Level]
    advantages: Tensor
    groups: Groups
    places: Tensor
    total: int

    @property
    def share(self) -> float:
        """B over ``total``: groups without spread are left out of every forward pass, and the
        share keeps the loss the mean over all pictures, as if they had been there with A = 0."""
        return len(self.x0) / self.total

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""
        return self.prompts.rows(self.groups.index[rows])


@dataclass(frozen=True)
class Collected:
    """A batch (None if no group had any spread) and the figures of its collection."""

    batch: Batch | None
    figures: dict[str, float]
    seconds: dict[str, float]


def collect(
    policy: Policy,
    rewards: RewardSet,
    algorithm: Algorithm,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    iteration: int,
    scheduler: object | None,
) -> Collected:
    """Sample ``group_size`` pictures of each prompt, score them, and keep what can teach.

    Args:
        prompts: the iteration's prompts, one a group.
        iteration: counted from 0; with the recipe's seed it fixes every random number.
        scheduler: the sampler, or None for the pipeline's own.

    Raises:
        UserError: the samples are not finite, or a reward's answer is unusable.
    """
    began = monotonic()
    groups = Groups.contiguous(len(prompts), recipe.group_size)
    guided = recipe.rollout.guidance_scale != 1 or algorithm.kl_guidance is not None
    cond = policy.model.encode([prompt.text for prompt in prompts], guidance=guided)
    x0, images, levels = _roll(policy, cond, recipe, iteration, scheduler)
    sampled = monotonic()
    scores = rewards(images, [prompts[group] for group in groups.index.tolist()])
    rewarded = monotonic()
    spread = groups.spread(scores.total)
    figures = {
        "reward_mean": float(scores.total.mean()),
        "reward_std": float(scores.total.std(unbiased=False)),
        "spread": float(groups.std(scores.total).mean()),
        "groups_dropped": float((~spread).sum()),
        **{f"reward/{name}": float(value.mean()) for name, value in scores.by_name.items()},
    }
    batch = None
    if bool(spread.any()):
        advantages = algorithm.advantages(scores.total, groups)
        size, trained = algorithm.trained_per_group or groups.size, groups.each(spread)
        if size != groups.size:
            trained = trained & (advantages != 0)
        kept = trained.nonzero()[:, 0]
        batch = Batch(
            x0=x0[kept],
            prompts=cond.rows(spread.nonzero()[:, 0]),
            levels=levels,
            advantages=advantages[kept],
            groups=replace(groups.subset(kept), size=size),
            places=kept,
            total=groups.count * size,
        )
    seconds = {"rollout": sampled - began, "reward": rewarded - sampled}
    return Collected(batch, figures, seconds)


def _roll(
    policy: Policy, cond: Conditioning, recipe: Recipe, iteration: int, scheduler: object | None
) -> tuple[Tensor, list, list[Level]]:
    """Pictures of all groups; the noise of a row depends on its place alone, not on the batch."""
    rollout = recipe.rollout
    switch = rollout.switch_to_old_after
    old = switch is not None and iteration >= switch
    weights: RollingWeights = "old" if old else recipe.algorithm.samples_from
    places = torch.arange(cond.size * recipe.group_size)
    x0, images, levels = [], [], []
    with policy.rolling(weights):
        for rows in places.split(rollout.batch or len(places)):
            made = policy.model.rollout(
                cond.rows(rows // recipe.group_size),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                scheduler=scheduler,
                generators=[
                    stream(recipe.seed, "rollout", iteration, row) for row in rows.tolist()
                ],
            )
            assert made.images is not None
            x0.append(made.x0)
            images += made.images
            levels = made.levels
    samples = torch.cat(x0)
    if not bool(torch.isfinite(samples).all()):
        raise UserError(
            f"iteration {iteration + 1}: the sampler returned numbers that are not finite, so the "
            "weights have diverged: lower train.lr and go on from the last checkpoint"
        )
    return samples, images, levels
