"""DGPO is Direct Group Preference Optimization (arXiv 2510.08425, ICLR 2026).

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

from dgpo.algorithms.base import Algorithm, SnapshotName
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.shared import GuidedKl, NormalizedRewards, uniform_advantages
from dgpo.core.groups import Groups
from dgpo.core.points import Forward


def group_margin(
    error: Tensor, base_error: Tensor, advantages: Tensor, groups: Groups, beta: float
) -> Tensor:
    """Return ``S_g`` of (1) without gradient: three ``[B]`` to ``[count]``.

    Raises:
        ValueError: a group is only partly here (in all processes together).
    """
    return beta * groups.mean(advantages * (error - base_error).detach())


def group_weights(
    points: Forward, baseline: Literal["ref", "old", "kl_ref"], beta: float
) -> Tensor:
    """Return each sample's detached group weight ``w`` of (2), ``[B]``, from whole groups."""
    error = points.error(points.pred).detach()
    base = points.error(points.snapshot(baseline))
    margin = group_margin(error, base, points.advantages.to(error), points.groups, beta)
    return points.groups.each(margin.sigmoid())


def clip_where_done(
    error: Tensor, old_error: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Stop the gradient of samples that have moved by ``clip`` in their own direction.

    They are those whose ``exp(d_old - d)`` is above ``1 + clip`` (A > 0) or below ``1 - clip``
    (A <= 0).

    Returns:
        The errors ``[B]`` with unchanged values, and a bool ``[B]``, True where stopped.
    """
    moved = torch.expm1(old_error - error).detach()  # keeps the digits that exp(.) - 1 would lose
    done = torch.where(advantages > 0, moved > clip, moved < -clip)
    return torch.where(done, error.detach(), error), done


def dgpo_loss(error: Tensor, advantages: Tensor, weights: Tensor, beta: float | None) -> Tensor:
    """Return the loss of samples ``[B]`` whose group weights are known.

    If ``beta`` is None it is ``mean_i(sg[w_i] A_i d_i)``, as in the published runs. Else it has the
    value and the gradient of (1), averaged over groups (the value limits S to 16).
    """
    published = (weights.detach() * advantages * error).mean()
    # two terms: the value of (1) without a gradient, and the gradient of (2) without a value
    value = -torch.log1p(-weights.detach().clamp(max=1 - 1e-7)).mean()  # sigmoid(-S) = 1 - w
    return published if beta is None else value + beta * (published - published.detach())


class DGPO(GuidedKl, NormalizedRewards, Algorithm):
    """DGPO trains on all samples of a group, the better ones up and the worse ones down.

    With ``reference="ema"`` it is the EMA-reference mode of TDM-R1 (arXiv 2603.07700). Differs from
    the paper: the default loss drops the factor beta, as the published runs do.

    >>> algorithm = DGPO(beta=50, clip=None)
    >>> sorted(algorithm.snapshots)  # no trust region, so no old policy
    ['ref']
    >>> rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])
    >>> algorithm.advantages(rewards, Groups.contiguous(count=1, size=4))
    tensor([-0.9999,  0.9999,  0.9999, -0.9999])
    """

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
    """How sharp the preference is: how soon a well ordered group stops counting."""
    clip: float | None = Field(default=1e-2, gt=0)
    """The trust region around the old policy; null turns it off."""
    loss_scale: Literal["reference", "paper"] = "reference"
    """What beta scales: the group weight alone (reference), or the gradient too (paper)."""
    reference: Literal["frozen", "ema"] = "frozen"
    """The baseline of the group margin: the frozen model or the old policy."""
    baseline: Literal["guided", "plain"] = "guided"
    """The prediction of the frozen model that the margin compares with: the one with guidance
    kl_cfg, which also serves the KL term (guided, as in the published runs), or the one without
    guidance (plain), a forward pass more. With kl_cfg 1 both are the same."""
    equal_groups: Literal["kl", "skip"] = "kl"
    """What becomes of groups whose rewards are all equal: their KL term is trained (kl, as in the
    published runs), or they are left out and cost no forward pass (skip). With kl 0 they are left
    out."""
    advantage_std: Literal["group", "batch"] = "group"
    """Which deviation divides the rewards: the one in their group or in the whole batch."""
    sample_weights: Literal["advantage", "uniform"] = "advantage"
    """How much each sample counts: by its |A|, or equally among the better and among the worse
    samples, so that both halves weigh the same."""
    old_decay_max: float = Field(default=0.3, ge=0, lt=1)
    """The largest decay of the old policy's EMA."""
    old_decay_rate: float = Field(default=0.001, ge=0)
    """How much that decay grows with each optimiser step, from 0."""

    @property
    def _margin_reads(self) -> Literal["ref", "old", "kl_ref"]:
        """Name the prediction that the margin compares with."""
        if self.reference == "ema":
            return "old"
        return "kl_ref" if self.baseline == "guided" and self.kl_cfg != 1 else "ref"

    @property
    def kl_guidance(self) -> float | None:
        return self.kl_cfg if self._margin_reads == "kl_ref" else super().kl_guidance

    @property
    def trains_equal_groups(self) -> bool:
        return self.equal_groups == "kl" and self.kl > 0

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        used: dict[SnapshotName, bool] = {
            "ref": self._margin_reads == "ref" or self.kl_reads_ref,
            "old": self._margin_reads == "old" or self.clip is not None,
        }
        return frozenset(name for name, needed in used.items() if needed)

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        normal = super().advantages(rewards, groups)
        return uniform_advantages(normal, groups) if self.sample_weights == "uniform" else normal

    def weights(self, points: Forward) -> Tensor:
        return group_weights(points, self._margin_reads, self.beta)

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
