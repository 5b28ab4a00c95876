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
from dgpo.core.seeds import seed_for
from dgpo.distributed.processes import ALONE, Processes
from dgpo.distributed.shares import Share
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
from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest


class Sampler(Protocol):
    """What makes pictures: the policy, or a model that is not trained."""

    model: PipelineModel

    @property
    def sharded(self) -> bool:
        """Whether every process must take part in every pass."""
        ...

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
        shares: the places of the rows of every process, if there are several; ``groups`` then
            counts those of all, and the rest is this process's.
        split: whether a group is spread over several processes.
        spare: one row of this process, for passes that others make without it.
    """

    x0: Tensor
    prompts: Conditioning
    levels: list[Level]
    advantages: Tensor
    groups: Groups
    places: Tensor
    total: int
    steps: Sequence[Step] = ()
    shares: tuple[Tensor, ...] = ()
    split: bool = False
    spare: Batch | None = None

    @property
    def share(self) -> float:
        """Rows of all processes over ``total``: groups without spread are left out of every forward
        pass, and the share keeps the loss the mean over all pictures, as if they had been there
        with A = 0."""
        return self.count / self.total

    @property
    def everyone(self) -> tuple[Tensor, ...]:
        """The places of the rows of every process."""
        return self.shares or (self.places,)

    @property
    def count(self) -> int:
        """Rows of all processes."""
        return sum(map(len, self.everyone))

    @property
    def most(self) -> int:
        """Rows of the process that has the most."""
        return max(map(len, self.everyone))

    @property
    def here(self) -> Groups:
        """The groups of this process's rows, without the other processes: nothing is summed."""
        if not self.shares:
            return self.groups
        alone = Groups(self.groups.index, self.groups.size, self.groups.count)
        return alone.subset(torch.arange(len(self.places)))

    def parts(self, size: int) -> list[Tensor]:
        """This process's rows, at most ``size`` at once."""
        return [rows for rows in torch.arange(len(self.x0)).split(size) if len(rows)]

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""
        return self.prompts.rows(self.here.index[rows])


@dataclass
class Sampled:
    """The pictures of an iteration, which rewards are asked about as soon as they can be."""

    rollout: Rollout
    cond: Conditioning
    scoring: Scoring
    seconds: float
    share: Share


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
    processes: Processes = ALONE,
) -> Collected:
    """Sample ``group_size`` pictures of each prompt, score them, and keep what can teach.

    Args:
        prompts: the iteration's prompts, one a group.
        iteration: counted from 0; with the recipe's seed it fixes every random number.
        scheduler: the sampler, or None for the pipeline's own; for a policy gradient that of
            :func:`dgpo.models.sde_schedulers.make_sde_scheduler`.
        processes: of the run. Each makes its share of the pictures and asks the rewards about it;
            what is compared are the numbers of all. Collective.

    Raises:
        UserError: the samples are not finite, or a reward's answer is unusable.
    """
    made = sample(policy, rewards, algorithm, prompts, recipe, iteration, scheduler, processes)
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
    processes: Processes = ALONE,
) -> Sampled:
    """The first half of :func:`collect`: the pictures, shown to those rewards that take time.

    Raises:
        UserError: the samples are not finite, or a reward has failed already.
    """
    began = monotonic()
    guided = recipe.rollout.guidance_scale != 1 or algorithm.kl_guidance is not None
    parts = algorithm.updates if isinstance(algorithm, TrajectoryAlgorithm) else 1
    share = Share.of(len(prompts), recipe.group_size, parts, processes)
    held = [prompts[group].text for group in share.held.tolist()]
    cond = policy.model.encode(held, guidance=guided)
    with ExitStack() as on_error:
        groups, overlap = share.groups.tolist(), recipe.overlaps_rewards
        scoring = Scoring(rewards, prompts, recipe.group_size, overlap, groups)
        on_error.enter_context(scoring)
        made = _roll(policy, algorithm, held, cond, share, recipe, iteration, scheduler, scoring)
        on_error.pop_all()
    return Sampled(made, cond, scoring, monotonic() - began, share)


def engine_of(policy: Sampler) -> RolloutEngine:
    """What makes the pictures: the policy's engine, or its own pipeline."""
    engine = policy.engine if isinstance(policy, Policy) else None
    return LocalEngine(policy) if engine is None else engine


