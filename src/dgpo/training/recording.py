"""Groups of a model's own pictures, scored by rewards and written down for offline training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgpo.core.groups import Groups
from dgpo.models.pipeline.adapter import PipelineModel
from dgpo.preferences import GroupWriter, refuse_existing_groups
from dgpo.prompts import Prompt, PromptSampler, load_prompts, refuse_sizes
from dgpo.recipe import Recipe
from dgpo.rewards import Scored, load_rewards
from dgpo.rewards.mixing import mix
from dgpo.training.collector import Collector


class _AsItIs:
    """What samples in a rollout: the model with the weights that it has."""

    sharded = False

    def __init__(self, model: PipelineModel) -> None:
        self.model = model
        for module in model.pipe.components.values():
            if isinstance(module, nn.Module):
                # as a policy has them: torch rounds a product otherwise if weights want gradients
                module.requires_grad_(False).eval()

    @contextmanager
    def rolling(self, weights: str = "policy") -> Iterator[None]:
        yield


def record(
    recipe: Recipe,
    pipe: Any,
    folder: str | Path,
    count: int,
    say: Callable[[str], object] = print,
) -> int:
    """Sample groups as an online run of the recipe would in its first iterations, and write them.

    Several rewards are written by name as ``raters``, and combined as the recipe says as
    ``rewards``. A group that a reward has failed, and may skip, is left out.

    Args:
        recipe: prompts, rewards, ``rollout``, ``group_size`` and ``seed`` are read.
        pipe: the pipeline, with the weights that shall sample; its modules are frozen.
        folder: new, or without ``groups.jsonl``.
        count: how many groups are sampled.
        say: told how far it is.

    Returns:
        how many groups were written.

    Raises:
        UserError: the folder holds groups already, or a reward's answer is unusable; what was
            written until then is whole.
    """
    refuse_existing_groups(folder)
    prompts, rewards = load_prompts(recipe.prompts.train), load_rewards(recipe.rewards)
    rewards.check(prompts)
    refuse_sizes(prompts, recipe.rollout.call)
    model = _AsItIs(PipelineModel(pipe, call=recipe.rollout.call))
    per_round = min(recipe.groups_per_iteration, count)
    sampler = PromptSampler(prompts, per_round, recipe.seed)

    def rows_of(iteration: int) -> Sequence[Prompt]:
        return sampler.at(iteration)[: count - iteration * per_round]

    collector = Collector(recipe, model, rewards, rows_of)
    writer, written = GroupWriter(folder), 0
    for start in range(0, count, per_round):
        iteration = start // per_round
        rows, made = rows_of(iteration), collector.sample(iteration)
        with made.asked.scoring as scoring:
            scored = scoring.finish()
        total = _combined(scored, len(rows), recipe)
        for number, row in enumerate(rows):
            if number not in scored.lost:
                part = slice(number * recipe.group_size, (number + 1) * recipe.group_size)
                _write(writer, row, (made.rollout.images or [])[part], scored, total, part)
                written += 1
        mean = float(total.nanmean())
        say(f"{start + len(rows)} of {count} groups, mean reward {mean:.4f}")
    return written


def _combined(scored: Scored, count: int, recipe: Recipe) -> Tensor:
    """What an algorithm would rank the pictures by, [B]; NaN in a group that was lost."""
    every = Groups.contiguous(count, recipe.group_size)
    found = torch.tensor([group not in scored.lost for group in range(count)])
    kept = every.each(found).nonzero()[:, 0]
    total = torch.full((count * recipe.group_size,), torch.nan)
    if len(kept):
        by_name = {name: values[kept] for name, values in scored.by_name.items()}
        mixed = mix(by_name, scored.weights[kept], every.subset(kept), recipe.combine)
        total[kept] = mixed.merit
    return total


def _write(
    writer: GroupWriter, row: Prompt, images: list[Any], scored: Scored, total: Tensor, part: slice
) -> None:
    asked = {name: values[part] for name, values in scored.by_name.items()}
    raters = {name: v.tolist() for name, v in asked.items() if not bool(v.isnan().any())}
    writer.add(
        row.text,
        images,
        total[part].tolist(),
        raters=raters if len(scored.by_name) > 1 else None,
        metadata=row.metadata,
    )
