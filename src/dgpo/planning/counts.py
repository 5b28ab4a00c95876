"""How many pictures and passes of the denoiser a recipe asks for."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.recipe import Recipe
from dgpo.training.forward_rounds import old_is_policy


@dataclass(frozen=True)
class Counts:
    """Passes in samples, as ``metrics.jsonl`` counts them; of an iteration in which all groups have
    spread.

    Args:
        images: pictures of an iteration.
        rollout: forward passes that make them; none where they were ranked before.
        training: forward passes of the update, those without gradients included.
        backward: backward passes.
        evaluation: forward passes of one evaluation.
        evaluations: in the whole run.
        iterations: of the whole run.
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
        """Of an iteration."""
        return self.rollout + self.training


@dataclass(frozen=True)
class Samplers:
    """What samples.

    Args:
        rollout: the scheduler of the rollouts.
        evaluation: that of evaluations.
        strength: the pipeline's ``strength``, of those that start from a picture with a part of the
            noise and take that part of the steps; else 1.
        has_guidance: whether the pipeline has classifier-free guidance.
    """

    rollout: Any
    evaluation: Any
    strength: float
    has_guidance: bool


def count(recipe: Recipe, samplers: Samplers, held_out: int) -> Counts:
    """The counts of a recipe.

    Args:
        recipe: the run.
        samplers: of its rollouts and evaluations.
        held_out: number of prompts that are evaluated.
    """
    images, rollout = recipe.images_per_iteration, recipe.rollout
    own = recipe.eval
    eval_guidance = rollout.guidance_scale if own.guidance_scale is None else own.guidance_scale
    eval_steps = calls_of(samplers.evaluation, own.steps or rollout.steps, samplers.strength)
    steps = calls_of(samplers.rollout, rollout.steps, samplers.strength)
    sampled = recipe.images_sampled * steps * _passes(rollout.guidance_scale)
    points = _points(recipe)
    return Counts(
        images=images,
        rollout=sampled,
        training=points * _forwards_at_a_point(recipe, samplers.has_guidance) - _shared(recipe),
        backward=points * _policy_passes(recipe.algorithm, recipe),
        evaluation=held_out * eval_steps * _passes(eval_guidance),
        evaluations=_evaluations(recipe) if held_out else 0,
        iterations=recipe.train.iterations,
    )


def calls_of(scheduler: Any, steps: int, strength: float = 1.0) -> int:
    """Calls of the denoiser for one sample, as the scheduler counts them: those of second order
    take two a step, PLMS one more in all."""
    tried = deepcopy(scheduler)
    shift = {"mu": 1.0} if getattr(tried.config, "use_dynamic_shifting", False) else {}
    tried.set_timesteps(steps, **shift)
    left_out = steps - min(int(steps * strength), steps)
    return len(tried.timesteps) - left_out * getattr(tried, "order", 1)


def _passes(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def _points(recipe: Recipe) -> int:
    """Samples times noise levels that are trained."""
    algorithm = recipe.algorithm
    trained = recipe.groups_per_iteration * (algorithm.trained_per_group or recipe.group_size)
    if isinstance(algorithm, TrajectoryAlgorithm):
        return trained * len(algorithm.noisy_steps(recipe.rollout.steps, 0, recipe.seed))
    assert isinstance(algorithm, Algorithm)
    return trained * algorithm.timesteps.count * recipe.train.inner_epochs


def _policy_passes(algorithm: BaseAlgorithm, recipe: Recipe) -> int:
    trajectory = isinstance(algorithm, TrajectoryAlgorithm)
    return _passes(recipe.rollout.guidance_scale) if trajectory else 1


def _forwards_at_a_point(recipe: Recipe, has_guidance: bool) -> int:
    algorithm = recipe.algorithm
    policy = _policy_passes(algorithm, recipe)
    if isinstance(algorithm, TrajectoryAlgorithm):
        return policy * (1 + len(algorithm.snapshots))
    assert isinstance(algorithm, Algorithm)
    kl = algorithm.kl_guidance
    extra = 0 if kl is None else _passes(kl if has_guidance else 1.0)
    return policy + splits_groups(recipe) + len(algorithm.snapshots) + extra


def _shared(recipe: Recipe) -> int:
    """Passes of the old policy that are those of the policy: before the first step of an iteration
    (the last one, for which the old policy has settled)."""
    algorithm, train = recipe.algorithm, recipe.train
    if not isinstance(algorithm, Algorithm) or "old" not in algorithm.snapshots:
        return 0
    if not old_is_policy(algorithm, train.iterations - 1):
        return 0
    rounds = algorithm.timesteps.count if train.optimizer_step == "timestep" else 1
    return _points(recipe) // (rounds * train.inner_epochs)


def splits_groups(recipe: Recipe) -> bool:
    """Whether a micro-batch is a part of a group whose weight needs all of it, so that the policy
    is asked once more without gradients."""
    algorithm, size = recipe.algorithm, recipe.train.micro_batch
    if not isinstance(algorithm, Algorithm) or type(algorithm).weights is Algorithm.weights:
        return False
    group = algorithm.trained_per_group or recipe.group_size
    whole = size is None or size >= group * recipe.groups_per_iteration or size % group == 0
    return not whole


def _evaluations(recipe: Recipe) -> int:
    every, last = recipe.eval.every, recipe.train.iterations
    between = (last - 1) // every if every else 0
    between += sum(at < last and not (every and at % every == 0) for at in set(recipe.eval.at))
    return int(recipe.eval.at_start) + between + 1
