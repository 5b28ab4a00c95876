"""Online Diffusion-DPO (arXiv 2311.12908, eq. 14) on the best and the worst sample of each group.

    L = -log sigmoid(-(beta/2) [(d_w - d_w^ref) - (d_l - d_l^ref)])                         (1)
for the better sample w and the worse l, with one noise and one level for both. This is the loss of
DGPO for groups of two with A = +1 and -1, and is computed as such.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.dgpo import dgpo_loss, group_margin
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import widen


class DiffusionDPO(Algorithm):
    """Diffusion-DPO on pairs of the policy's own pictures.

    Differs from the paper: the pairs are not a fixed data set but the best and the worst of each
    group, and d is a mean over dimensions without a weight for the level, so that beta is 100
    where the paper, which counts the sum over levels, has thousands.
    """

    name: ClassVar[str] = "diffusion_dpo"
    contract: ClassVar[Contract] = Contract(terms={"beta": 7}, learns={"pairs": {"beta": 1}})
    beta: float = Field(default=100.0, gt=0)
    """Strength of the implicit KL to the reference; large values stay near it."""

    @property
    def snapshots(self) -> frozenset[Literal["ref", "old"]]:
        return frozenset(("ref",))

    @property
    def trained_per_group(self) -> int:
        return 2

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """+1 for the best of a group, -1 for the worst (of equals the first), else 0; all 0 in a
        group without spread, whose best is its worst."""
        best, worst = groups.rank(rewards) == 0, groups.rank(-rewards) == 0
        return best.to(widen(rewards)) - worst.to(widen(rewards))

    def weights(self, points: Forward) -> Tensor:
        error = points.error(points.pred).detach()
        base = points.error(points.snapshot("ref"))
        margin = group_margin(error, base, points.advantages.to(error), points.groups, self.beta)
        return points.groups.each(margin.sigmoid())

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        error = points.error(points.pred)
        weights = self.weights(points) if points.weights is None else points.weights.to(error)
        loss = dgpo_loss(error, points.advantages.to(error), weights, self.beta)
        metrics = {"error": error, "weight": weights, "margin": weights.logit(1e-7)}
        return loss, {name: value.detach().mean() for name, value in metrics.items()}

    def old_decay(self, step: int) -> float:
        return 0.0
