"""How many pictures and passes of the denoiser a recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.recipe import Recipe


@dataclass(frozen=True)
class Counts:
    """Passes in samples, as ``metrics.jsonl`` counts them; of an iteration in which all groups have
    spread.

    Args:
        images: pictures of an iteration.
        rollout: forward passes that make them.
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


def count(recipe: Recipe, scheduler: Any, has_guidance: bool, held_out: int) -> Counts:
    """The counts of a recipe.

    Args:
        recipe: the run.
        scheduler: the sampler.
        has_guidance: whether the pipeline has classifier-free guidance.
        held_out: number of prompts that are evaluated.
    """
    images, rollout = recipe.images_per_iteration, recipe.rollout
    own = recipe.eval
    eval_guidance = rollout.guidance_scale if own.guidance_scale is None else own.guidance_scale
    eval_steps = calls_of(scheduler, own.steps or rollout.steps)
    sampled = images * calls_of(scheduler, rollout.steps) * _passes(rollout.guidance_scale)
    points = _points(recipe)
    return Counts(
        images=images,
        rollout=sampled,
        training=points * _forwards_at_a_point(recipe, has_guidance),
        backward=points * _policy_passes(recipe.algorithm, recipe),
        evaluation=held_out * eval_steps * _passes(eval_guidance),
        evaluations=_evaluations(recipe) if held_out else 0,
        iterations=recipe.train.iterations,
    )


def calls_of(scheduler: Any, steps: int) -> int:
    """Calls of the denoiser for one sample: samplers of second order call it twice a step."""
    return steps if getattr(scheduler, "order", 1) == 1 else 2 * steps - 1


def _passes(guidance: float) -> int:
    return 1 if guidance == 1 else 2


def _points(recipe: Recipe) -> int:
    """Samples times noise levels that are trained."""
    algorithm = recipe.algorithm
    trained = recipe.groups_per_iteration * (algorithm.trained_per_group or recipe.group_size)
    if isinstance(algorithm, TrajectoryAlgorithm):
        return trained * len(algorithm.noisy_steps(recipe.rollout.steps, 0, recipe.seed))
    assert isinstance(algorithm, Algorithm)
    return trained * algorithm.timesteps.count


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
    return int(recipe.eval.at_start) + between + 1
