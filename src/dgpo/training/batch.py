"""What one iteration trains on, and how it is chosen among the pictures that were scored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo.algorithms.base import BaseAlgorithm
from dgpo.core.groups import Groups
from dgpo.core.process import Level
from dgpo.distributed.assignment import Assignment
from dgpo.models.pipeline.probes import Step
from dgpo.models.pipeline.prompt_encoder import Conditioning
from dgpo.models.pipeline.rollout import Rollout
from dgpo.rewards import Scored
from dgpo.rewards.mixing import Combine, mix


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
        lost: the groups that a reward has failed.
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
    lost: tuple[int, ...] = ()
    steps: Sequence[Step] = ()
    shares: tuple[Tensor, ...] = ()
    split: bool = False
    spare: Batch | None = None

    @property
    def share(self) -> float:
        """Rows of all processes over ``total``: groups without spread are left out of every forward
        pass, and the share keeps the loss the mean over all pictures, as if their terms were 0."""
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


def build_batch(
    scored: Scored,
    made: Rollout,
    cond: Conditioning,
    every: Groups,
    algorithm: BaseAlgorithm,
    combine: Combine,
    share: Assignment | None = None,
) -> tuple[Batch | None, dict[str, float]]:
    """The groups that were scored and have spread, and the figures of all that were scored.

    Args:
        scored: all pictures, those of other processes included.
        made: the pictures of this process.
        cond: of the groups that this process has pictures of.
        every: the groups of all pictures.
        share: which of them are here; None for all.
    """
    share = share or Assignment.of(every.count, every.size, 1)
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
    return replace(batch, lost=tuple(sorted(scored.lost))), figures


def _batch(
    places: Tensor,
    groups: Groups,
    advantages: Tensor,
    total: int,
    made: Rollout,
    cond: Conditioning,
    share: Assignment,
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
    if processes.single:
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


def _rows(step: Step, rows: Tensor) -> Step:
    """Some rows of a step."""
    return replace(
        step,
        sample=step.sample[rows],
        output=step.output[rows],
        previous=step.previous[rows],
    )
