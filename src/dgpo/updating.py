"""Update: the forward passes that an algorithm declares, and the optimiser's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm, BaseAlgorithm, TrajectoryAlgorithm
from dgpo.collection import Batch
from dgpo.errors import UserError
from dgpo.forward_rounds import ForwardRounds
from dgpo.models.policy import Policy
from dgpo.recipe import Recipe
from dgpo.rounds import Round
from dgpo.trajectory_rounds import TrajectoryRounds


@dataclass
class Means:
    """Weighted means of named figures."""

    totals: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, figures: Mapping[str, Tensor], weight: float) -> None:
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, 0.0) + weight * float(value)
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        return {name: total / self.weights[name] for name, total in self.totals.items()}


class Updater:
    """Turns a batch into optimiser steps.

    Args:
        policy: what is trained.
        algorithm: which points, which snapshots, and the loss; an :class:`Algorithm` or a
            :class:`TrajectoryAlgorithm`.
        recipe: learning rate and its schedule, micro-batch, clipping of gradients, slow EMA.
    """

    def __init__(self, policy: Policy, algorithm: BaseAlgorithm, recipe: Recipe) -> None:
        self.policy, self.algorithm, self.recipe = policy, algorithm, recipe
        train = recipe.train
        self.parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.step = 0
        """Optimiser steps taken so far."""
        self._all_steps = train.iterations * recipe.updates_per_iteration
        self._rounds = rounds_of(policy, algorithm, recipe)

    def update(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Train on a batch; returns the means of the loss's figures over the iteration.

        Raises:
            UserError: a loss or a gradient is not finite, or the policy of a policy gradient is
                not the one that its rollouts came from.
        """
        means = Means()
        self.optimizer.zero_grad()
        for terms in self._rounds(batch, iteration):
            for term in terms:
                self._refuse_nonfinite("loss", term.loss, iteration)
                (term.loss * term.weight).backward()
                means.add({"loss": term.loss.detach(), **term.figures}, term.share)
            means.add({"grad_norm": self._optimize(iteration)}, 1.0)
        self._move_old("iteration", iteration)
        return means.result()

    def _optimize(self, iteration: int) -> Tensor:
        """One optimiser step; both averages are moved once for it.  Returns the gradient norm."""
        train = self.recipe.train
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self._refuse_nonfinite("gradient norm", norm, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self._factor(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._move_old("step", self.step)
        self.step += 1
        if self.step % self.recipe.ema.every == 0:
            self.policy.slow.update(self.recipe.ema.decay)
        return norm

    def _move_old(self, when: Literal["step", "iteration"], count: int) -> None:
        """Move the old policy if the algorithm has one that moves now."""
        algorithm = self.algorithm
        if isinstance(algorithm, Algorithm) and algorithm.old_moves == when:
            self.policy.old.update(algorithm.old_decay(count))

    def _factor(self, step: int) -> float:
        """The learning rate's factor: warm-up, then constant, linear to 0, or half a cosine."""
        train = self.recipe.train
        warm = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
        part = min(1.0, step / self._all_steps)
        if train.lr_schedule == "linear":
            return warm * (1 - part)
        if train.lr_schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * part))
        return warm

    def _refuse_nonfinite(self, what: str, value: Tensor, iteration: int) -> None:
        if not math.isfinite(number := value.item()):
            raise UserError(
                f"iteration {iteration + 1}: the {what} is {number}, and no step was taken with "
                "it: lower train.lr and go on from the last checkpoint"
            )


def rounds_of(
    policy: Policy, algorithm: BaseAlgorithm, recipe: Recipe
) -> Callable[[Batch, int], Iterator[Round]]:
    """How an algorithm's batch and iteration become the terms of optimiser steps."""
    if isinstance(algorithm, TrajectoryAlgorithm):
        return TrajectoryRounds(policy, algorithm, recipe).rounds
    assert isinstance(algorithm, Algorithm)
    return ForwardRounds(policy, algorithm, recipe).rounds