def score(made: Sampled, algorithm: BaseAlgorithm, recipe: Recipe) -> Collected:
    """The second half of :func:`collect`: the rewards, and what can teach.

    Raises:
        UserError: a reward's answer is unusable.
    """
    began = monotonic()
    with made.scoring as scoring:
        scored = _of_all(scoring.finish(), made.share)
    waited = monotonic() - began
    groups = Groups.contiguous(made.share.count, recipe.group_size)
    batch, figures = learnable(
        scored, made.rollout, made.cond, groups, algorithm, recipe.combine, made.share
    )
    if recipe.overlaps_rewards:
        figures["seconds_reward_hidden"] = max(0.0, scoring.seconds - waited)
    return Collected(batch, figures, {"rollout": made.seconds, "reward": waited})


def _of_all(scored: Scored, share: Share) -> Scored:
    """What all processes have scored, in the order of the places."""
    values, lost = share.gather({**scored.by_name, "": scored.weights}, scored.lost)
    weights = values.pop("")
    return Scored(values, weights, lost)


def learnable(
    scored: Scored,
    made: Rollout,
    cond: Conditioning,
    every: Groups,
    algorithm: BaseAlgorithm,
    combine: Combine,
    share: Share | None = None,
) -> tuple[Batch | None, dict[str, float]]:
    """The groups that were scored and have spread, and the figures of all that were scored.

    Args:
        scored: all pictures, those of other processes included.
        made: the pictures of this process.
        cond: of the groups that this process has pictures of.
        every: the groups of all pictures.
        share: which of them are here; None for all.
    """
    share = share or Share.of(every.count, every.size, 1)
    for why in dict.fromkeys(scored.lost.values()) if share.processes.main else ():
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
    chosen = replace(groups.subset(kept), size=size)
    batch = _batch(rows[kept], chosen, advantages[kept], groups.count * size, made, cond, share)
    return batch, figures


def _batch(
    places: Tensor,
    groups: Groups,
    advantages: Tensor,
    total: int,
    made: Rollout,
    cond: Conditioning,
    share: Share,
) -> Batch:
    """This process's rows of what is trained: all [n] of it are given, but for the pictures."""
    processes, split = share.processes, share.splits(places)
    here = torch.isin(places, share.mine)
    mine = places[here]
    rows = share.find(mine)
    reduce = {"reduce": processes.sum} if split else {}
    batch = Batch(
        x0=made.x0[rows],
        prompts=cond.rows(torch.searchsorted(share.held, (mine // share.size).unique())),
        levels=made.levels,
        advantages=advantages[here],
        groups=replace(groups, index=groups.index[here], **reduce),
        places=mine,
        total=total,
        steps=[_rows(step, rows) for step in made.steps],
    )
    if processes.alone:
        return batch
    first = torch.arange(1)
    spare = replace(
        batch,
        x0=made.x0[first],
        prompts=cond.rows(first),
        advantages=advantages.new_zeros(1),
        groups=Groups.contiguous(1, 1),
        places=share.mine[first],
        steps=[_rows(step, first) for step in made.steps],
    )
    return replace(batch, shares=share.divided(places), split=split, spare=spare)


def _roll(
    policy: Sampler,
    algorithm: BaseAlgorithm,
    held: Sequence[str],
    cond: Conditioning,
    share: Share,
    recipe: Recipe,
    iteration: int,
    scheduler: Any,
    scoring: Scoring,
) -> Rollout:
    """The pictures of a share; the noise of a row depends on its place alone, not on the batch."""
    rollout, seed = recipe.rollout, recipe.seed
    switch = rollout.switch_to_old_after
    old = switch is not None and iteration >= switch
    weights: RollingWeights = "old" if old else algorithm.samples_from
    noisy = trained = range(0)
    if isinstance(algorithm, TrajectoryAlgorithm):
        noisy = trained = algorithm.noisy_steps(rollout.steps, iteration, seed)
    elif rollout.sde is not None:
        noisy = range(rollout.steps - 1)
    parts: list[Rollout] = []
    engine = engine_of(policy)
    with engine.holding(weights):
        for own in share.batches(rollout.batch):
            if not len(own) and not policy.sharded:
                continue
            rows = own if len(own) else torch.arange(1)  # other processes have one batch more
            places = share.mine[rows].tolist()
            if noisy:
                seeds = [seed_for(seed, "sde", iteration, place) for place in places]
                scheduler = with_noise(scheduler, noisy, seeds)
            groups = share.rows[rows]
            part = engine.rollout(
                RolloutRequest(
                    texts=[held[int(group)] for group in groups.tolist()],
                    cond=cond.rows(groups),
                    seeds=[seed_for(seed, "rollout", iteration, place) for place in places],
                    steps=rollout.steps,
                    guidance_scale=rollout.guidance_scale,
                    scheduler=scheduler,
                    record=trained,
                )
            )
            if len(own):
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
