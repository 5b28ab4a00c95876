"""Settings of a recipe that contradict each other, or that name what does not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dgpo.algorithms.base import Algorithm, TrajectoryAlgorithm
from dgpo.registry import known, unknown
from dgpo.reserved import RESERVED, refusal
from dgpo.rewards.settings import used
from dgpo.secrets import secrets_in

if TYPE_CHECKING:
    from dgpo.recipe import Recipe


def contradictions(recipe: Recipe) -> list[str]:
    """Find what makes a recipe impossible although each of its settings is in range.

    Returns:
        One line for each problem, with the keys, the values and what would work.
    """
    algorithm = recipe.algorithm
    checks = [_secrets, _unknown_rewards]
    if isinstance(algorithm, Algorithm):
        checks += [_timesteps, _stochastic]
    if isinstance(algorithm, TrajectoryAlgorithm):
        checks += [_trajectory]
    checks += [_offline, _remote, _inexact, _call, _groups, _weights]
    return [line for check in checks for line in check(recipe)]


def _secrets(recipe: Recipe) -> Iterator[str]:
    """Find secrets, which the run's folder would show. The options of rewards are checked when they
    are read."""
    for place in secrets_in(recipe.model_dump(exclude={"rewards", "run"})):
        yield (
            f"{place} holds a secret, and recipes are written into the run's folder: put it into a "
            "file or into an environment variable"
        )


def _unknown_rewards(recipe: Recipe) -> Iterator[str]:
    named = [("rewards", n) for n, r in recipe.rewards.items() if not used(r)]
    named += [(f"rewards.{n}.use", used(r)) for n, r in recipe.rewards.items() if used(r)]
    named += [("eval.metrics", n) for n in recipe.eval.metrics]
    for key, name in named:
        if not known("reward", name):
            yield f"{key}: {unknown('reward', name)}"


def _timesteps(recipe: Recipe) -> Iterator[str]:
    assert isinstance(recipe.algorithm, Algorithm)
    choice, levels = recipe.algorithm.timesteps, recipe.rollout.steps
    if choice.indices is not None and choice.indices[1] >= levels:
        yield (
            f"algorithm.timesteps.indices = {list(choice.indices)}: rollout.steps = {levels} has "
            f"only the levels 0 to {levels - 1}; lower the last index or raise rollout.steps"
        )
    if choice.indices is None and choice.count > levels:
        yield (
            f"algorithm.timesteps.count = {choice.count}: rollout.steps = {levels} has only "
            f"{levels} levels; lower the count or raise rollout.steps"
        )


def _stochastic(recipe: Recipe) -> Iterator[str]:
    """Check rollouts with noise beside an algorithm that trains on noised samples."""
    rollout = recipe.rollout
    if rollout.sde is not None and rollout.scheduler is not None:
        yield (
            f"rollout.sde: it samples instead of rollout.scheduler = {rollout.scheduler!r}; use "
            "null for one of them"
        )
    elif rollout.sde is not None and rollout.steps < 2:
        yield "rollout.sde: the last step adds no noise; rollout.steps = 1 leaves none"


def _trajectory(recipe: Recipe) -> Iterator[str]:
    """Check what a policy gradient on the steps of its rollouts needs."""
    algorithm, rollout, train = recipe.algorithm, recipe.rollout, recipe.train
    assert isinstance(algorithm, TrajectoryAlgorithm)
    name, groups = algorithm.name, recipe.groups_per_iteration
    if rollout.sde is not None:
        yield f"rollout.sde: {name} samples by algorithm.sde; use null"
    plain = "ddim" if algorithm.sde.kind == "ddim" else "euler"
    if rollout.scheduler not in (None, plain):
        yield (
            f"rollout.scheduler = {rollout.scheduler!r}: {name} samples by algorithm.sde; use "
            f"null, or {plain}, which then samples evaluations alone"
        )
    own_steps = f"{name} learns from the policy's own steps"
    if rollout.switch_to_old_after is not None:
        yield (
            f"rollout.switch_to_old_after = {rollout.switch_to_old_after}: {own_steps}; use null"
        )
    if rollout.ahead:
        yield f"rollout.ahead = {rollout.ahead}: {own_steps}; use 0"
    if train.optimizer_step != "iteration":
        yield (
            f"train.optimizer_step = {train.optimizer_step!r}: {name} trains all steps of a "
            "picture together; use iteration, and algorithm.updates for more optimiser steps"
        )
    if train.inner_epochs != 1:
        yield (
            f"train.inner_epochs = {train.inner_epochs}: {name} takes more optimiser steps by "
            "algorithm.updates; use 1"
        )
    if groups % algorithm.updates:
        yield (
            f"algorithm.updates = {algorithm.updates}: groups_per_iteration = {groups} cannot be "
            "split into so many equal parts; use a divisor of it"
        )
    if rollout.steps < 2:
        yield "rollout.steps = 1: the last step is never trained; use 2 or more"
    elif algorithm.window is not None and (problem := algorithm.window.problem(rollout.steps)):
        yield problem


def _offline(recipe: Recipe) -> Iterator[str]:
    """Check for settings that mean nothing where the run trains on a folder of groups."""
    data, algorithm = recipe.data, recipe.algorithm
    if data.preferences is None:
        if data.pick != "all":
            yield f"data.pick = {data.pick!r}: there is no data.preferences"
        return
    where = f"data.preferences = {data.preferences!r}: "
    if not isinstance(algorithm, Algorithm):
        yield f"{where}{algorithm.name} learns from the steps of its own rollouts; use dgpo"
    unused = dict.fromkeys(("switch_to_old_after", "sde", "engine", "accelerate"))
    unused = {**unused, "ahead": 0}
    for key, default in unused.items():
        if getattr(recipe.rollout, key) != default:
            yield f"{where}nothing is sampled, so rollout.{key} means nothing; leave it out"


def _remote(recipe: Recipe) -> Iterator[str]:
    """Check for what an engine in another process cannot do."""
    rollout, where = recipe.rollout, f"rollout.engine = {', '.join(recipe.rollout.engine or ())}: "
    if rollout.engine is None:
        return
    foreign = [url for url in rollout.engine if not url.startswith("http")]
    if foreign and rollout.scheduler is not None:
        yield (f"{where}{foreign[0]} samples with its own sampler; set rollout.scheduler to null")
    if isinstance(recipe.algorithm, TrajectoryAlgorithm):
        yield (
            f"{where}{recipe.algorithm.name} needs the steps of each sample, which the engine does "
            "not keep"
        )
    if rollout.sde is not None:
        yield f"{where}rollout.sde samples in the run itself; use null for one of them"
    if recipe.lora is None:
        yield f"{where}what travels is a LoRA, and lora: null trains none"
    if recipe.memory.vae_precision is not None:
        yield (
            f"{where}the engine decodes with its own autoencoder; memory.vae_precision = "
            f"{recipe.memory.vae_precision!r} does not reach it, use null"
        )


def _inexact(recipe: Recipe) -> Iterator[str]:
    """Check faster, inexact rollouts."""
    rollout, own = recipe.rollout, recipe.rollout.accelerate
    if own is None:
        return
    key = "rollout.accelerate"
    if isinstance(recipe.algorithm, TrajectoryAlgorithm):
        yield (
            f"{key}: {recipe.algorithm.name} compares likelihoods of the steps of its rollouts, "
            "and inexact rollouts do not come from the policy whose likelihood it computes; use "
            "null, or an algorithm that needs none, such as dgpo"
        )
    if not (own.steps or own.cache or own.precision or own.compile):
        yield f"{key}: it changes nothing; give steps, cache, precision or compile, or use null"
    if own.steps is not None and own.steps >= rollout.steps:
        yield (
            f"{key}.steps = {own.steps}: exact rollouts have rollout.steps = {rollout.steps}; use "
            "fewer, or null"
        )
    if own.cache_options and own.cache is None:
        yield f"{key}.cache_options: there is no cache; give {key}.cache, or leave them out"
    if own.compile and (own.cache is not None or own.precision in ("int8", "fp8")):
        yield f"{key}.compile = true: not with a cache, int8 or fp8; use one of them"
    others = {
        "rollout.engine": (rollout.engine, None),
        "rollout.sde": (rollout.sde, None),
        "train.sharding": (recipe.train.sharding, "none"),
    }
    if own.precision is not None:
        others["memory.quantization"] = (recipe.memory.quantization, None)
    if own.compile or own.cache or own.precision:
        others["compute.compile"] = (recipe.compute.compile, "off")
    for other, (value, without) in others.items():
        if value != without:
            plain = "null" if without is None else without
            yield f"{other} = {value!r:.80}: not possible with {key}; use {plain}, or {key}: null"


def _call(recipe: Recipe) -> Iterator[str]:
    """Check the pipeline's arguments; guidance_scale is an input of some denoisers."""
    reserved = RESERVED.keys() - {"guidance_scale"}
    yield from (refusal(key) for key in recipe.rollout.call if key in reserved)


