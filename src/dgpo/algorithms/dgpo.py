"""DGPO: Direct Group Preference Optimization (arXiv 2510.08425, ICLR 2026).

With the denoising losses d_i of a group of G samples, those of a baseline d_i^base, and advantages
A_i that sum to zero (so that log Z cancels), the loss of a group and its gradient are
    L_g = -log sigmoid(-S_g),      S_g = (beta/G) sum_i A_i (d_i - d_i^base)               (1)
    grad L_g = (beta/G) w_g sum_i A_i grad d_i,      w_g = sigmoid(S_g)                    (2)
The mean of (2) over groups is beta mean_i(w_g(i) A_i grad d_i) over all samples. With w detached
and taken from whole groups this is a mean over SAMPLES: micro-batches and processes add exactly.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.shared import GuidedKl, NormalizedRewards, uniform_advantages
from dgpo.core.groups import Groups
from dgpo.core.points import Forward


def group_margin(
    error: Tensor, base_error: Tensor, advantages: Tensor, groups: Groups, beta: float
) -> Tensor:
    """``S_g`` of (1): three ``[B]`` to ``[count]``, summed over all processes, without gradient.
    Raises ValueError if a group is only partly here."""
    return beta * groups.mean(advantages * (error - base_error).detach())


def clip_where_done(
    error: Tensor, old_error: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Stops the gradient of samples that moved by ``clip`` in their own direction: where
    ``exp(d_old - d)`` is above ``1 + clip`` (A > 0) or below ``1 - clip`` (A <= 0).
    Returns the errors ``[B]``, their values unchanged, and a bool ``[B]``, True where stopped."""
    moved = torch.expm1(old_error - error).detach()  # keeps the digits that exp(.) - 1 would lose
    done = torch.where(advantages > 0, moved > clip, moved < -clip)
    return torch.where(done, error.detach(), error), done


def dgpo_loss(error: Tensor, advantages: Tensor, weights: Tensor, beta: float | None) -> Tensor:
    """``mean_i(sg[w_i] A_i d_i)``, all ``[B]``, as in the published runs if ``beta`` is None. Else
    the value and the gradient of (1) averaged over groups (S is held to 16 in the value)."""
    published = (weights.detach() * advantages * error).mean()
    value = -torch.log1p(-weights.detach().clamp(max=1 - 1e-7)).mean()  # sigmoid(-S) = 1 - w
    return published if beta is None else value + beta * (published - published.detach())


class DGPO(GuidedKl, NormalizedRewards, Algorithm):
    """DGPO; with ``reference="ema"`` the EMA-reference mode of TDM-R1 (arXiv 2603.07700).
    Differs from the paper: the default loss drops the factor beta, as the published runs do."""

    name: ClassVar[str] = "dgpo"
    # beta is smaller than the published 100: a margin far below zero means a satisfied group, whose
    # weight, sigmoid(S), is nothing
    contract: ClassVar[Contract] = Contract(
        terms={"beta": 7, "clip": 1e-3, "kl": 0.3},
        learns={
            "published": {"kl": 0.001, "beta": 3},
            "paper": {"kl": 0.001, "loss_scale": "paper", "beta": 10},
            "ema": {"kl": 0.001, "reference": "ema", "clip": None, "beta": 2000},
        },
    )
    beta: float = Field(default=100.0, gt=0)
    """Sharpness of the group preference."""
    clip: float | None = Field(default=1e-2, gt=0)
    """Trust region around the old policy; null turns it off."""
    loss_scale: Literal["reference", "paper"] = "reference"
    """reference: beta shapes the group weight only; paper: the gradient is beta times that."""
    reference: Literal["frozen", "ema"] = "frozen"
    """The baseline of the group margin: the frozen model or the old policy."""
    advantage_std: Literal["group", "batch"] = "group"
    """Rewards are divided by their deviation in the group or in the whole batch."""
    sample_weights: Literal["advantage", "uniform"] = "advantage"
    """The w of a group's reward: |A|, or the same for all of the better and for all of the worse
    samples, so that both halves still weigh the same."""
    old_decay_max: float = Field(default=0.3, ge=0, lt=1)
    """Largest decay of the old policy's EMA."""
    old_decay_rate: float = Field(default=0.001, ge=0)
    """Growth of that decay with each optimizer step, from 0."""

    @property
    def snapshots(self) -> frozenset[Literal["ref", "old"]]:
        used: dict[Literal["ref", "old"], bool] = {
            "ref": self.reference == "frozen" or self.kl_reads_ref,
            "old": self.reference == "ema" or self.clip is not None,
        }
        return frozenset(name for name, needed in used.items() if needed)

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        normal = super().advantages(rewards, groups)
        return uniform_advantages(normal, groups) if self.sample_weights == "uniform" else normal

    def weights(self, points: Forward) -> Tensor:
        error = points.error(points.pred).detach()
        base = points.error(points.snapshot("ref" if self.reference == "frozen" else "old"))
        margin = group_margin(error, base, points.advantages.to(error), points.groups, self.beta)
        return points.groups.each(margin.sigmoid())

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        error = points.error(points.pred)
        advantages = points.advantages.to(error)
        weights = self.weights(points) if points.weights is None else points.weights.to(error)
        metrics = {"error": error, "weight": weights, "margin": weights.logit(1e-7)}
        if self.clip is not None:
            old_error = points.error(points.snapshot("old"))
            error, done = clip_where_done(error, old_error, advantages, self.clip)
            metrics["clipped"] = done.to(error)
        beta = self.beta if self.loss_scale == "paper" else None
        loss = dgpo_loss(error, advantages, weights, beta)
        if (kl := self.kl_term(points)) is not None:
            metrics["kl"] = kl
            loss = loss + self.kl * kl.mean()
        return loss, {name: value.detach().mean() for name, value in metrics.items()}

    def old_decay(self, step: int) -> float:
        return min(self.old_decay_max, self.old_decay_rate * step)
