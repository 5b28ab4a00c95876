"""Update: the forward passes that an algorithm declares, and the optimiser's steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.collection import Batch
from dgpo.core.points import Forward
from dgpo.core.process import Level
from dgpo.core.seeds import stream
from dgpo.errors import UserError
from dgpo.models.policy import Policy, Weights
from dgpo.recipe import Recipe


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
        self._step_each_level = train.optimizer_step == "timestep"
        per_iteration = algorithm.timesteps.count if self._step_each_level else 1
        self._all_steps = train.iterations * per_iteration

    def update(self, batch: Batch, iteration: int) -> dict[str, float]:
        """Train on a batch; returns the means of the loss's figures over the iteration.

        Raises:
            UserError: a loss or a gradient is not finite.
        """
        generator = stream(self.recipe.seed, "levels", iteration)
        chosen = self.algorithm.timesteps.choose(batch.levels, generator)
        together = 1 if self._step_each_level else len(chosen)
        means = Means()
        self.optimizer.zero_grad()
        for order, index in enumerate(chosen):
            noise = self._noise(batch, iteration, order)
            level = batch.levels[index]
            for points in self._micro_batches(batch, level, noise):
                loss, figures = self.algorithm.loss(points)
                self._refuse_nonfinite("loss", loss, iteration)
                share = len(points.pred) / len(batch.x0)
                # every micro-batch's mean counts with its size: their sum is the batch's mean
                (loss * (share * batch.share / together)).backward()
                means.add({"loss": loss.detach(), **figures}, share)
            if (order + 1) % together == 0:
                means.add({"grad_norm": self._optimize(iteration)}, 1.0)
        if self.algorithm.old_moves == "iteration":
            self.policy.old.update(self.algorithm.old_decay(iteration))
        return means.result()

    def _noise(self, batch: Batch, iteration: int, order: int) -> Tensor:
        """Noise [B, ...], fresh for every level, one for each group if the algorithm shares it.

        It depends on a row's place in the iteration alone: neither micro-batches nor groups that
        are left out change what the others are given.
        """
        places = batch.places
        if self.algorithm.shared_noise:
            places = places // self.recipe.group_size
        drawn = {
            place: torch.randn(
                batch.x0.shape[1:],
                generator=stream(self.recipe.seed, "noise", iteration, order, place),
            )
            for place in places.unique().tolist()
        }
        return torch.stack([drawn[place] for place in places.tolist()]).to(batch.x0.device)

    def _micro_batches(self, batch: Batch, level: Level, noise: Tensor) -> Iterator[Forward]:
        """The points of one level, micro-batch by micro-batch, predicted with gradients."""
        size = self.recipe.train.micro_batch or len(batch.x0)
        parts = torch.arange(len(batch.x0)).split(size)
        whole_groups = size >= len(batch.x0) or size % batch.groups.size == 0
        if whole_groups or type(self.algorithm).weights is Algorithm.weights:
            for rows in parts:
                yield self._points(batch, level, noise, rows, with_gradient=True)
            return
        # A part of a group cannot weigh the group: all parts are predicted without gradients
        # first. What was predicted by snapshots is kept; only the policy runs a second time.
        seen = [self._points(batch, level, noise, rows, with_gradient=False) for rows in parts]
        weights = self.algorithm.weights(_joined(seen, batch))
        assert weights is not None
        for rows, points in zip(parts, seen, strict=True):
            pred = self.policy.predict(points.xt, level, batch.conditioning(rows))
            yield replace(points, pred=pred, weights=weights[rows])

    def _points(
        self, batch: Batch, level: Level, noise: Tensor, rows: Tensor, with_gradient: bool
    ) -> Forward:
        """Some rows noised to a level, and the predictions that the algorithm declares there."""
        process = self.policy.model.process
        x0, noise = batch.x0[rows], noise[rows]
        xt = process.corrupt(x0, noise, level)
        cond = batch.conditioning(rows)

        def snapshot(weights: Weights, guidance: float = 1.0) -> Tensor:
            return self.policy.predict(xt, level, cond, weights, guidance)

        declared, kl_guidance = self.algorithm.snapshots, self.algorithm.kl_guidance
        ref = snapshot("ref") if "ref" in declared else None
        old = snapshot("old") if "old" in declared else None
        kl_ref = None if kl_guidance is None else snapshot("ref", kl_guidance)
        with torch.set_grad_enabled(with_gradient):
            pred = self.policy.predict(xt, level, cond)
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
            advantages=batch.advantages[rows],
            groups=batch.groups.subset(rows),
        )

    def _optimize(self, iteration: int) -> Tensor:
        """One optimiser step; both averages are moved once for it.  Returns the gradient norm."""
        train = self.recipe.train
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, train.max_grad_norm)
        self._refuse_nonfinite("gradient norm", norm, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self._factor(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.algorithm.old_moves == "step":
            self.policy.old.update(self.algorithm.old_decay(self.step))
        self.step += 1
        if self.step % self.recipe.ema.every == 0:
            self.policy.slow.update(self.recipe.ema.decay)
        return norm

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
        advantages=batch.advantages,
        groups=batch.groups,
    )
