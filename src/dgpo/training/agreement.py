"""What the processes of a run agree on before they spend compute, and where the model goes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dgpo.distributed.assignment import Assignment
from dgpo.distributed.processes import Processes
from dgpo.distributed.sharding import shard
from dgpo.errors import UserError
from dgpo.models.pipeline.arguments import parameters_of
from dgpo.models.pipeline.call_encoders import encodes_itself
from dgpo.prompts.caption import pictures_of
from dgpo.recipe import Recipe
from dgpo.rewards import RewardSet
from dgpo.training.fingerprints import Fingerprint


def join(
    recipe: Recipe,
    processes: Processes,
    rewards: RewardSet,
    fingerprints: Mapping[str, Fingerprint],
) -> None:
    """See that a run can be divided as its recipe says, and that all processes have the same.

    Collective.

    Args:
        recipe: the settings as they were given, since machines may have it in different places.
        processes: the processes of the run.
        rewards: what is learned.
        fingerprints: those of rows and files.

    Raises:
        UserError: it cannot, or they have not.
    """
    if processes.single:
        return
    if processes.watch is not None:
        processes.watch.hang_seconds = 60 * recipe.guards.hang_minutes or None
    parts = getattr(recipe.algorithm, "updates", 1)
    groups = recipe.groups_per_iteration
    share = Assignment.of(groups, recipe.group_size, parts, processes)
    if people := rewards.names_with("asks_people"):
        raise UserError(
            f"rewards: {', '.join(people)} asks people on a page of one process: use one"
        )
    together = rewards.names_with("group_wise")
    if together and share.splits(torch.arange(groups * recipe.group_size)):
        raise UserError(
            f"rewards: {', '.join(together)} compares the pictures of a group, and groups are "
            f"split between {processes.size} processes: let groups_per_iteration = {groups} be a "
            f"multiple of {processes.size * parts}, or start fewer processes"
        )
    facts = {"recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest()}
    for key, one in fingerprints.items():
        what = "file of a reward" if one["rows"] is None else "set of prompts"
        facts[f"{what} ({key})"] = one["sha256"]
    processes.refuse_difference(facts)


def place(
    pipe: Any,
    denoisers: Mapping[str, nn.Module],
    recipe: Recipe,
    processes: Processes,
    moves: bool,
    texts: Iterable[str] = (),
) -> None:
    """Put a pipeline where this process computes, its denoisers sharded if the recipe wants it.

    Args:
        pipe: the pipeline.
        denoisers: the pipeline's denoisers.
        recipe: ``lora`` and the settings of ``train`` about sharding are read.
        moves: whether it goes to this process's device; else it stays where it is.
        texts: the texts of all prompt rows.

    Raises:
        UserError: such a pipeline cannot be sharded, or not by so many processes.
    """
    if recipe.train.sharding == "none":
        if moves:
            pipe.to(processes.device)
        return
    refuse_unshardable(recipe, pipe, texts)
    device = processes.device
    for name, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        if name not in denoisers:
            if moves:
                module.to(device)
        elif not moves:
            device = next(module.parameters()).device
    for denoiser in denoisers.values():
        denoiser.requires_grad_(recipe.lora is None)  # the sharding remembers which have gradients
    shard(denoisers, processes, device, recipe.train)


def refuse_unshardable(recipe: Recipe, pipe: Any, texts: Iterable[str]) -> None:
    """See that a denoiser in pieces can be given these prompts by this pipeline.

    Args:
        recipe: ``train.sharding`` is read.
        pipe: the pipeline, with or without weights.
        texts: the texts of all prompt rows.

    Raises:
        UserError: processes would make different numbers of passes.
    """
    if recipe.train.sharding == "none":
        return
    name = type(pipe).__name__
    if encodes_itself(pipe):
        raise UserError(
            f"train.sharding = 'fsdp2': {name} is given one text a call, so processes with other "
            "texts make other numbers of passes, and with sharded weights all must make the same; "
            "use train.sharding = none"
        )
    if "image" in parameters_of(pipe) and any(map(pictures_of, texts)):
        raise UserError(
            f"train.sharding = 'fsdp2': {name} makes as many passes as prompts have pictures, and "
            "with sharded weights all processes must make the same; use train.sharding = none"
        )
