"""Best of n: supervised fine-tuning on the best samples of each group (rejection sampling
fine-tuning, as in RAFT, arXiv 2304.06767).

    L = mean of d over the k best of every group
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.rwr import weighted_regression
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import widen


class BestOfN(Algorithm):
    """Fine-tuning on the policy's own best pictures; the others cost no forward pass.

    A group without spread has no best picture: it is left out, and its advantages are 0.
    """

    name: ClassVar[str] = "best_of_n"
    contract: ClassVar[Contract] = Contract(
        terms={"top_k": 2}, learns={"best": {}, "quarter": {"top_k": 4}}
    )
    top_k: int = Field(default=1, ge=1)
    """How many samples of each group are trained; the n is ``group_size``."""

    @property
    def snapshots(self) -> frozenset[Literal["ref", "old"]]:
        return frozenset()

    @property
    def trained_per_group(self) -> int:
        return self.top_k

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """1 for the best ``top_k`` of a group (of equals the first), else 0."""
        chosen = (groups.rank(rewards) < self.top_k) & groups.each(groups.spread(rewards))
        return chosen.to(widen(rewards))

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted_regression(points)

    def old_decay(self, step: int) -> float:
        return 0.0
