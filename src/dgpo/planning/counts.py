"""Count the pictures of a recipe, and the passes through its denoiser."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from dgpo.algorithms.base import Algorithm, TrajectoryAlgorithm
from dgpo.recipe import Recipe
from dgpo.training.forward_rounds import old_is_policy


@dataclass(frozen=True)
class Counts:
    """What a run samples and passes through its denoiser.

    Passes are counted in samples, as in ``metrics.jsonl``, for an iteration in which the rewards of
    every group differ.

    Args:
        images: the pictures of an iteration.
        rollout: the forward passes that make them; 0 where groups were ranked before.
        training: the forward passes of the update, including those without gradients.
        backward: the backward passes of the update.
        evaluation: the forward passes of one evaluation.
        evaluations: the evaluations of the whole run.
        iterations: the iterations of the whole run.
    """

    images: int
    rollout: int
    training: int
    backward: int
    evaluation: int
    evaluations: int
    iterations: int

    @property
    def forwards(self) -> int:
        """The forward passes of an iteration."""
        return self.rollout + self.training


@dataclass(frozen=True)
class Samplers:
    """The samplers of a run and what its pipeline makes of them.

    Args:
        rollout: the scheduler of rollouts.
        evaluation: the scheduler of evaluations.
        strength: the pipeline's ``strength``, where it starts from a noised picture and takes this
            share of the steps; else 1.
        has_guidance: whether the pipeline has classifier-free guidance.
    """

    rollout: Any
    evaluation: Any
    strength: float
    has_guidance: bool


def count(recipe: Recipe, samplers: Samplers, held_out: int) -> Counts:
    """Count what a recipe samples and passes through its denoiser.

    Args:
        recipe: the run.
        samplers: the samplers of its rollouts and evaluations.
        held_out: the number of prompts in an evaluation.
    """
    rollout, own = recipe.rollout, recipe.eval_sampling
    steps = calls_of(samplers.rollout, rollout.steps, samplers.strength)
    eval_steps = calls_of(samplers.evaluation, own.steps, samplers.strength)
    points = _points(recipe)
    return Counts(
        images=recipe.images_per_iteration,
        rollout=recipe.images_sampled * steps * _passes(rollout.guidance_scale),
        training=points * _forwards_at_a_point(recipe, samplers.has_guidance) - _shared(recipe),
        backward=points * _policy_passes(recipe),
        evaluation=held_out * eval_steps * _passes(own.guidance_scale),
        evaluations=recipe.eval.count(recipe.train.iterations) if held_out else 0,
        iterations=recipe.train.iterations,
    )


def calls_of(scheduler: Any, steps: int, strength: float = 1.0) -> int:
    """Count the calls of the denoiser for one sample, as the scheduler makes them.

    Samplers of second order call it twice a step, and PLMS once more in all.
    """
    tried = deepcopy(scheduler)
    shift = {"mu": 1.0} if getattr(tried.config, "use_dynamic_shifting", False) else {}
    tried.set_timesteps(steps, **shift)
    left_out = steps - min(int(steps * strength), steps)
    return len(tried.timesteps) - left_out * getattr(tried, "order", 1)


def _splits_groups(recipe: Recipe) -> bool:
    """Return whether micro-batches split groups whose weights need the whole group.

    The policy is asked once more then, without gradients."""
    algorithm, size = recipe.algorithm, recipe.rows_at_once("cuda")  # auto splits none anywhere
    if not isinstance(algorithm, Algorithm) or type(algorithm).weights is Algorithm.weights:
        return False
    group = algorithm.trained_per_group or recipe.group_size
    whole = size is None or size >= group * recipe.groups_per_iteration or size % group == 0
    return not whole


def _passes(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def _points(recipe: Recipe) -> int:
    """Count the trained points: samples times noise levels."""
    algorithm = recipe.algorithm
    trained = recipe.groups_per_iteration * (algorithm.trained_per_group or recipe.group_size)
    if isinstance(algorithm, TrajectoryAlgorithm):
        return trained * len(algorithm.noisy_steps(recipe.rollout.steps, 0, recipe.seed))
    assert isinstance(algorithm, Algorithm)
    return trained * algorithm.timesteps.count * recipe.train.inner_epochs


def _policy_passes(recipe: Recipe) -> int:
    """Count the policy's passes at a point; a policy gradient trains through the guidance."""
    trajectory = isinstance(recipe.algorithm, TrajectoryAlgorithm)
    return _passes(recipe.rollout.guidance_scale) if trajectory else 1


def _forwards_at_a_point(recipe: Recipe, has_guidance: bool) -> int:
    algorithm, policy = recipe.algorithm, _policy_passes(recipe)
    if isinstance(algorithm, TrajectoryAlgorithm):
        return policy * (1 + len(algorithm.snapshots))
    assert isinstance(algorithm, Algorithm)
    kl = algorithm.kl_guidance
    extra = 0 if kl is None else _passes(kl if has_guidance else 1.0)
    return policy + _splits_groups(recipe) + len(algorithm.snapshots) + extra


def _shared(recipe: Recipe) -> int:
    """Count the passes that the old policy shares with the policy.

    They are those before the first optimiser step of an iteration. The last iteration is looked at,
    since by then the decay of the old policy has settled.
    """
    algorithm, train = recipe.algorithm, recipe.train
    if not isinstance(algorithm, Algorithm) or "old" not in algorithm.snapshots:
        return 0
    if not old_is_policy(algorithm, train.iterations - 1):
        return 0
    rounds = algorithm.timesteps.count if train.optimizer_step == "timestep" else 1
    return _points(recipe) // (rounds * train.inner_epochs)
