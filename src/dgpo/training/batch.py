"""What one iteration trains on, and how it is chosen among the pictures that were scored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.core.transfer import taken
from dgpo.distributed.assignment import Assignment
from dgpo.models.pipeline.probes import Step
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.recipe import Recipe
from dgpo.rewards import Scored
from dgpo.rewards.mixing import mix
from dgpo.training.asking import advantages_of


@dataclass(frozen=True)
class Batch:
    """What one iteration trains on: the groups that can teach.

    Args:
        x0: [B, ...] clean samples in the denoiser's input space, whole groups, group after group.
        prompts: conditioning, one row a GROUP, with the negative prompt if a loss wants guidance.
        levels: the rollout's own schedule.
        advantages: [B].
        groups: the group of each row.
        positions: [B], the position of each row among all pictures of the iteration.
        total: number of pictures of the iteration that would be trained if every group had spread;
            groups that a reward has failed do not count.
        lost: the groups that a reward has failed.
        spread: whether the rewards of any group differ, in all processes; else only what the loss
            reads beside advantages is trained.
        steps: the rollout's steps that a policy gradient trains on, rows as in ``x0``.
        by_process: the positions of the rows of every process, if there are several; ``groups``
            then counts the groups of all, and the rest is this process's.
        split: whether a group is spread over several processes.
        dummy: one row of this process, for passes that others make without it.
    """

    x0: Tensor
    prompts: Conditioning
    levels: list[Level]
    advantages: Tensor
    groups: Groups
    positions: Tensor
    total: int
    lost: tuple[int, ...] = ()
    spread: bool = True
    steps: Sequence[Step] = ()
    by_process: tuple[Tensor, ...] = ()
    split: bool = False
    dummy: Batch | None = None

    @property
    def share(self) -> float:
        """Rows of all processes over ``total``: groups that cannot teach are left out of every
        forward pass. The share keeps the loss the mean over all pictures, as if their terms were 0.
        """
        return self.count / self.total

    @property
    def all_positions(self) -> tuple[Tensor, ...]:
        """The positions of the rows of every process."""
        return self.by_process or (self.positions,)

    @property
    def count(self) -> int:
        """The number of rows of all processes."""
        return sum(map(len, self.all_positions))

    @property
    def largest_share(self) -> int:
        """The number of rows of the process that has the most."""
        return max(map(len, self.all_positions))

    @property
    def local_groups(self) -> Groups:
        """The groups of this process's rows, without the other processes: nothing is summed."""
        if not self.by_process:
            return self.groups
        local = Groups(self.groups.index, self.groups.size, self.groups.count)
        return local.subset(torch.arange(len(self.positions)))

    def conditioning(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""
        return self.prompts.rows(self.local_groups.index[rows])


class Built(NamedTuple):
    """What has become of all pictures of an iteration."""

    batch: Batch | None
    """What this process trains on; None if no group can teach."""
    figures: dict[str, float]
    """Columns of ``metrics.jsonl``."""
    advantages: Tensor
    """[N] of all pictures: 0 in a group without spread, NaN in a group that a reward has failed."""


def build_batch(
    recipe: Recipe, scored: Scored, made: Rollout, cond: Conditioning, assignment: Assignment
) -> Built:
    """Choose the groups that were scored and can teach: those with spread, and those without it if
    the algorithm trains them too. The same choice in every process.

    Args:
        recipe: its algorithm says what can teach, ``combine`` what several rewards amount to.
        scored: all N pictures, also those of other processes.
        made: the pictures of this process.
        cond: embeddings of the groups that this process has pictures of.
        assignment: which pictures are this process's.
    """
    algorithm = recipe.algorithm
    every = Groups.contiguous(assignment.count, assignment.size)
    for why in dict.fromkeys(scored.lost.values()) if assignment.processes.main else ():
        warnings.warn(f"a group is left out: {why}", stacklevel=3)
    found = torch.tensor([group not in scored.lost for group in range(every.count)])
    rows = every.each(found).nonzero()[:, 0]
    advantages = torch.full((every.count * every.size,), math.nan)
    figures = {"groups_dropped": 0.0, "groups_skipped": float(len(scored.lost))}
    if not len(rows):
        nothing = {"reward_mean": math.nan, "reward_std": math.nan, "spread": 0.0}
        return Built(None, {**nothing, **figures}, advantages)
    groups = every.subset(rows)
    by_name = {name: value[rows] for name, value in scored.by_name.items()}
    mixed = mix(by_name, scored.weights[rows], groups, recipe.combine)
    for name in mixed.rounded if assignment.processes.main else ():
        warnings.warn(
            f"reward {name!r}: within a group its numbers differ by no more than float32 rounds "
            "them, and its advantages are made of that: return what differs without what all "
            "have in common",
            stacklevel=3,
        )
    spread = groups.spread(mixed.merit)
    figures = {
        "reward_mean": float(mixed.total.double().mean()),
        "reward_std": float(mixed.total.double().std(unbiased=False)),
        "spread": float(groups.std(mixed.total).mean()),
        "groups_dropped": float((~spread).sum()),
        "groups_skipped": float(len(scored.lost)),
        **mixed.figures,
    }
    advantages[rows] = 0.0
    teach = spread | algorithm.trains_equal_groups
    if not bool(teach.any()):
        return Built(None, figures, advantages)
    own = advantages_of(algorithm, mixed.merit, groups)
    trained = groups.each(teach)
    advantages[rows] = torch.where(trained, own, 0).to(advantages)
    size = algorithm.trained_per_group or groups.size
    if size != groups.size:
        trained = trained & (own != 0)
    kept = trained.nonzero()[:, 0]
    chosen = _Chosen(
        positions=rows[kept],
        groups=replace(groups.subset(kept), size=size),
        advantages=own[kept],
        total=groups.count * size,
        lost=tuple(sorted(scored.lost)),
        spread=bool(spread.any()),
    )
    return Built(_batch(chosen, made, cond, assignment), figures, advantages)


class _Chosen(NamedTuple):
    """What is trained of all pictures: as in :class:`Batch`, for the rows of all processes."""

    positions: Tensor
    groups: Groups
    advantages: Tensor
    total: int
    lost: tuple[int, ...]
    spread: bool


def _batch(chosen: _Chosen, made: Rollout, cond: Conditioning, assignment: Assignment) -> Batch:
    """This process's part of what is trained."""
    processes, split = assignment.processes, assignment.splits(chosen.positions)
    here = torch.isin(chosen.positions, assignment.mine)
    mine = chosen.positions[here]
    # the sums over a group that several processes share go over all of them
    reduce = {"reduce": processes.sum} if split else {}
    batch = Batch(
        **_rows(made, cond, assignment, mine),
        levels=made.levels,
        advantages=chosen.advantages[here],
        groups=replace(chosen.groups, index=chosen.groups.index[here], **reduce),
        total=chosen.total,
        lost=chosen.lost,
        spread=chosen.spread,
    )
    if processes.single:
        return batch
    dummy = replace(
        batch,
        **_rows(made, cond, assignment, assignment.mine[:1]),
        advantages=chosen.advantages.new_zeros(1),
        groups=Groups.contiguous(1, 1),
    )
    by_process = assignment.divided(chosen.positions)
    return replace(batch, by_process=by_process, split=split, dummy=dummy)


def _rows(
    made: Rollout, cond: Conditioning, assignment: Assignment, positions: Tensor
) -> dict[str, Any]:
    """What this process has made at some of its positions, and the embeddings of their groups."""
    rows = assignment.find(positions)
    held = (positions // assignment.size).unique()
    return {
        "x0": taken(made.x0, rows),
        "prompts": cond.rows(torch.searchsorted(assignment.held, held)),
        "positions": positions,
        "steps": [
            replace(
                step,
                sample=taken(step.sample, rows),
                output=taken(step.output, rows),
                previous=taken(step.previous, rows),
            )
            for step in made.steps
        ],
    }
