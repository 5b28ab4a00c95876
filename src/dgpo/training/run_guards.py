"""Guards: a run that goes wrong says so, and may end before it has cost more.

All that they know is read from ``metrics.jsonl`` and ``evaluations.jsonl``: a run that goes on
after a stop warns as the one that was not stopped.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from dgpo.prompts import Prompt
from dgpo.recipe import Recipe
from dgpo.recipe.sections import GuardSettings
from dgpo.training.batch import Batch

NORMS = 20
"""Gradient norms whose median is the usual one."""
FEWEST_NORMS = 5
"""With fewer there is no usual one yet."""
CLIPPED_ITERATIONS = 10
MOST_OF_THE_BASE = 0.1
"""How much of the slow average may be the base model at the end of a run before it is said."""
LATENTS = 2**16
"""The numbers in a latent of Stable Diffusion 3 at 512 pixels. The error of a mean over them is
that of one number, divided by the root of this."""


def foreseen(recipe: Recipe) -> list[str]:
    """Return what the settings alone tell of a run that will go wrong."""
    return young_average(recipe, recipe.optimizer_steps) + _fine_clip(recipe)


def young_average(recipe: Recipe, steps: int) -> list[str]:
    """Return a line if the slow average remembers much of the base model after so many steps."""
    share, ema = recipe.ema.base_share(steps), recipe.ema
    if share <= MOST_OF_THE_BASE:
        return []
    return [
        f"after {steps / recipe.updates_per_iteration:g} iterations {share:.0%} of the average, "
        "which is evaluated and saved, is still the base model: lower ema.every "
        f"(= {ema.every} of {steps} optimiser steps) or ema.decay (= {ema.decay:g}), or train for "
        "longer"
    ]


def _fine_clip(recipe: Recipe) -> list[str]:
    clip = getattr(recipe.algorithm, "clip", None)
    resolved = torch.finfo(getattr(torch, recipe.precision)).eps / LATENTS**0.5
    if clip is None or clip >= resolved:
        return []
    return [
        f"algorithm.clip = {clip:g}: predictions in {recipe.precision} resolve about "
        f"{resolved:.0e} (in a latent of {LATENTS:,} numbers), so rounding takes part in deciding "
        "what is clipped; widen the clip, or use precision: float32"
    ]


class Guards:
    """What is watched over the iterations and evaluations of a run.

    Args:
        settings: the recipe's ``guards``.
        groups: how many groups an iteration has.
        trained: names of the rewards; every other measure of an evaluation is out of the domain of
            what is optimised.
        rows: all iterations so far.
        evaluations: all evaluations so far.
    """

    def __init__(
        self,
        settings: GuardSettings,
        groups: int,
        trained: Collection[str],
        rows: Sequence[Mapping[str, Any]] = (),
        evaluations: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.settings, self._groups, self._trained = settings, groups, frozenset(trained)
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._collapsed = self._clipped = 0
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._falls: dict[str, int] = {}
        for row in rows:
            self.iteration(row)
        for row in evaluations:
            self.evaluation(row)

    @property
    def reason_to_stop(self) -> str | None:
        """Why the run should end now, if ``guards.stop`` wants it to."""
        own = self.settings
        if own.stop and own.collapse and self._collapsed >= own.collapse:
            return f"the rewards of every group were equal for {self._collapsed} iterations"
        fallen = [name for name, count in self._falls.items() if count >= own.falling]
        if own.stop and own.falling and fallen:
            return f"{', '.join(fallen)} fell in {own.falling} evaluations in a row"
        return None

    def iteration(self, row: Mapping[str, Any]) -> list[str]:
        """Look at the metrics of an iteration; returns what has to be said of it."""
        return [
            text
            for text in (
                self._left_out(row),
                self._collapse(row),
                self._spike(row),
                self._saturated(row),
                self._inexact(row),
            )
            if text
        ]

    def evaluation(self, row: Mapping[str, Any]) -> list[str]:
        """Look at an evaluation (``rewards``: the mean of each measure)."""
        said = []
        for name, value in row["rewards"].items():
            if name in self._trained or value is None:
                continue
            first = self._first.setdefault(name, value)
            fell = value < self._last.get(name, value) and value < first
            self._falls[name] = self._falls.get(name, 0) + 1 if fell else 0
            self._last[name] = value
            if self.settings.falling and self._falls[name] == self.settings.falling:
                said.append(
                    f"{name}, which is not trained, fell in {self._falls[name]} evaluations in a "
                    f"row, from {first:.4g} to {value:.4g}: the reward may be gamed; raise the KL "
                    "term (algorithm.kl), add the measure to rewards, or take an earlier checkpoint"
                )
        return said

    def _left_out(self, row: Mapping[str, Any]) -> str | None:
        if count := row.get("nonfinite_steps"):
            return f"{count:.0f} optimiser steps were left out: loss or gradient not finite"
        return None

    def _collapse(self, row: Mapping[str, Any]) -> str | None:
        equal, lost = row.get("groups_dropped", 0), row.get("groups_skipped", 0)
        dropped = equal > 0 and equal + lost == self._groups
        self._collapsed = self._collapsed + 1 if dropped else 0
        if dropped and self.settings.collapse and self._collapsed % self.settings.collapse == 0:
            return (
                f"the rewards of every group were equal for {self._collapsed} iterations: nothing "
                "is learned. The reward may be constant or saturated, or the pictures of a prompt "
                "may all be alike"
            )
        return None

    def _spike(self, row: Mapping[str, Any]) -> str | None:
        norm = row.get("grad_norm")
        if norm is None or not math.isfinite(norm):
            return None
        usual = median(self._norms) if len(self._norms) >= FEWEST_NORMS else math.inf
        self._norms.append(norm)
        factor = self.settings.gradient_spike
        if factor and norm > factor * usual:
            return (
                f"gradient norm {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g} (it is "
                "clipped to train.max_grad_norm): if it comes again, lower train.lr"
            )
        return None

    def _saturated(self, row: Mapping[str, Any]) -> str | None:
        limit, share = self.settings.clipped, row.get("clipped")
        full = bool(limit) and share is not None and share >= limit
        self._clipped = self._clipped + 1 if full else 0
        if full and self._clipped % CLIPPED_ITERATIONS == 0:
            return (
                f"{share:.0%} of the samples were clipped, {self._clipped} iterations of "
                f"{limit:.0%} or more in a row: hardly anything is learned; lower train.lr or the "
                "steps on one batch, or widen algorithm.clip"
            )
        return None

    def _inexact(self, row: Mapping[str, Any]) -> str | None:
        limit, far = self.settings.rollout_distance, row.get("rollout_distance")
        if far is None or not limit or far <= limit:
            return None
        return (
            f"inexact rollouts are {far:.2f} spreads of a group away from the exact ones (another "
            "picture of the prompt would be about 1.4): what is rewarded is hardly the policy's "
            "own; set rollout.accelerate to more steps or a milder cache, or to null"
        )


def save_batch(
    folder: Path, batch: Batch, prompts: Sequence[Prompt], iteration: int, why: str
) -> Path:
    """Write a batch for inspection: ``x0``, advantages and recorded steps as safetensors, the
    prompts of the groups and the reason as JSON.

    Returns:
        ``folder/nonfinite/00000012.safetensors``; the JSON lies beside it.
    """
    place = folder / "nonfinite" / f"{iteration:08d}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"x0": batch.x0, "advantages": batch.advantages, "places": batch.positions}
    for step in batch.steps:
        for name in ("sample", "output", "previous"):
            tensors[f"steps.{step.index}.{name}"] = getattr(step, name)
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, place)
    said = {
        "iteration": iteration,
        "why": why,
        "prompts": [prompt.text for prompt in prompts],
        "not_finite": [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())],
        "sigmas": [float(level.sigma) for level in batch.levels],
    }
    text = json.dumps(said, indent=2, ensure_ascii=False) + "\n"
    place.with_suffix(".json").write_text(text, encoding="utf-8")
    return place
