"""DDPO: Training Diffusion Models with Reinforcement Learning (arXiv 2305.13301).

PPO on the log-densities of DDIM's steps with noise, for models that predict noise or v; the
importance-sampling estimator of the paper, section 4.3.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.contract import Contract
from dgpo.algorithms.policy_gradient import PolicyGradient, ppo
from dgpo.core.points import Trajectory
from dgpo.core.sde import DDIM, AnySde, Moments


class DDPO(PolicyGradient):
    """DDPO. Differs from the paper: advantages are normalised in the iteration's groups rather than
    by running statistics of each prompt; the last step is deterministic and not trained."""

    name: ClassVar[str] = "ddpo"
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.1, "kl": 0.02}, learns={"ddim": {"clip": 0.1}}
    )
    sde_kinds: ClassVar[tuple[str, ...]] = ("ddim",)
    sde: AnySde = DDIM()
    """The sampler of the rollouts; eta 1 is that of DDPM."""
    clip: float = Field(default=1e-4, gt=0, lt=1)
    """Largest change of the ratio, in either direction."""
    kl: float = Field(default=0.0, ge=0)
    """Weight of ``mean (mu - mu_ref)^2 / (2 std^2)``; the paper has none."""

    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_ratio = points.log_prob(now) - points.log_prob(old)
        return ppo(log_ratio, advantages, self.clip)
