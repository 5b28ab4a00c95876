"""GRPO-Guard regulates the clip of Flow-GRPO, so that one range fits all steps (arXiv 2510.22319).

For a Gaussian step, log p - log p_old has the mean -b under the old policy and a deviation that
falls with the step's std, so that no two steps need the same clip range. GRPO-Guard takes
    r_i = exp((log p - log p_old + b) std),      b = mean |mu - mu_old|^2 / (2 std^2)            (1)
which is centred and alike at every step. It divides the surrogate by ``-dt``, because the gradient
of mu is longer by this factor at noisy steps.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.policy_gradient import PolicyGradient
from dgpo.algorithms.surrogate import ppo
from dgpo.core.points import Trajectory
from dgpo.core.sde import Moments


class GRPOGuard(PolicyGradient):
    """GRPO-Guard needs a sampler whose log-probability is that of a Gaussian.

    >>> GRPOGuard(sde={"kind": "cps"})
    Traceback (most recent call last):
    dgpo.errors.UserError: GRPOGuard: algorithm.sde.kind = 'cps': grpo_guard takes flow, dance
    """

    name: ClassVar[str] = "grpo_guard"
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.1}, learns={"flow": {"clip": 0.1, "kl": 1e-3}}
    )
    sde_kinds: ClassVar[tuple[str, ...]] = ("flow", "dance")
    clip: float = Field(default=1e-4, gt=0, lt=1)
    """The largest change of the ratio (1), whose logarithm is Flow-GRPO's times std."""

    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = points.log_prob(now) - points.log_prob(old)
        centred = (log_ratio + now.kl(old)) * now.std
        terms, metrics = ppo(centred, advantages, self.clip)
        return terms / points.duration, metrics
