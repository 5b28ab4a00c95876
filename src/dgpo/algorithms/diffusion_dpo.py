"""Online Diffusion-DPO (arXiv 2311.12908, eq. 14) trains on the best and worst of each group.

    L = -log sigmoid(-(beta/2) [(d_w - d_w^ref) - (d_l - d_l^ref)])                         (1)
for the better sample w and the worse l, with one noise and one level for both. It is computed as
what it equals: the loss of DGPO for groups of two with A = +1 and -1.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm, SnapshotName
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.dgpo import dgpo_loss, group_weights
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import widen


class DiffusionDPO(Algorithm):
    """Diffusion-DPO prefers the best picture of each group to the worst.

    Differs from the paper: the pairs are not a fixed data set but the policy's own pictures, and d
    is a mean over dimensions without a weight for the level, so that beta is 100 where the paper,
    which counts the sum over levels, has thousands.

    >>> import torch
    >>> rewards = torch.tensor([0.1, 0.9, 0.5, 0.7])
    >>> DiffusionDPO(beta=100).advantages(rewards, Groups.contiguous(count=1, size=4))
    tensor([-1.,  1.,  0.,  0.])
    """

    name: ClassVar[str] = "diffusion_dpo"
    contract: ClassVar[Contract] = Contract(terms={"beta": 7}, learns={"pairs": {"beta": 1}})
    beta: float = Field(default=100.0, gt=0)
    """The strength of the implicit KL to the reference; large values keep the policy near it."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        return frozenset(("ref",))

    @property
    def trained_per_group(self) -> int:
        return 2

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Return 1 for the best of a group, -1 for the worst (among equals the first), else 0.

        A group without spread, whose best is also its worst, gets 0.
        """
        best, worst = groups.rank(rewards) == 0, groups.rank(-rewards) == 0
        return best.to(widen(rewards)) - worst.to(widen(rewards))

    def weights(self, points: Forward) -> Tensor:
        return group_weights(points, "ref", self.beta)

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        error = points.error(points.pred)
        weights = self.weights(points) if points.weights is None else points.weights.to(error)
        loss = dgpo_loss(error, points.advantages.to(error), weights, self.beta)
        metrics = {"error": error, "weight": weights, "margin": weights.logit(1e-7)}
        return loss, {name: value.detach().mean() for name, value in metrics.items()}
