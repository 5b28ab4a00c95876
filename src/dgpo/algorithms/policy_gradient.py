"""The policy gradients on trajectories share the advantages, the KL term and the metrics."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import SnapshotName, TrajectoryAlgorithm
from dgpo.algorithms.shared import NormalizedRewards
from dgpo.core.points import Trajectory
from dgpo.core.precision import mean_square
from dgpo.core.sde import Moments


class PolicyGradient(NormalizedRewards, TrajectoryAlgorithm):
    """A ``PolicyGradient`` minimises a surrogate for each step of the rollout, and a KL term."""

    kl: float = Field(default=0.04, ge=0)
    """The weight of ``mean (mu - mu_ref)^2 / (2 rate^2)``, the divergence from the frozen model's
    step per unit of time."""
    advantage_std: Literal["group", "batch"] = "group"
    """Which deviation divides the rewards: the one in their group or in the whole batch."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        return frozenset(("ref",) if self.kl > 0 else ())

    @abstractmethod
    def surrogate(
        self, points: Trajectory, now: Moments, old: Moments, advantages: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return terms ``[B]``, whose mean is minimised, and figures ``[B]`` to report.

        Args:
            points: one step of the rollouts.
            now: the step that the policy would make now.
            old: the step as it was made, without gradients.
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
