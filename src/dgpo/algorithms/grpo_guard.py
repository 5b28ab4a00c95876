"""GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via Regulated Clipping
(arXiv 2510.22319).

For a Gaussian step, log p - log p_old has the mean -b under the old policy and a deviation that
falls with the step's std, so that one clip range fits no two steps. GRPO-Guard takes
    r_i = exp((log p - log p_old + b) std),      b = mean |mu - mu_old|^2 / (2 std^2)            (1)
which is centred and alike at every step, and divides the surrogate by ``-dt``, by which the
gradient of mu is longer at noisy steps.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.policy_gradient import PolicyGradient, ppo
from dgpo.core.points import Trajectory
from dgpo.core.sde import Moments


class GRPOGuard(PolicyGradient):
    """GRPO-Guard, for samplers whose log-probability is a Gaussian's."""

    name: ClassVar[str] = "grpo_guard"
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.1}, learns={"flow": {"clip": 0.1, "kl": 1e-3}}
    )
    sde_kinds: ClassVar[tuple[str, ...]] = ("flow", "dance")
    clip: float = Field(default=1e-4, gt=0, lt=1)
    """Largest change of the normalised ratio (1). Its logarithm is that of Flow-GRPO times std."""

    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = points.log_prob(now) - points.log_prob(old)
        centred = (log_ratio + now.kl(old)) * now.std
        terms, metrics = ppo(centred, advantages, self.clip)
        return terms / points.duration, metrics
