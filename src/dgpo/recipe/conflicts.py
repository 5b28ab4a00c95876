"""Settings of a recipe that contradict each other, or name what is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgpo.algorithms.base import Algorithm, TrajectoryAlgorithm
from dgpo.registry import known, unknown
from dgpo.rewards.settings import used
from dgpo.secrets import secrets_in

if TYPE_CHECKING:
    from dgpo.recipe import Recipe

_OWNED_CALL_KEYS = {
    "true_cfg_scale": "rollout.guidance_scale",
    "num_inference_steps": "rollout.steps",
    "sigmas": "rollout.steps",
    "timesteps": "rollout.steps",
    "prompt": "prompts.train",
    "prompt_embeds": "prompts.train",
    "num_images_per_prompt": "group_size",
    "generator": "seed",
    "latents": "seed",
}


def contradictions(recipe: Recipe) -> list[str]:
    """What makes a recipe impossible whose settings are in range each: one line for each problem,
    with the keys, the values and what would work."""
    return [
        *_secrets(recipe),
        *_unknown_rewards(recipe),
        *_timesteps(recipe),
        *_trajectory(recipe),
        *_stochastic(recipe),
        *_offline(recipe),
        *_remote(recipe),
        *_between_sections(recipe),
    ]


def _secrets(recipe: Recipe) -> list[str]:
    """What would be written into the run's folder; options of rewards are looked at as they are
    read."""
    data = recipe.model_dump(exclude={"rewards", "run"})
    return [
        f"{place} holds a secret, and recipes are written into the run's folder: put it into a "
        "file or into an environment variable"
        for place in secrets_in(data)
    ]


def _unknown_rewards(recipe: Recipe) -> list[str]:
    named = [("rewards", n) for n, r in recipe.rewards.items() if not used(r)]
    named += [(f"rewards.{n}.use", used(r)) for n, r in recipe.rewards.items() if used(r)]
    named += [("eval.metrics", n) for n in recipe.eval.metrics]
    return [f"{key}: {unknown('reward', n)}" for key, n in named if not known("reward", n)]


def _timesteps(recipe: Recipe) -> list[str]:
    if not isinstance(recipe.algorithm, Algorithm):
        return []
    choice, levels = recipe.algorithm.timesteps, recipe.rollout.steps
    if choice.indices is not None and choice.indices[1] >= levels:
        return [
            f"algorithm.timesteps.indices = {list(choice.indices)}: rollout.steps = {levels} "
            f"has levels 0 to {levels - 1} only; lower the last index or raise rollout.steps"
        ]
    if choice.indices is None and choice.count > levels:
        return [
            f"algorithm.timesteps.count = {choice.count}: rollout.steps = {levels} has no more "
            f"than {levels} levels; lower the count or raise rollout.steps"
        ]
    return []


def _trajectory(recipe: Recipe) -> list[str]:
    """What a policy gradient on the steps of the rollout needs."""
    algorithm, rollout, groups = recipe.algorithm, recipe.rollout, recipe.groups_per_iteration
    if not isinstance(algorithm, TrajectoryAlgorithm):
        return []
    lines, name = [], algorithm.name
    if rollout.sde is not None:
        lines.append(f"rollout.sde: the sampler of {name} is algorithm.sde; use null")
    plain = "ddim" if algorithm.sde.kind == "ddim" else "euler"
    if rollout.scheduler not in (None, plain):
        lines.append(
            f"rollout.scheduler = {rollout.scheduler!r}: the sampler of {name} is "
            f"algorithm.sde; use null or {plain}, for evaluations alone"
        )
    if rollout.switch_to_old_after is not None:
        lines.append(
            f"rollout.switch_to_old_after = {rollout.switch_to_old_after}: {name} learns from "
            "the policy's own steps; use null"
        )
    if rollout.ahead:
        lines.append(
            f"rollout.ahead = {rollout.ahead}: {name} learns from the policy's own steps; use 0"
        )
    if recipe.train.optimizer_step != "iteration":
        lines.append(
            f"train.optimizer_step = {recipe.train.optimizer_step!r}: {name} trains all steps of "
            "a picture together; use iteration, and algorithm.updates for more steps"
        )
    if recipe.train.inner_epochs != 1:
        lines.append(
            f"train.inner_epochs = {recipe.train.inner_epochs}: {name} takes its further steps by "
            "algorithm.updates; use 1"
        )
    if groups % algorithm.updates:
        lines.append(
            f"algorithm.updates = {algorithm.updates}: groups_per_iteration = {groups} cannot "
            "be split into so many equal parts; let it divide the groups"
        )
    if rollout.steps < 2:
        lines.append("rollout.steps = 1: the last step is never trained; use 2 or more")
    elif algorithm.window is not None and (problem := algorithm.window.problem(rollout.steps)):
        lines.append(problem)
    return lines


def _stochastic(recipe: Recipe) -> list[str]:
    """What rollouts with noise need, beside an algorithm on noised samples."""
    rollout = recipe.rollout
    if rollout.sde is None or not isinstance(recipe.algorithm, Algorithm):
        return []
    if rollout.scheduler is not None:
        return [
            f"rollout.sde: it samples instead of rollout.scheduler = {rollout.scheduler!r}; "
            "use null for one of them"
        ]
    return ["rollout.sde: the last step adds no noise; rollout.steps = 1 leaves none"] * (
        rollout.steps < 2
    )


def _offline(recipe: Recipe) -> list[str]:
    """What training on a folder of groups leaves without a meaning."""
    data, rollout, name = recipe.data, recipe.rollout, recipe.algorithm.name
    if data.preferences is None:
        wrong = data.pick != "all"
        return [f"data.pick = {data.pick!r}: there is no data.preferences"] * wrong
    where = f"data.preferences = {data.preferences!r}: "
    lines = []
    if not isinstance(recipe.algorithm, Algorithm):
        lines.append(f"{where}{name} learns from the steps of its own rollouts; use dgpo")
    unused = {"switch_to_old_after": None, "sde": None, "ahead": 0, "engine": None}
    lines += [
        f"{where}nothing is sampled, so rollout.{key} means nothing; leave it out"
        for key, default in unused.items()
        if getattr(rollout, key) != default
    ]
    return lines


def _remote(recipe: Recipe) -> list[str]:
    """What an engine in another process cannot do."""
    rollout, where = recipe.rollout, f"rollout.engine = {recipe.rollout.engine!r}: "
    if rollout.engine is None:
        return []
    lines = []
    if isinstance(recipe.algorithm, TrajectoryAlgorithm):
        lines.append(f"{where}{recipe.algorithm.name} needs the steps, which it does not keep")
    if rollout.sde is not None:
        lines.append(f"{where}rollout.sde samples in the run itself; use null for one of them")
    if recipe.lora is None:
        lines.append(f"{where}what travels is a LoRA, and lora: null trains none")
    if recipe.memory.vae_precision is not None:
        lines.append(
            f"{where}the engine decodes with its own autoencoder; memory.vae_precision = "
            f"{recipe.memory.vae_precision!r} does not reach it, use null"
        )
    return lines


def _between_sections(recipe: Recipe) -> list[str]:
    """Settings of different sections that exclude each other."""
    lines = [
        f"rollout.call.{key}: the run sets it itself; use {_OWNED_CALL_KEYS[key]}"
        for key in recipe.rollout.call
        if key in _OWNED_CALL_KEYS
    ]
    if recipe.rollout.ahead and recipe.rollout.overlap_rewards:
        lines.append(
            f"rollout.ahead = {recipe.rollout.ahead}: rewards are asked when their iteration is "
            "due; set rollout.overlap_rewards to null or false"
        )
    if recipe.combine == "gdpo" and getattr(recipe.algorithm, "advantage_std", "") == "group":
        lines.append(
            "combine = 'gdpo': it ends with one deviation for the whole batch, and that of "
            "each group would undo it; set algorithm.advantage_std to batch"
        )
    trained = recipe.algorithm.trained_per_group
    if trained is not None and trained > recipe.group_size:
        lines.append(
            f"group_size = {recipe.group_size}: the algorithm trains {trained} images of each "
            "group; raise group_size or lower that setting of the algorithm"
        )
    if recipe.memory.quantization is not None and recipe.lora is None:
        lines.append(
            f"memory.quantization = {recipe.memory.quantization!r}: lora: null trains all "
            "weights, and rounded ones cannot be; use a LoRA, or null"
        )
    train = recipe.train
    if train.sharding != "none":
        lines += [
            f"memory.{name} = {value!r}: not possible with train.sharding = {train.sharding!r}; "
            "use null, or train.sharding: none"
            for name in ("quantization", "snapshot_device")
            if (value := getattr(recipe.memory, name)) is not None
        ]
    if train.sum_gradients != "step" and (train.sharding == "none" or recipe.lora is not None):
        lines.append(
            f"train.sum_gradients = {train.sum_gradients!r}: only weights that are sharded and "
            "trained leave a choice (train.sharding: fsdp2 with lora: null); use step"
        )
    steps = recipe.train.iterations * recipe.updates_per_iteration
    if recipe.train.warmup >= steps:
        lines.append(
            f"train.warmup = {recipe.train.warmup}: the run has only {steps} optimiser steps; "
            "lower it or raise train.iterations"
        )
    return lines
