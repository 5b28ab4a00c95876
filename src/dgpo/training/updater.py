"""Update: the forward passes that an algorithm declares, and the optimiser's steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dgpo.algorithms.base import Algorithm, TrajectoryAlgorithm
from dgpo.core.transfer import read
from dgpo.distributed.processes import SINGLE, Processes
from dgpo.distributed.sharding import is_sharded, let_go, local, sum_in_backward, whole
from dgpo.errors import UserError
from dgpo.interrupts import Terminated
from dgpo.models.policy import Policy
from dgpo.recipe import Recipe
from dgpo.training.batch import Batch
from dgpo.training.forward_rounds import ForwardRounds
from dgpo.training.rounds import MicroLoss, Round
from dgpo.training.trajectory_rounds import TrajectoryRounds
from dgpo.training.update_backup import UpdateBackup

FIRST_SCALE = 2.0**16
"""The first scale of losses in float16. It is halved after a step with an overflow, and doubled
after SCALE_GROWS steps without one, as is usual for mixed precision (arXiv 1710.03740, section
3.2)."""
SCALE_GROWS = 2000
SATISFIED = 1e-30
"""Mean weights of groups below it count as 0."""


@dataclass
class Means:
    """Weighted means of named figures."""

    totals: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, figures: Mapping[str, float], weight: float) -> None:
        """Add figures, each with the same weight."""
        for name, value in figures.items():
            self.totals[name] = self.totals.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def join(self, other: Means) -> None:
        """Add what another has added up."""
        for name, total in other.totals.items():
            self.totals[name] = self.totals.get(name, 0.0) + total
            self.weights[name] = self.weights.get(name, 0.0) + other.weights[name]

    def over(self, processes: Processes, problem: str | None) -> tuple[Means, str | None]:
        """The means over all processes, and the first problem that one of them has. Collective."""
        if processes.single:
            return self, problem
        means, first = Means(), None
        said = [self.totals, self.weights, problem]
        for totals, weights, other in processes.all_gather_object(
            said, "the loss of an optimiser step"
        ):
            means.join(Means(totals, weights))
            first = first or other
        return means, first

    def result(self) -> dict[str, float]:
        """Return the means."""
        return {name: total / self.weights[name] for name, total in self.totals.items()}


@dataclass
class Seen:
    """The losses and figures of an optimiser step. They stay on the device until its end: to look
    at one would wait for the device, which then has nothing to do until the next pass is there."""

    losses: list[Tensor] = field(default_factory=list)
    figures: list[tuple[dict[str, Any], float]] = field(default_factory=list)

    def add(self, term: MicroLoss) -> None:
        """Note a micro-batch, without its graph."""
        loss = term.loss.detach()
        if term.loss.requires_grad or term.share:  # else no pass was made
            self.losses.append(loss)
        if term.share:
            self.figures.append(({"loss": loss, **term.figures}, term.share))

    def read(self, norm: Tensor) -> tuple[Means, str | None, float]:
        """The means of the figures; the first loss that is not finite, in words; and the norm."""
        values = [value for figures, _ in self.figures for value in figures.values()]
        found = read([norm, *self.losses, *values], like=norm)
        number, losses = found[0], found[1 : 1 + len(self.losses)]
        rest, means = iter(found[1 + len(self.losses) :]), Means()
        for figures, share in self.figures:
            means.add({name: next(rest) for name in figures}, share)
        broken = next((loss for loss in losses if not math.isfinite(loss)), None)
        return means, None if broken is None else f"loss is {broken}", number


class NonFinite(UserError):
    """Too many losses or gradients in a row were not finite."""


class Updater:
    """Turns a batch into optimiser steps.

    Args:
        policy: what is trained.
        recipe: the algorithm (which points, which snapshots, and the loss), learning rate and its
            schedule, micro-batch, clipping of gradients, slow average.
        processes: each brings the gradients of its own rows, and their sum is the step.
    """

    def __init__(
        self,
        policy: Policy,
        recipe: Recipe,
        processes: Processes = SINGLE,
    ) -> None:
        self.policy, self.recipe, self.processes = policy, recipe, processes
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
        self.nonfinite = 0
        """Steps left out in a row because a loss or a gradient was not finite."""
        self.gradient_scale = FIRST_SCALE if recipe.precision == "float16" else 1.0
        """What losses are multiplied with for their backward passes: the gradients of activations
        in float16 would be rounded to nothing without it. Those of the weights, which are wider,
        are divided by it."""
        self.scaled = 0
        """Steps taken since it changed."""
        self.at_rest = True
        """True if the weights belong to an iteration: no update is half done."""
        self._rounds = rounds_of(policy, recipe)
        self._denoisers = list(policy.model.denoisers.values())
        self._sharded = any(is_sharded(p) for p in self.parameters)
        self._sums_once = self._sharded and train.sum_gradients == "step"

    def update(
        self, batch: Batch, iteration: int, hear: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Train on a batch; returns the means of the loss's figures over the iteration.

        A step whose loss or gradient is not finite is left out and counted in
        ``nonfinite_steps``. In float16 the first such steps lower the scale of losses instead of
        being counted towards ``guards.nonfinite``.

        Args:
            batch: what the iteration trains on.
            iteration: counted from 0.
            hear: called in every micro-batch but the last of an optimiser step, and between two
                steps: lets a signal that was held back be heard by this process, which may raise
                what stops a run. Of several processes all stop at the same step, or none does.
                Before the first optimiser step of the iteration nothing has changed then; after it
                a LoRA is brought back to where the update began, of which a copy is kept for it.
                There is none of all weights: ``at_rest`` tells.

        Raises:
            NonFinite: ``guards.nonfinite`` steps in a row were left out.
            UserError: the policy of a policy gradient is not the one that its rollouts came from,
                or the gradient of a step is exactly 0 and the algorithm's figures do not say why.
        """
        undo = None
        if self.recipe.updates_per_iteration > 1 and self.recipe.lora is not None:
            undo = UpdateBackup(self.policy, self.optimizer)
        counters = self.step, self.nonfinite, self.gradient_scale, self.scaled
        try:
            with torch.inference_mode(False):  # gradients are on, whatever was left off before
                found = self._update(batch, iteration, hear)
        except (KeyboardInterrupt, Terminated):
            if undo is not None:
                undo.back()
                self.at_rest = True
            if self.at_rest:
                self.step, self.nonfinite, self.gradient_scale, self.scaled = counters
            raise
        self.at_rest = True
        if not self.recipe.train.reshard:
            let_go(self._denoisers)
        return found

    def _update(self, batch: Batch, iteration: int, hear: Callable[[], None]) -> dict[str, float]:
        def pause() -> None:
            hear()
            self.processes.stop_if_asked("the next micro-batch or step")

        # where no pass needs the other processes, one that is asked to stop leaves its own passes
        # out, and tells the others only before the step
        alone = not (self.processes.single or self.policy.sharded or batch.split)
        means, skipped = Means(), 0
        self.optimizer.zero_grad()
        for number, losses in enumerate(self._rounds(batch, iteration)):
            if number and not alone:
                pause()
            seen = self._backward(losses, hear if alone else pause, alone)
            if alone:
                pause()
            figures, problem, norm = seen.read(self._gradient_norm())
            figures, problem = figures.over(self.processes, problem)
            problem = problem or self._optimize(norm, figures, batch.spread, iteration)
            if problem is None:
                self.nonfinite = 0
                means.join(figures)
                continue
            skipped += 1
            self.optimizer.zero_grad()
            if self.gradient_scale > 1 and problem.startswith("gradient"):  # too large for float16
                self.gradient_scale, self.scaled = self.gradient_scale / 2, 0
                continue
            self.nonfinite += 1
            if self.nonfinite >= self.recipe.guards.nonfinite:
                raise NonFinite(
                    f"iteration {iteration + 1}: the {problem}, and no step was taken with it, "
                    f"{self.nonfinite} times in a row (guards.nonfinite): lower train.lr and go on "
                    "from the last checkpoint"
                )
        self.end_iteration(iteration)
        found = means.result() or {"loss": math.nan}
        return {**found, "nonfinite_steps": float(skipped)} if skipped else found

    def refuse_half_an_update(self) -> None:
        """See that the weights belong to an iteration.

        Raises:
            UserError: the last update was cut off between its optimiser steps.
        """
        if not self.at_rest:
            raise UserError(
                "train(): the update of this run was cut off between its optimiser steps, and its "
                "weights belong to no iteration: go on from the last checkpoint, by another "
                "Trainer(..., resume=True)"
            )

    def refuse_broken_weights(self, iteration: int) -> None:
        """See that the trained weights are numbers. Collective.

        Args:
            iteration: done so far.

        Raises:
            UserError: some are infinite or NaN, from which there is no way back.
        """
        finite = all(bool(torch.isfinite(local(p)).all()) for p in self.parameters)
        if all(self.processes.all_gather_object(finite, "whether the weights are finite")):
            return
        raise UserError(
            f"iteration {iteration}: the trained weights are not finite, so no checkpoint was made "
            "of them: lower train.lr and go on from the last checkpoint"
        )

    def end_iteration(self, iteration: int) -> None:
        """The end of an iteration, with or without a batch: move the old policy if it moves now."""
        self._move_old("iteration", iteration)

    def _backward(self, losses: Round, pause: Callable[[], None], alone: bool) -> Seen:
        """Add up the gradients of a step; what is not finite goes on to the end, as other processes
        make the same passes and would wait for these."""
        seen = Seen()
        for term in losses:
            # where gradients are summed once, in the last backward pass, a stop needs one as well:
            # what was not summed would be left behind
            hears = not term.last and (term.loss.requires_grad or not self._sums_once)
            stop = _heard(pause) if hears else None
            if self._sums_once:
                sum_in_backward(self._denoisers, term.last or stop is not None)
            if term.loss.requires_grad:
                (term.loss * (term.weight * self.gradient_scale)).backward()
            if stop is not None:
                raise stop
            seen.add(term)
            if alone and self.processes.heard:
                break
        return seen

    def _gradient_norm(self) -> Tensor:
        """The norm of the gradient of all processes, which is clipped to the largest allowed.
        Collective."""
        if not self._sharded:  # which are summed by their backward
            self.processes.sum_gradients(self.parameters)
        self._unscale()
        limit = self.recipe.train.max_grad_norm
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        return norm.to(self.policy.model.device)

    def _optimize(self, norm: float, figures: Means, spread: bool, iteration: int) -> str | None:
        """One optimiser step; the averages that move with steps are moved once for it. None is
        taken, and what is not finite is returned, if the norm of the gradient is not."""
        train = self.recipe.train
        if not math.isfinite(norm):
            return f"gradient norm is {norm}"
        # without spread the KL term alone is trained, which has no gradient at the start
        if norm == 0 and spread:
            self._refuse_still(figures.result(), iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * self._factor(self.step)
        self.at_rest = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._grow_scale()
        self._move_old("step", self.step)
        self.step += 1
        ema = self.recipe.ema
        if self.step % ema.every == 0:
            self.policy.slow.update(ema.decay_of(self.step))
        figures.add({"grad_norm": norm}, 1.0)
        return None

    def _refuse_still(self, figures: Mapping[str, float], iteration: int) -> None:
        """See that there is a reason for a gradient of exactly 0.

        The batch has spread, so there is none but these: a trust region has stopped samples, or the
        groups are in order already and their weights have come down to 0. A learning rate of 0 is
        no reason, nor is the KL term, which adds to the gradient.

        Raises:
            UserError: the algorithm's figures name no reason.
        """
        if figures.get("clipped", 0.0) > 0 or figures.get("weight", 1.0) < SATISFIED:
            return
        raise UserError(
            f"iteration {iteration + 1}: the rewards of its groups differ, but the gradient of the "
            f"loss is exactly 0 over all {len(self.parameters)} trained tensors, so nothing would "
            "be learned. Look at whether the prediction depends on the trained weights "
            "(lora.targets; dgpo check MODEL) and whether code of your own detaches it or switches "
            "gradients off; an algorithm of your own that stops samples says so by its figure "
            "'clipped'"
        )

    def _unscale(self) -> None:
        """Divide the gradients by the scale of their losses, a power of two."""
        if self.recipe.precision != "float16":
            return
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.div_(self.gradient_scale)

    def _grow_scale(self) -> None:
        """Double the scale of losses after many steps without an overflow."""
        self.scaled += 1
        if self.recipe.precision == "float16" and self.scaled >= SCALE_GROWS:
            self.gradient_scale, self.scaled = self.gradient_scale * 2, 0

    def _move_old(self, when: Literal["step", "iteration"], count: int) -> None:
        """Move the old policy if the algorithm has one that moves now."""
        algorithm = self.recipe.algorithm
        if isinstance(algorithm, Algorithm) and algorithm.old_moves == when:
            self.policy.old.update(algorithm.old_decay(count))

    def _factor(self, step: int) -> float:
        """The learning rate's factor: warm-up, then constant, linear to 0, or half a cosine."""
        train = self.recipe.train
        warm = min(1.0, (step + 1) / train.warmup) if train.warmup else 1.0
        part = min(1.0, step / self.recipe.optimizer_steps)
        if train.lr_schedule == "linear":
            return warm * (1 - part)
        if train.lr_schedule == "cosine":
            return warm * 0.5 * (1 + math.cos(math.pi * part))
        return warm


def _heard(pause: Callable[[], None]) -> BaseException | None:
    """What asks a run to stop, if it is asked to."""
    try:
        pause()
    except (KeyboardInterrupt, Terminated) as stop:
        return stop
    return None


def rounds_of(policy: Policy, recipe: Recipe) -> Callable[[Batch, int], Iterator[Round]]:
    """How the recipe's algorithm turns a batch and an iteration into optimiser steps."""
    kinds = TrajectoryRounds if isinstance(recipe.algorithm, TrajectoryAlgorithm) else ForwardRounds
    return kinds(policy, recipe)
