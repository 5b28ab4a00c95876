"""CRD is Centered Reward Distillation (arXiv 2603.14128).

The policy's implicit reward is fitted to the true one. Its unknown constant log Z is the same for
all samples of a prompt, so both are centred within their group:
    L = mean_i e_i^2,    e_i = (r_i - mean_g r) - (q_i - mean_g q)                          (1)
    r = -(d - d_old),    q = A/(2m) + 1/2,  |A| <= m                                        (2)
The residuals e of a group sum to zero, so the means' own gradients cancel and
    grad L = mean_i 2 e_i grad r_i                                                          (3)
With e detached and taken from whole groups this is a mean over SAMPLES: micro-batches and
processes add exactly. A group with A = 0 has no gradient where the policy is the old one (e = 0);
elsewhere it pulls differences of d - d_old within the group back to zero.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm, SnapshotName
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.shared import GuidedKl, NormalizedRewards
from dgpo.core.groups import Groups
from dgpo.core.points import Forward


def centred_residual(reward: Tensor, wanted: Tensor, groups: Groups) -> Tensor:
    """Return ``e`` of (1) without gradient: two ``[B]`` to ``[B]``.

    Raises:
        ValueError: a group is only partly here (in all processes together).
    """
    gap = (reward - wanted).detach()
    return gap - groups.each(groups.mean(gap))


def crd_loss(reward: Tensor, residual: Tensor) -> Tensor:
    """Return the value of (1) with the gradient of (3), from ``r [B]`` and detached ``e [B]``."""
    moved = 2 * residual * (reward - reward.detach())  # zero in value
    return (residual.square() + moved).mean()


class CRD(GuidedKl, NormalizedRewards, Algorithm):
    """CRD fits the policy's implicit reward to the true one, within each group.

    Differs from the paper: the weight of the KL term is constant, not adapted to the reward, and
    the pictures are the policy's own; the paper's come from a second EMA, which is the policy
    itself for the first 75 iterations.

    >>> algorithm = CRD()
    >>> sorted(algorithm.snapshots), algorithm.kl_guidance
    (['old'], 4.5)
    >>> [algorithm.old_decay(iteration) for iteration in (0, 50, 500)]
    [0.25, 0.5, 0.999]
    """

    name: ClassVar[str] = "crd"
    contract: ClassVar[Contract] = Contract(
        terms={"kl": 0.3},
        learns={"guided": {"kl": 0.001}, "unguided": {"kl": 0.001, "kl_cfg": 1.0}},
        pulls_to_old=True,  # a target of 0
    )
    old_moves: ClassVar[Literal["step", "iteration"]] = "iteration"
    kl: float = Field(default=0.1, ge=0)
    """The weight of mean (v - v_ref)^2 with the frozen reference."""
    kl_cfg: float = Field(default=4.5, ge=1)
    """The guidance scale of v_ref in the KL term; 1 is no guidance."""
    advantage_max: float = Field(default=5.0, gt=0)
    """The m of (2), the largest absolute value of an advantage; larger ones are clamped."""
    old_decay_start: float = Field(default=0.25, ge=0, lt=1)
    """The decay of the old policy's EMA after the first iteration."""
    old_decay_rate: float = Field(default=0.005, ge=0)
    """How much that decay grows with each iteration."""
    old_decay_max: float = Field(default=0.999, ge=0, lt=1)
    """The largest decay of the old policy's EMA."""

    @property
    def snapshots(self) -> frozenset[SnapshotName]:
        return frozenset(("old", "ref") if self.kl_reads_ref else ("old",))

    def weights(self, points: Forward) -> Tensor:
        reward = self._reward(points)
        wanted = points.advantages.to(reward) / (2 * self.advantage_max)  # centring takes the 1/2
        return centred_residual(reward, wanted, points.groups)

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        reward = self._reward(points)
        residual = self.weights(points) if points.weights is None else points.weights.to(reward)
        loss = crd_loss(reward, residual)
        metrics = {
            "error": points.error(points.pred),
            "implicit_reward": reward,
            "residual": residual.abs(),
        }
        if (kl := self.kl_term(points)) is not None:
            metrics["kl"] = kl
            loss = loss + self.kl * kl.mean()
        return loss, {name: value.detach().mean() for name, value in metrics.items()}

    def old_decay(self, step: int) -> float:
        return min(self.old_decay_start + self.old_decay_rate * step, self.old_decay_max)

    def _reward(self, points: Forward) -> Tensor:
        """Return r of (2), ``[B]``."""
        return points.error(points.snapshot("old")).detach() - points.error(points.pred)
