"""Training on the steps of the rollouts: predictions where they began, and the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dgpo.algorithms.base import TrajectoryAlgorithm
from dgpo.core.points import Trajectory
from dgpo.core.transfer import sent, taken
from dgpo.distributed.lockstep import pieces, turns
from dgpo.errors import UserError
from dgpo.models.pipeline.probes import Step
from dgpo.models.pipeline.self_check import is_narrow
from dgpo.models.policy import Policy
from dgpo.recipe import Recipe
from dgpo.training.asking import loss_of
from dgpo.training.batch import Batch
from dgpo.training.rounds import MicroLoss, Round, idle

RATIO_TOLERANCE = 1e-5
"""Largest ``|ratio - 1|`` before the first optimiser step on a rollout, for weights in float32. The
same weights at the same points differ by rounding alone (another batch size may take another
kernel); a tenth of the narrowest published clip range."""
RATIO_TOLERANCE_HALF = 2e-3
"""The same for weights in half precision, whose rounding is 1e-3 to 8e-3 of each output."""


class TrajectoryRounds:
    """The rounds of a policy gradient: ``algorithm.updates`` for an iteration, each over all
    trained steps of its own part of the groups.

    Args:
        policy: makes the predictions.
        recipe: its algorithm, a :class:`TrajectoryAlgorithm`, and its sizes.
    """

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        assert isinstance(recipe.algorithm, TrajectoryAlgorithm)
        self.policy, self.algorithm, self.recipe = policy, recipe.algorithm, recipe
        self.tolerance = RATIO_TOLERANCE_HALF if is_narrow(policy.model) else RATIO_TOLERANCE

    def __call__(self, batch: Batch, iteration: int) -> Iterator[Round]:
        """Part after part of the iteration's groups; one of which no group is left is skipped.

        Raises:
            UserError: before the first optimiser step the policy is not that of the rollouts.
        """
        updates, groups = self.algorithm.updates, self.recipe.groups_per_iteration

        def part_of(positions: Tensor) -> Tensor:
            return (positions // self.recipe.group_size) * updates // groups

        fresh, mine = True, part_of(batch.positions)
        everywhere = [part_of(positions) for positions in batch.all_positions]
        for part in range(updates):
            rows = (mine == part).nonzero()[:, 0]
            counts = [parts.tolist().count(part) for parts in everywhere]
            if any(counts):
                scored = groups // updates - sum(n * updates // groups == part for n in batch.lost)
                whole = batch.total // (groups - len(batch.lost)) * scored
                yield self._losses(batch, rows, counts, whole, iteration, fresh)
                fresh = False

    def _losses(
        self,
        batch: Batch,
        rows: Tensor,
        counts: list[int],
        whole: int,
        iteration: int,
        fresh: bool,
    ) -> Round:
        """The losses of a part.

        Args:
            rows: this process's.
            counts: how many rows each process has.
            whole: how many all of them would have if every group had spread.
            fresh: whether no optimiser step of this iteration has been taken.
        """
        share = sum(counts) / whole
        size = self.recipe.rows_at_once(batch.x0.device.type)
        parts = pieces(rows, size, max(counts))
        passes = list(itertools.product(range(len(batch.steps)), turns(parts, self.policy.sharded)))
        off: list[tuple[float, Tensor, Tensor]] = []
        for number, (place, turn) in enumerate(passes, start=1):
            last = number == len(passes)
            if turn.counts:
                points = self._points(batch, batch.steps[place], turn.rows)
                if fresh:
                    off.append(_off(points))
                part = len(turn.rows) / sum(counts)
                weight = part * share / len(batch.steps)
                yield MicroLoss(*loss_of(self.algorithm, points), part, weight, last)
            elif turn.dummy:
                assert batch.dummy is not None
                yield idle(self._points(batch.dummy, batch.dummy.steps[place], turn.rows), last)
            else:
                yield idle(None, last)
        self._refuse_other_policy(off, iteration)  # before the optimiser step

    def _points(self, batch: Batch, step: Step, rows: Tensor) -> Trajectory:
        """Some rows of one step, and the predictions that the algorithm declares there."""
        xt, cond = taken(step.sample, rows), batch.conditioning(rows)
        guidance = self.recipe.rollout.guidance_scale
        ref = None
        if "ref" in self.algorithm.snapshots:
            ref = self.policy.predict(xt, step.level, cond, "ref", guidance)
        return Trajectory(
            xt=xt,
            xnext=taken(step.previous, rows),
            level=step.level,
            next_level=batch.levels[step.index + 1],
            process=self.policy.model.process,
            sde=self.algorithm.sde,
            pred=self.policy.predict(xt, step.level, cond, guidance_scale=guidance),
            old=taken(step.output, rows),
            ref=ref,
            advantages=sent(batch.advantages[rows], xt),
            groups=batch.local_groups.subset(rows),
        )

    def _refuse_other_policy(
        self, off: Sequence[tuple[float, Tensor, Tensor]], iteration: int
    ) -> None:
        """See that the policy is that of the rollouts: ``off`` is what :func:`_off` found.

        Raises:
            UserError: it is another.
        """
        if not off or float(torch.stack([ratio for _, ratio, _ in off]).max()) <= self.tolerance:
            return
        for sigma, ratio, apart in off:
            if ratio <= self.tolerance:
                continue
            raise UserError(
                f"iteration {iteration + 1}: before the first update the ratio must be 1, but at "
                f"sigma {sigma:.4f} it is off by {ratio:.1e} (allowed {self.tolerance:.0e}): "
                "predictions at the rollout's own points differ from those it was made with by up "
                f"to {apart:.1e}, so the ratio would not measure the update. Something makes the "
                "model answer differently from call to call: a module in training mode, a hook, "
                "weights changed since the rollout, or arithmetic that depends on the batch size "
                "(TF32, quantised layers): use train.micro_batch = rollout.batch, or precision: "
                "float32"
            )


@torch.no_grad()
def _off(points: Trajectory) -> tuple[float, Tensor, Tensor]:
    """The level of points; how far their ratios are from 1; how far apart the predictions are."""
    now, old = (points.log_prob(points.moments(out)) for out in (points.pred, points.old))
    ratio = ((now - old).exp() - 1).abs().max()
    return points.level.sigma, ratio, (points.pred.float() - points.old.float()).abs().max()
