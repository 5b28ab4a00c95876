"""AWM is Advantage Weighted Matching (arXiv 2509.25050).

The denoising loss d at noise level s, tempered by a power p, stands for the log-likelihood of a
sample, and a policy gradient with PPO's clipped ratio is taken of it:
    logp = -(s/p) [(d + 1e-10)^p - (1e-10)^p]                                               (1)
    loss = mean_i max(-A_i r_i, -A_i clip(r_i, 1-c, 1+c)),    r = exp(logp - logp_old)      (2)
The old policy is the one that made the rollouts. At the first update of an iteration r = 1 and
the gradient is mean_i(-A_i grad logp_i), that is mean_i(A_i s (d_i + 1e-10)^(p-1) grad d_i).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm, SnapshotName
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.shared import NormalizedRewards
from dgpo.algorithms.surrogate import ppo
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import mean_square

FLOOR = 1e-10
"""Keeps the slope of (1) finite at a perfect prediction."""


def matching_logp(error: Tensor, noise_level: float, power: float) -> Tensor:
    """Return (1): ``d [B]`` to ``[B]``; 0 for a perfect prediction, else negative."""
    return -(noise_level / power) * ((error + FLOOR) ** power - FLOOR**power)


class AWM(NormalizedRewards, Algorithm):
    """AWM is a policy gradient whose likelihood is the denoising loss.

    Differs from the published runs: there is no second KL term, with an EMA of the policy (weight
    1, decay up to 0.3); the KL term here is the one with the frozen model.

    >>> import torch
    >>> algorithm = AWM(advantage_std="group")
    >>> algorithm.advantages(torch.tensor([0.0, 1.0]), Groups.contiguous(count=1, size=2))
    tensor([-0.2000,  0.2000])
    >>> sorted(algorithm.snapshots)
    ['old', 'ref']
    """

    name: ClassVar[str] = "awm"
    contract: ClassVar[Contract] = Contract(
        terms={"clip": 0.05, "kl": 0.3, "advantage_scale": 1.0},
        learns={"published": {}, "plain": {"power": 1.0, "clip": 0.2, "advantage_scale": 1.0}},
        each_level=True,
    )
    old_moves: ClassVar[Literal["step", "iteration"]] = "iteration"
    power: float = Field(default=0.25, gt=0, le=1)
    """The p of (1); 1 is the plain denoising loss, small values give small losses more weight."""
    clip: float | None = Field(default=1.0, gt=0)
    """The largest change of the ratio, in either direction; null turns the clip off."""
    kl: float = Field(default=3e-3, ge=0)
    """The weight of mean (v - v_ref)^2 with the frozen reference. Published: 3e-3 (GenEval, OCR)
    and 1e-4 (PickScore)."""
    advantage_scale: float = Field(default=0.2, gt=0)
    """Multiplies the advantages after the clamp; the published runs map 5 to 1."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        return frozenset(("old", "ref") if self.kl > 0 else ("old",))

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        return super().advantages(rewards, groups) * self.advantage_scale

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        error = points.error(points.pred)
        old_error = points.error(points.snapshot("old")).detach()
        level = points.process.noise_level(points.level)
        logp, old_logp = (matching_logp(d, level, self.power) for d in (error, old_error))
        terms, figures = ppo(logp - old_logp, points.advantages.to(logp), self.clip)
        loss, metrics = terms.mean(), {"error": error, **figures}
        if self.kl > 0:
            metrics["kl"] = mean_square(points.pred, points.snapshot("ref").detach())
            loss = loss + self.kl * metrics["kl"].mean()
        return loss, {name: value.detach().mean() for name, value in metrics.items()}
