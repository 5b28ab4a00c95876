"""RWR is reward-weighted regression (Peters and Schaal, ICML 2007; for diffusion models arXiv
2302.12192 and, as a baseline, 2305.13301).

    L = mean_i w_i d_i,    w_i = G softmax_g(z/T)_i                                         (1)
with z the rewards normalised within the group and T the temperature. The weights are positive and
their mean over a group is 1: T to infinity is supervised fine-tuning on all samples, T to 0 on the
best one. Bad samples are trained less, never pushed away.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import widen


def weighted_regression(points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``mean_i A_i d_i``, with the advantages as weights, and its metrics."""
    error = points.error(points.pred)
    loss = (points.advantages.to(error) * error).mean()
    return loss, {"error": error.detach().mean()}


class RWR(Algorithm):
    """RWR is a regression on the policy's own pictures, weighted by their rewards.

    The advantage of a sample is its weight w itself, so the loss needs no snapshot and no group
    statistic. Differs from the definition: a group without spread, whose weights would all be 1, is
    left out, as for every algorithm here; its advantages are 0.

    >>> weights = RWR(temperature=0.5).advantages(torch.tensor([0.0, 1.0]), Groups.contiguous(1, 2))
    >>> weights, weights.mean()
    (tensor([0.0360, 1.9640]), tensor(1.))
    """

    name: ClassVar[str] = "rwr"
    contract: ClassVar[Contract] = Contract(
        terms={"temperature": 0.5}, learns={"warm": {}, "cold": {"temperature": 0.3}}
    )
    temperature: float = Field(default=1.0, ge=0.01)
    """The temperature T of (1), in deviations of the reward."""
    advantage_std: Literal["group", "batch"] = "group"
    """Which deviation divides the rewards: the one in their group or in the whole batch."""
    advantage_max: float = Field(default=5.0, gt=0, le=7)
    """The largest absolute value of a normalised reward; larger ones are clamped."""

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        normal = groups.normalize(rewards, self.advantage_std).double()
        # no largest is subtracted, which sums cannot find: exp(7 / 0.01) is finite in float64
        odds = (normal.clamp(-self.advantage_max, self.advantage_max) / self.temperature).exp()
        weights = odds / groups.each(groups.mean(odds))
        weights = torch.where(groups.each(groups.spread(rewards)), weights, 0)
        return weights.to(widen(rewards).dtype)

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted_regression(points)
