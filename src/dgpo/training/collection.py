"""Collect: the pictures of an iteration and their rewards, shared over the processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

import torch

from dgpo.algorithms.base import BaseAlgorithm, TrajectoryAlgorithm
from dgpo.core.groups import Groups
from dgpo.core.seeds import seed_for
from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.errors import UserError
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.models.policy import Policy, RollingWeights
from dgpo.models.samplers.schedulers import make_scheduler
from dgpo.models.samplers.sde_schedulers import make_sde_scheduler, with_noise
from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet, Scored
from dgpo.rewards.scoring import Scoring
from dgpo.rollouts.engine import LocalEngine, RolloutEngine, RolloutRequest
from dgpo.training.batch import Batch, build_batch


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


@dataclass
class Sampled:
    """The pictures of an iteration, which rewards are asked about as soon as they can be."""

    rollout: Rollout
    cond: Conditioning
    scoring: Scoring
    seconds: float
    share: Assignment


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
    processes: Processes = SINGLE,
) -> Collected:
    """Sample ``group_size`` pictures of each prompt, score them, and keep what can teach.

    Args:
        prompts: the iteration's prompts, one a group.
        iteration: counted from 0; with the recipe's seed it fixes every random number.
        scheduler: the sampler, or None for the pipeline's own; for a policy gradient that of
            :func:`dgpo.models.samplers.sde_schedulers.make_sde_scheduler`.
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
    processes: Processes = SINGLE,
) -> Sampled:
    """The first half of :func:`collect`: the pictures, shown to those rewards that take time.

    Raises:
        UserError: the samples are not finite, or a reward has failed already.
    """
    began = monotonic()
    share, held, cond = _asked(policy, algorithm, prompts, recipe, processes)
    with ExitStack() as on_error:
        scoring = on_error.enter_context(_scoring(rewards, prompts, share, recipe))
        made = _roll(policy, algorithm, held, cond, share, recipe, iteration, scheduler, scoring)
        on_error.pop_all()
    return Sampled(made, cond, scoring, monotonic() - began, share)


def show_again(
    policy: Sampler,
    rewards: RewardSet,
    algorithm: BaseAlgorithm,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    made: Rollout,
    seconds: float,
    processes: Processes = SINGLE,
) -> Sampled:
    """What :func:`sample` has returned, of its pictures alone: rewards are asked about the same
    batches.

    Args:
        made: this process's share of the pictures.
        seconds: that sampling them took.
    """
    share, _, cond = _asked(policy, algorithm, prompts, recipe, processes)
    images = made.images or []
    with ExitStack() as on_error:
        scoring = on_error.enter_context(_scoring(rewards, prompts, share, recipe))
        for rows in share.batches(recipe.rollout.batch):
            scoring.add([images[row] for row in rows.tolist()])
        on_error.pop_all()
    return Sampled(made, cond, scoring, seconds, share)


def _asked(
    policy: Sampler,
    algorithm: BaseAlgorithm,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    processes: Processes,
) -> tuple[Assignment, list[str], Conditioning]:
    """This process's share of an iteration, the texts of its groups, and their embeddings."""
    guided = recipe.rollout.guidance_scale != 1 or algorithm.kl_guidance is not None
    parts = algorithm.updates if isinstance(algorithm, TrajectoryAlgorithm) else 1
    share = Assignment.of(len(prompts), recipe.group_size, parts, processes)
    held = [prompts[group].text for group in share.held.tolist()]
    return share, held, policy.model.encode(held, guidance=guided)


def _scoring(
    rewards: RewardSet, prompts: Sequence[Prompt], share: Assignment, recipe: Recipe
) -> Scoring:
    overlap, groups = recipe.overlaps_rewards, share.groups.tolist()
    return Scoring(rewards, prompts, recipe.group_size, overlap, groups)


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
    batch, figures = build_batch(
        scored, made.rollout, made.cond, groups, algorithm, recipe.combine, made.share
    )
    if recipe.overlaps_rewards:
        figures["seconds_reward_hidden"] = max(0.0, scoring.seconds - waited)
    return Collected(batch, figures, {"rollout": made.seconds, "reward": waited})


def _of_all(scored: Scored, share: Assignment) -> Scored:
    """What all processes have scored, in the order of the places."""
    values, lost = share.gather({**scored.by_name, "": scored.weights}, scored.lost)
    weights = values.pop("")
    return Scored(values, weights, lost)


def _roll(
    policy: Sampler,
    algorithm: BaseAlgorithm,
    held: Sequence[str],
    cond: Conditioning,
    share: Assignment,
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
