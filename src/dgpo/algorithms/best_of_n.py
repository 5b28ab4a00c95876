"""Best of n is supervised fine-tuning on the best samples of each group (rejection sampling
fine-tuning, as in RAFT, arXiv 2304.06767).

    L = mean of d over the k best of every group
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dgpo.algorithms.base import Algorithm
from dgpo.algorithms.contract import Contract
from dgpo.algorithms.rwr import weighted_regression
from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import widen


class BestOfN(Algorithm):
    """Best of n fine-tunes on the policy's own best pictures; the others cost no forward pass.

    A group without spread has no best picture: it is left out, and its advantages are 0.

    >>> import torch
    >>> rewards = torch.tensor([0.1, 0.9, 0.5, 0.7])
    >>> BestOfN(top_k=2).advantages(rewards, Groups.contiguous(count=1, size=4))
    tensor([0., 1., 0., 1.])
    """

    name: ClassVar[str] = "best_of_n"
    contract: ClassVar[Contract] = Contract(
        terms={"top_k": 2}, learns={"best": {}, "quarter": {"top_k": 4}}
    )
    top_k: int = Field(default=1, ge=1)
    """How many samples of each group are trained; ``group_size`` is the n."""

    @property
    def trained_per_group(self) -> int:
        return self.top_k

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Return 1 for the best ``top_k`` of a group (among equals the first), else 0."""
        chosen = (groups.rank(rewards) < self.top_k) & groups.each(groups.spread(rewards))
        return chosen.to(widen(rewards))

    def loss(self, points: Forward) -> tuple[Tensor, dict[str, Tensor]]:
        return weighted_regression(points)