def _groups(recipe: Recipe) -> Iterator[str]:
    """Check what is sampled, scored and compared in an iteration."""
    if recipe.combine == "gdpo" and getattr(recipe.algorithm, "advantage_std", "") == "group":
        yield (
            "combine = 'gdpo': it divides by the deviation of the whole batch, and dividing each "
            "group by its own would undo that; set algorithm.advantage_std to batch"
        )
    trained = recipe.algorithm.trained_per_group
    if trained is not None and trained > recipe.group_size:
        yield (
            f"group_size = {recipe.group_size}: the algorithm trains {trained} images of each "
            "group; raise group_size or lower that setting of the algorithm"
        )


def _weights(recipe: Recipe) -> Iterator[str]:
    """Check how weights are held, sharded and trained."""
    train, memory = recipe.train, recipe.memory
    if memory.quantization is not None and recipe.lora is None:
        yield (
            f"memory.quantization = {memory.quantization!r}: lora: null trains all weights, and "
            "rounded weights cannot be trained; use a LoRA, or null"
        )
    if train.sharding != "none":
        for name in ("quantization", "snapshot_device"):
            if (value := getattr(memory, name)) is not None:
                yield (
                    f"memory.{name} = {value!r}: not possible with train.sharding = "
                    f"{train.sharding!r}; use null, or train.sharding: none"
                )
        if recipe.compute.compile != "off":
            yield (
                f"compute.compile = {recipe.compute.compile!r}: not possible with train.sharding = "
                f"{train.sharding!r}; use off, or train.sharding: none"
            )
    if train.sum_gradients != "step" and (train.sharding == "none" or recipe.lora is not None):
        yield (
            f"train.sum_gradients = {train.sum_gradients!r}: only sharded weights that are trained "
            "leave a choice (train.sharding: fsdp2 with lora: null); use step"
        )
    for name, default in {
        "sharding_size": None,
        "sharding_offload": False,
        "reshard": True,
    }.items():
        if train.sharding == "none" and (value := getattr(train, name)) != default:
            yield (
                f"train.{name} = {json.dumps(value)}: nothing is sharded; leave it out, or use "
                "train.sharding: fsdp2"
            )
    if train.sharding_offload and recipe.lora is not None:
        yield (
            "train.sharding_offload = true: a LoRA is made where its base lies, and would compute "
            "on the CPU; use false, or lora: null"
        )
    if not train.reshard and recipe.lora is None:
        yield (
            "train.reshard = false: lora: null trains all weights, and what was gathered is not "
            "theirs after a step or under an average; use true, or a LoRA"
        )
    if train.warmup >= recipe.optimizer_steps:
        yield (
            f"train.warmup = {train.warmup}: the run has only {recipe.optimizer_steps} optimiser "
            "steps; lower it or raise train.iterations"
        )
