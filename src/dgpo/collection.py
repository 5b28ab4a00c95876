"""Collect: groups of pictures by a deterministic sampler, their rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        cond: conditioning of the B rows, with the negative prompt if a loss wants guidance.
        levels: the rollout's own schedule.
        advantages: [B].
        groups: group of each row.
        share: B over the number of all pictures of the iteration; groups without spread are left
            out of every forward pass, and the share keeps the loss the mean over all pictures.
    """

    x0: Tensor
    cond: Conditioning
    levels: list[Level]
    advantages: Tensor
    groups: Groups
    share: float


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
        UserError: the pictures are not finite, or a reward's answer is unusable.
    """
    began = monotonic()
    size = recipe.group_size
    groups = Groups.contiguous(len(prompts), size)
    rows = [prompt for prompt in prompts for _ in range(size)]
    guided = recipe.rollout.guidance_scale != 1 or algorithm.kl_guidance is not None
    cond = policy.model.encode([p.text for p in prompts], guidance=guided).repeat(size)
    x0, images, levels = _roll(policy, cond, recipe, iteration, scheduler)
    sampled = monotonic()
    scores = rewards(images, rows)
    rewarded = monotonic()
    advantages = algorithm.advantages(scores.total, groups)
    spread = groups.spread(scores.total)
    kept = groups.each(spread).nonzero()[:, 0]
    figures = {
        "reward_mean": float(scores.total.mean()),
        "reward_std": float(scores.total.std(unbiased=False)),
        "spread": float(groups.std(scores.total).mean()),
        "groups_dropped": float((~spread).sum()),
        **{f"reward/{name}": float(value.mean()) for name, value in scores.by_name.items()},
    }
    batch = None
    if len(kept):
        batch = Batch(
            x0=x0[kept],
            cond=cond.rows(kept),
            levels=levels,
            advantages=advantages[kept],
            groups=groups.subset(kept),
            share=len(kept) / len(rows),
        )
    seconds = {"rollout": sampled - began, "reward": rewarded - sampled}
    return Collected(batch, figures, seconds)


def _roll(
    policy: Policy, cond: Conditioning, recipe: Recipe, iteration: int, scheduler: object | None
) -> tuple[Tensor, list, list[Level]]:
    """Pictures of all rows; the noise of a row depends on its place alone, not on the batch."""
    rollout = recipe.rollout
    switch = rollout.switch_to_old_after
    weights: RollingWeights = "old" if switch is not None and iteration >= switch else "policy"
    per_call = rollout.batch or cond.size
    x0, images, levels = [], [], []
    with policy.rolling(weights):
        for start in range(0, cond.size, per_call):
            index = torch.arange(start, min(start + per_call, cond.size))
            made = policy.model.rollout(
                cond.rows(index),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                scheduler=scheduler,
                generators=[
                    stream(recipe.seed, "rollout", iteration, row) for row in index.tolist()
                ],
            )
            assert made.images is not None
            x0.append(made.x0)
            images += made.images
            levels = made.levels
    samples = torch.cat(x0)
    if not bool(torch.isfinite(samples).all()):
        raise UserError(
            f"iteration {iteration + 1}: the sampler returned pictures that are not finite; "
            "the weights have diverged: lower train.lr, or go back to an earlier checkpoint"
        )
    return samples, images, levels
