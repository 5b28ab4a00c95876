"""Flow-DPPO puts a trust region on the divergence of a step, not on its ratio (arXiv 2606.11025).

    loss = mean_i -A_i r_i,      r_i = exp(log p - log p_old)                                    (1)
A term has no gradient where ``mean |mu - mu_old|^2 / (2 std^2) >= tau`` and the gradient would take
the step further out (A > 0 and r > 1, or A < 0 and r < 1). The ratio of one sample is a noisy
sign of how far the policy has moved; the divergence is exact and costs nothing here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.policy_gradient import PolicyGradient
from dgpo.core.points import Trajectory
from dgpo.core.sde import Moments


class FlowDPPO(PolicyGradient):
    """Flow-DPPO stops a step that has diverged from the one that was made.

    >>> sorted(FlowDPPO(tau=1e-5).snapshots)
    ['ref']
    """

    name: ClassVar[str] = "flow_dppo"
    contract: ClassVar[Contract] = Contract(
        terms={"tau": 0.1}, learns={"flow": {"tau": 0.02, "kl": 1e-3}}
    )
    tau: float = Field(default=1e-5, gt=0)
    """The largest divergence from the step that was made, the mean over dimensions."""

    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (points.log_prob(now) - points.log_prob(old)).exp()
        divergence = now.kl(old).detach()
        outwards = torch.where(advantages > 0, ratio > 1, ratio < 1)
        stopped = (divergence >= self.tau) & outwards
        terms = -advantages * torch.where(stopped, ratio.detach(), ratio)
        return terms, {"ratio": ratio, "divergence": divergence, "clipped": stopped.to(ratio)}
