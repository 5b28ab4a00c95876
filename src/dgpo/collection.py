"""Collect: groups of pictures, their rewards and advantages, and the steps that made them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

import torch
from torch import Tensor

from dgpo.algorithms.base import BaseAlgorithm, TrajectoryAlgorithm
from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.core.seeds import seed_for, stream
from dgpo.errors import UserError
from dgpo.models.loop import Step
from dgpo.models.pipeline import PipelineModel, Rollout
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.schedulers import make_scheduler
from dgpo.models.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.models.text import Conditioning
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, Scored
from dgpo.rewards.mixing import Combine, mix
from dgpo.rewards.overlap import Scoring


class Sampler(Protocol):
    """What makes pictures: the policy, or a model that is not trained."""

    model: PipelineModel

    def rolling(self, weights: RollingWeights = "policy") -> AbstractContextManager[None]:
        """Put weights in place for rollouts."""
        ...


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
        total: number of pictures of the iteration that would be trained if every group had spread;
            groups that a reward has failed do not count.
        steps: the rollout's steps that a policy gradient trains on, rows as in ``x0``.
    """

    x0: Tensor
    prompts: Conditioning
    levels: list[Level]
    advantages: Tensor
    groups: Groups
    places: Tensor
    total: int
    steps: Sequence[Step] = ()

    @property
    def share(self) -> float:
        """B over ``total``: groups without spread are left out of every forward pass, and the
        share keeps the loss the mean over all pictures, as if they had been there with A = 0."""
        return len(self.x0) / self.total

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""
        return self.prompts.rows(self.groups.index[rows])


@dataclass
class Sampled:
    """The pictures of an iteration, which rewards are asked about as soon as they can be."""

    rollout: Rollout
    cond: Conditioning
    scoring: Scoring
    seconds: float


@dataclass(frozen=True)
class Collected:
    """A batch (None if no group had any spread) and the figures of its collection."""

    batch: Batch | None
    figures: dict[str, float]
    seconds: dict[str, float]


def collect(
    policy: Policy,
    rewards: RewardSet,
    algorithm: BaseAlgorithm,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    iteration: int,
    scheduler: Any,
) -> Collected:
    """Sample ``group_size`` pictures of each prompt, score them, and keep what can teach.

    Args:
        prompts: the iteration's prompts, one a group.
        iteration: counted from 0; with the recipe's seed it fixes every random number.
        scheduler: the sampler, or None for the pipeline's own; for a policy gradient that of
            :func:`dgpo.models.sde_schedulers.make_sde_scheduler`.

    Raises:
        UserError: the samples are not finite, or a reward's answer is unusable.
    """
    made = sample(policy, rewards, algorithm, prompts, recipe, iteration, scheduler)
    return score(made, algorithm, recipe)


def rollout_scheduler(recipe: Recipe, base: Any) -> Any:
    """The sampler of the rollouts: that of the algorithm or of ``rollout.sde`` if one of them is
    stochastic, else ``rollout.scheduler``.

    Args:
        recipe: of the run.
        base: the scheduler of the pipeline.

    Raises:
        UserError: it does not fit the pipeline.
    """
    if isinstance(recipe.algorithm, TrajectoryAlgorithm):
        return make_sde_scheduler(recipe.algorithm.sde, base)
    if recipe.rollout.sde is not None:
        return make_sde_scheduler(recipe.rollout.sde, base, "rollout.sde")
    return make_scheduler(recipe.rollout.scheduler, base)


def sample(
    policy: Sampler,
    rewards: RewardSet,
    algorithm: BaseAlgorithm,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    iteration: int,
    scheduler: Any,
) -> Sampled:
    """The first half of :func:`collect`: the pictures, shown to those rewards that take time.

    Raises:
        UserError: the samples are not finite, or a reward has failed already.
    """
    began = monotonic()
    guided = recipe.rollout.guidance_scale != 1 or algorithm.kl_guidance is not None
    cond = policy.model.encode([prompt.text for prompt in prompts], guidance=guided)
    with ExitStack() as on_error:
        scoring = Scoring(rewards, prompts, recipe.group_size, recipe.overlaps_rewards)
        on_error.enter_context(scoring)
        made = _roll(policy, algorithm, cond, recipe, iteration, scheduler, scoring)
        on_error.pop_all()
    return Sampled(made, cond, scoring, monotonic() - began)


def score(made: Sampled, algorithm: BaseAlgorithm, recipe: Recipe) -> Collected:
    """The second half of :func:`collect`: the rewards, and what can teach.

    Raises:
        UserError: a reward's answer is unusable.
    """
    began = monotonic()
    with made.scoring as scoring:
        scored = scoring.finish()
    waited = monotonic() - began
    groups = Groups.contiguous(made.cond.size, recipe.group_size)
    batch, figures = learnable(scored, made.rollout, made.cond, groups, algorithm, recipe.combine)
    if recipe.overlaps_rewards:
        figures["seconds_reward_hidden"] = max(0.0, scoring.seconds - waited)
    return Collected(batch, figures, {"rollout": made.seconds, "reward": waited})


