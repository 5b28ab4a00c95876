"""Training on clean samples that are noised again: levels, noise, predictions, and the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.core.points import Forward
from dgpo.core.process import Level
from dgpo.core.seeds import stream
from dgpo.core.transfer import sent, taken
from dgpo.distributed.lockstep import Turn, pieces, turns
from dgpo.models.policy import Policy, Weights
from dgpo.recipe import Recipe
from dgpo.training.asking import loss_of, weights_of
from dgpo.training.batch import Batch
from dgpo.training.rounds import MicroLoss, Round, idle


class ForwardRounds:
    """The rounds of an algorithm on noised samples: one for all levels together, or one for each,
    as ``train.optimizer_step`` says; all of that ``train.inner_epochs`` times.

    Args:
        policy: makes the predictions.
        recipe: its algorithm, noise levels, micro-batch and seed; the algorithm trains on noised
            samples (:class:`Algorithm`).
    """

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        assert isinstance(recipe.algorithm, Algorithm)
        self.policy, self.algorithm, self.recipe = policy, recipe.algorithm, recipe
        self._old_is_policy = False

    def __call__(self, batch: Batch, iteration: int) -> Iterator[Round]:
        """The optimiser steps of an iteration, one after the other."""
        generator = stream(self.recipe.seed, "levels", iteration)
        epochs, choice = self.recipe.train.inner_epochs, self.algorithm.timesteps
        chosen = [one for _ in range(epochs) for one in choice.choose(batch.levels, generator)]
        together = 1 if self.recipe.train.optimizer_step == "timestep" else choice.count
        draws = list(enumerate(chosen))
        for start in range(0, len(draws), together):
            self._old_is_policy = start == 0 and old_is_policy(self.algorithm, iteration)
            yield self._losses(batch, iteration, draws[start : start + together])

    def _losses(self, batch: Batch, iteration: int, draws: Sequence[tuple[int, int]]) -> Round:
        """The losses of one step; a draw is its place in the iteration and its noise level."""
        for order, index in draws:
            noise = self._noise(batch, iteration, order)
            for points, counts, last in self._micro_batches(batch, batch.levels[index], noise):
                last = last and order == draws[-1][0]
                if points is None or not counts:
                    yield idle(points, last)
                    continue
                share = len(points.pred) / batch.count
                # every micro-batch's mean counts with its size: their sum is the batch's mean
                weight = share * batch.share / len(draws)
                yield MicroLoss(*loss_of(self.algorithm, points), share, weight, last)

    def _noise(self, batch: Batch, iteration: int, order: int) -> Tensor:
        """Noise [B, ...], fresh for every level, one for each group if the algorithm shares it.

        It depends on a row's position in the iteration alone: neither micro-batches nor groups that
        are left out change what the others are given.
        """
        keys = batch.positions
        if not len(keys):
            return batch.x0.clone()
        if self.algorithm.shared_noise:
            keys = keys // self.recipe.group_size
        distinct, which = keys.unique(return_inverse=True)
        drawn = [
            torch.randn(
                batch.x0.shape[1:],
                generator=stream(self.recipe.seed, "noise", iteration, order, key),
            )
            for key in distinct.tolist()
        ]
        return taken(sent(torch.stack(drawn), batch.x0), which)

    def _micro_batches(
        self, batch: Batch, level: Level, noise: Tensor
    ) -> Iterator[tuple[Forward | None, bool, bool]]:
        """The points of one level, micro-batch by micro-batch, predicted with gradients; whether
        they count; and whether they are the last.

        Every process yields equally often, because it can be stopped at each of these places, and
        all must stop at the same one. Points do not count where only other processes have some
        left; None stands for no points, and for a pause between two predictions.
        """
        size = self.recipe.rows_at_once(batch.x0.device.type) or batch.largest_share
        rows = torch.arange(len(batch.x0))
        passes = list(turns(pieces(rows, size, batch.largest_share), self.policy.sharded))
        at_once, last = len(passes) == 1, passes[-1]
        whole_groups = not batch.split and (at_once or size % batch.groups.size == 0)
        if whole_groups or type(self.algorithm).weights is Algorithm.weights:
            for turn in passes:
                yield self._pass(batch, level, noise, turn), turn.counts, turn is last
            return
        # A part of a group cannot weigh the group, whose weight is a function of all its members.
        # So all parts are predicted first, without gradients if there are several; then the policy
        # alone runs a second time, with gradients. Snapshots are not asked again.
        seen: list[Forward | None] = []
        for turn in passes:
            seen.append(self._pass(batch, level, noise, turn, with_gradient=at_once))
            if not at_once:
                yield None, False, False
        found = [p for p, turn in zip(seen, passes, strict=True) if p is not None and turn.counts]
        # also a process without rows takes part in the sums over groups, which are collective
        nothing = torch.arange(0)
        every = found or [self._points(batch, level, noise, nothing, with_gradient=False)]
        weights = weights_of(self.algorithm, _joined(every, batch))
        for points, turn in zip(seen, passes, strict=True):
            if points is not None and not at_once:
                own = batch if turn.counts else batch.dummy
                assert own is not None
                pred = self.policy.predict(points.xt, level, own.conditioning(turn.rows))
                points = replace(points, pred=pred)
            if points is not None and turn.counts:
                points = replace(points, weights=taken(weights, turn.rows))
            yield points, turn.counts, turn is last

    def _pass(
        self, batch: Batch, level: Level, noise: Tensor, turn: Turn, with_gradient: bool = True
    ) -> Forward | None:
        """The points of a turn; None where this process makes no pass."""
        if turn.counts:
            return self._points(batch, level, noise, turn.rows, with_gradient)
        if not turn.dummy:
            return None
        assert batch.dummy is not None
        noise = torch.zeros_like(batch.dummy.x0)
        return self._points(batch.dummy, level, noise, turn.rows, with_gradient)

    def _points(
        self, batch: Batch, level: Level, noise: Tensor, rows: Tensor, with_gradient: bool
    ) -> Forward:
        """Some rows noised to a level, and the predictions that the algorithm declares there."""
        process = self.policy.model.process
        x0, noise = taken(batch.x0, rows), taken(noise, rows)
        xt = process.corrupt(x0, noise, level)
        cond = batch.conditioning(rows)

        def snapshot(weights: Weights, guidance: float = 1.0) -> Tensor:
            if not len(rows):
                return xt
            return self.policy.predict(xt, level, cond, weights, guidance)

        declared, kl_guidance = self.algorithm.snapshots, self.algorithm.kl_guidance
        ref = snapshot("ref") if "ref" in declared else None
        kl_ref = None if kl_guidance is None else snapshot("ref", kl_guidance)
        with torch.set_grad_enabled(with_gradient):
            pred = snapshot("policy")
        old = None
        if "old" in declared:
            old = pred.detach() if self._old_is_policy else snapshot("old")
        return Forward(
            x0=x0,
            noise=noise,
            xt=xt,
            target=process.target(x0, noise, level),
            level=level,
            process=process,
            pred=pred,
            ref=ref,
            old=old,
            kl_ref=kl_ref,
            advantages=sent(batch.advantages[rows], xt),
            groups=batch.local_groups.subset(rows),
        )


def old_is_policy(algorithm: Algorithm, iteration: int) -> bool:
    """Return whether the old policy is the policy when an iteration's update begins.

    One pass serves both then: before the first iteration, and where the old policy becomes the
    policy after every iteration.
    """
    if algorithm.old_moves != "iteration":
        return False
    return iteration == 0 or algorithm.old_decay(iteration - 1) == 0


def _joined(parts: Sequence[Forward], batch: Batch) -> Forward:
    """The points of all micro-batches as one, in the batch's order."""

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    def cat_if_declared(name: str) -> Tensor | None:
        return None if getattr(parts[0], name) is None else cat(name)

    return Forward(
        x0=cat("x0"),
        noise=cat("noise"),
        xt=cat("xt"),
        target=cat("target"),
        level=parts[0].level,
        process=parts[0].process,
        pred=cat("pred"),
        ref=cat_if_declared("ref"),
        old=cat_if_declared("old"),
        kl_ref=cat_if_declared("kl_ref"),
        advantages=sent(batch.advantages, parts[0].pred),
        groups=batch.groups,
    )
