"""What the policy gradients on trajectories share: a surrogate of each step, and the KL term."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import TrajectoryAlgorithm
from dgpo.algorithms.shared import NormalizedRewards
from dgpo.algorithms.surrogate import clipped_surrogate, stopped_by_clip
from dgpo.core.points import Trajectory
from dgpo.core.precision import mean_square
from dgpo.core.sde import Moments


def ppo(log_ratio: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's terms of ``r = exp(log_ratio)``, all ``[B]``, the ratio, and where the clip stopped the
    gradient."""
    ratio = log_ratio.exp()
    figures = {"ratio": ratio, "clipped": stopped_by_clip(ratio, advantages, clip)}
    return clipped_surrogate(ratio, advantages, clip), figures


class PolicyGradient(NormalizedRewards, TrajectoryAlgorithm):
    """Advantages of groups, a surrogate for each step, and a KL term."""

    kl: float = Field(default=0.04, ge=0)
    """Weight of ``mean (mu - mu_ref)^2 / (2 rate^2)``, the divergence from the frozen model's step
    per unit of time."""
    advantage_std: Literal["group", "batch"] = "group"
    """Rewards are divided by their deviation in the group or in the whole batch."""

    @property
    def snapshots(self) -> frozenset[Literal["ref"]]:
        return frozenset(("ref",) if self.kl > 0 else ())

    @abstractmethod
    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms ``[B]`` whose gradient is the policy's, and figures ``[B]``.

        Args:
            points: one step of the rollouts.
            now: the step the policy would make.
            old: the step that was made; without gradients.
            advantages: ``[B]``, in the precision of the moments.
        """

    def loss(self, points: Trajectory) -> tuple[Tensor, dict[str, Tensor]]:
        now, old = points.moments(points.pred), points.moments(points.old.detach())
        terms, metrics = self.surrogate(points, now, old, points.advantages.to(now.mean))
        loss = terms.mean()
        if self.kl > 0:
            reference = points.moments(points.reference().detach())
            metrics["kl"] = mean_square(now.mean, reference.mean) / (2 * now.rate**2)
            loss = loss + self.kl * metrics["kl"].mean()
        return loss, {name: value.detach().mean() for name, value in metrics.items()}