def learnable(
    scored: Scored,
    made: Rollout,
    cond: Conditioning,
    every: Groups,
    algorithm: BaseAlgorithm,
    combine: Combine,
) -> tuple[Batch | None, dict[str, float]]:
    """The groups that were scored and have spread, and the figures of all that were scored."""
    for why in dict.fromkeys(scored.lost.values()):
        warnings.warn(f"a group is left out: {why}", stacklevel=3)
    found = torch.tensor([group not in scored.lost for group in range(every.count)])
    rows = every.each(found).nonzero()[:, 0]
    figures = {"groups_dropped": 0.0, "groups_skipped": float(len(scored.lost))}
    if not len(rows):
        return None, {"reward_mean": math.nan, "reward_std": math.nan, "spread": 0.0, **figures}
    groups = every.subset(rows)
    by_name = {name: value[rows] for name, value in scored.by_name.items()}
    mixed = mix(by_name, scored.weights[rows], groups, combine)
    spread = groups.spread(mixed.merit)
    figures = {
        "reward_mean": float(mixed.total.mean()),
        "reward_std": float(mixed.total.std(unbiased=False)),
        "spread": float(groups.std(mixed.total).mean()),
        "groups_dropped": float((~spread).sum()),
        "groups_skipped": float(len(scored.lost)),
        **mixed.figures,
    }
    if not bool(spread.any()):
        return None, figures
    advantages = algorithm.advantages(mixed.merit, groups)
    size, trained = algorithm.trained_per_group or groups.size, groups.each(spread)
    if size != groups.size:
        trained = trained & (advantages != 0)
    kept = trained.nonzero()[:, 0]
    places = rows[kept]
    batch = Batch(
        x0=made.x0[places],
        prompts=cond.rows(found.nonzero()[:, 0][spread]),
        levels=made.levels,
        advantages=advantages[kept],
        groups=replace(groups.subset(kept), size=size),
        places=places,
        total=groups.count * size,
        steps=[_rows(step, places) for step in made.steps],
    )
    return batch, figures


def _roll(
    policy: Sampler,
    algorithm: BaseAlgorithm,
    cond: Conditioning,
    recipe: Recipe,
    iteration: int,
    scheduler: Any,
    scoring: Scoring,
) -> Rollout:
    """Pictures of all groups; the noise of a row depends on its place alone, not on the batch."""
    rollout, seed = recipe.rollout, recipe.seed
    switch = rollout.switch_to_old_after
    old = switch is not None and iteration >= switch
    weights: RollingWeights = "old" if old else algorithm.samples_from
    noisy = trained = range(0)
    if isinstance(algorithm, TrajectoryAlgorithm):
        noisy = trained = algorithm.noisy_steps(rollout.steps, iteration, seed)
    elif rollout.sde is not None:
        noisy = range(rollout.steps - 1)
    places = torch.arange(cond.size * recipe.group_size)
    parts: list[Rollout] = []
    with policy.rolling(weights):
        for rows in places.split(rollout.batch or len(places)):
            if noisy:
                seeds = [seed_for(seed, "sde", iteration, row) for row in rows.tolist()]
                scheduler = with_noise(scheduler, noisy, seeds)
            part = policy.model.rollout(
                cond.rows(rows // recipe.group_size),
                steps=rollout.steps,
                guidance_scale=rollout.guidance_scale,
                scheduler=scheduler,
                generators=[stream(seed, "rollout", iteration, row) for row in rows.tolist()],
                record=trained,
            )
            parts.append(part)
            scoring.add(part.images or ())
    made = _joined(parts)
    if not bool(torch.isfinite(made.x0).all()):
        raise UserError(
            f"iteration {iteration + 1}: the sampler returned numbers that are not finite, so the "
            "weights have diverged: lower train.lr and go on from the last checkpoint"
        )
    return made


def _joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts of one schedule as one."""
    steps = [
        replace(
            same[0],
            sample=torch.cat([step.sample for step in same]),
            output=torch.cat([step.output for step in same]),
            previous=torch.cat([step.previous for step in same]),
        )
        for same in zip(*(part.steps for part in parts), strict=True)
    ]
    images = [image for part in parts for image in part.images or ()]
    return Rollout(torch.cat([part.x0 for part in parts]), images, parts[0].levels, steps)


def _rows(step: Step, rows: Tensor) -> Step:
    """Some rows of a step."""
    return replace(
        step,
        sample=step.sample[rows],
        output=step.output[rows],
        previous=step.previous[rows],
    )
