"""Update: the forward passes that an algorithm declares, and the optimiser's steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.collection import Batch
from dgpo.core.points import Forward
from dgpo.core.process import Level
from dgpo.core.seeds import stream
from dgpo.errors import UserError
from dgpo.models.policy import Policy
from dgpo.recipe import Recipe


@dataclass
class Means:
    """Weighted means of named figures."""

    totals: dict[str, float]
    weight: dict[str, float]

    def add(self, figures: dict[str, Tensor], weight: float) -> None:
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, 0.0) + weight * float(value)
            self.weight[name] = self.weight.get(name, 0.0) + weight

    def result(self) -> dict[str, float]:
        return {name: total / self.weight[name] for name, total in self.totals.items()}


class Updater:
    """Turns a batch into optimiser steps.

    Args:
        policy: what is trained.
        algorithm: which points, which snapshots, and the loss.
        recipe: learning rate and its schedule, micro-batch, clipping of gradients, slow EMA.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, recipe: Recipe) -> None:
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
        per_iteration = self._steps_per_iteration
        self._all_steps = train.iterations * per_iteration

    @property
    def _steps_per_iteration(self) -> int:
        once = self.recipe.train.optimizer_step == "iteration"
        return 1 if once else self.algorithm.timesteps.count

    def update(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Train on a batch; returns the means of the loss's figures over the iteration.

        Raises:
            UserError: the loss is not finite.
        """
        seed = self.recipe.seed
        chosen = self.algorithm.timesteps.choose(batch.levels, stream(seed, "levels", iteration))
        once = self.recipe.train.optimizer_step == "iteration"
        means = Means({}, {})
        for order, index in enumerate(chosen):
            weight = batch.share / (len(chosen) if once else 1)
            self._accumulate(batch, batch.levels[index], (iteration, order), weight, means)
            if not once or order == len(chosen) - 1:
                means.add({"grad_norm": self._optimize()}, 1.0)
        return means.result()

    def _accumulate(
        self, batch: Batch, level: Level, place: tuple[int, int], weight: float, means: Means
    ) -> None:
        """Add one noise level's gradients, micro-batch by micro-batch."""
        noise = self._noise(batch, place)
        group_weights = self._group_weights(batch, level, noise)
        for rows in self._micro_batches(batch):
            points = self._points(batch, level, noise, rows, with_gradient=True)
            if group_weights is not None:
                points = replace(points, weights=group_weights[rows])
            loss, figures = self.algorithm.loss(points)
            if not math.isfinite(value := loss.item()):
                raise UserError(
                    f"iteration {place[0] + 1}: the loss is {value}; nothing was changed by it. "
                    "Lower train.lr, or go back to an earlier checkpoint"
                )
            share = len(rows) / len(batch.x0)
            (loss * (weight * share)).backward()
            means.add({"loss": loss.detach(), **figures}, share)

    def _noise(self, batch: Batch, place: tuple[int, int]) -> Tensor:
        """Noise [B, ...]: fresh for every level, one for each group if the algorithm shares it."""
        generator = stream(self.recipe.seed, "noise", *place)
        shared = self.algorithm.shared_noise
        count = batch.groups.count if shared else len(batch.x0)
        noise = torch.randn(count, *batch.x0.shape[1:], generator=generator).to(batch.x0.device)
        return batch.groups.each(noise) if shared else noise

    def _micro_batches(self, batch: Batch) -> Iterator[Tensor]:
        size = self.recipe.train.micro_batch or len(batch.x0)
        yield from torch.arange(len(batch.x0)).split(size)

    def _whole_groups(self, batch: Batch) -> bool:
        size = self.recipe.train.micro_batch
        return size is None or size >= len(batch.x0) or size % self.recipe.group_size == 0

    @torch.no_grad()
    def _group_weights(self, batch: Batch, level: Level, noise: Tensor) -> Tensor | None:
        """Weights over whole groups, where a micro-batch holds only a part of one.

        The predictions are made micro-batch by micro-batch, without gradients.
        """
        if self._whole_groups(batch):
            return None
        parts = [
            self._points(batch, level, noise, rows, with_gradient=False)
            for rows in self._micro_batches(batch)
        ]
        first = parts[0]

        def joined(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values)

        names = ("x0", "noise", "xt", "target", "pred", "ref", "old", "kl_ref")
        whole = {name: joined(name) for name in names}
        return self.algorithm.weights(
            replace(first, **whole, advantages=batch.advantages, groups=batch.groups)  # pyright: ignore[reportArgumentType]
        )

    def _points(
        self, batch: Batch, level: Level, noise: Tensor, rows: Tensor, with_gradient: bool
    ) -> Forward:
        """The forward passes that the algorithm declares, at one level, for some rows."""
        process = self.policy.model.process
        cond = batch.cond.rows(rows)
        x0, noise = batch.x0[rows], noise[rows]
        xt = process.corrupt(x0, noise, level)
        declared = self.algorithm.snapshots
        kl_guidance = self.algorithm.kl_guidance

        def other(weights: str, guidance: float = 1.0) -> Tensor:
            return self.policy.predict(xt, level, cond, weights, guidance)  # pyright: ignore[reportArgumentType]

        ref = other("ref") if "ref" in declared else None
        old = other("old") if "old" in declared else None
        kl_ref = other("ref", kl_guidance) if kl_guidance is not None else None
        with torch.set_grad_enabled(with_gradient):
            pred = self.policy.predict(xt, level, cond)
        target = process.target(x0, noise, level)
        groups = batch.groups.subset(rows)
        return Forward(
            x0, noise, xt, target, level, pred, ref, old, kl_ref, batch.advantages[rows], groups
        )

    def _optimize(self) -> Tensor:
        """One optimiser step; both averages are moved once for it.  Returns the gradient norm."""
        train = self.recipe.train
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self._factor(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.policy.old.update(self.algorithm.old_decay(self.step))
        self.step += 1
        if self.step % self.recipe.ema.every == 0:
            self.policy.slow.update(self.recipe.ema.decay)
        return norm

    def _factor(self, step: int) -> float:
        """The learning rate's factor: warm-up, then constant, linear to 0, or half a cosine."""
        train = self.recipe.train
        warm = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
        part = min(1.0, step / max(self._all_steps, 1))
        if train.lr_schedule == "linear":
            return warm * (1 - part)
        if train.lr_schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * part))
        return warm
