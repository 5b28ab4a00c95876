"""Settings that several algorithms have, with what they mean."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dgpo.core.groups import Groups
from dgpo.core.points import Forward
from dgpo.core.precision import mean_square
from dgpo.settings import Settings


def uniform_advantages(advantages: Tensor, groups: Groups) -> Tensor:
    """``G/(2 |G+|)`` where A > 0 and ``-G/(2 |G-|)`` elsewhere, ``[B]`` to ``[B]``: weights without
    the sizes of A that sum to zero in each group, as log Z needs; 0 in a group with all A = 0."""
    better = (advantages > 0).to(advantages)
    count = groups.sum(better)
    halves = groups.size / (2 * torch.stack([groups.size - count, count]).clamp(min=1))
    worse, good = (groups.each(half) for half in halves)
    signed = torch.where(better > 0, good, -worse)
    return torch.where(groups.each(count > 0), signed, 0)


class NormalizedRewards(Settings):
    """Advantages ``A = (r - mean_group) / (std + 1e-4)``, clamped."""

    advantage_std: Literal["group", "batch"] = "batch"
    """Rewards are divided by their deviation in the group or in the whole batch."""
    advantage_max: float = Field(default=5.0, gt=0)
    """Advantages are clamped to this absolute value."""

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Rewards ``[B]`` of whole groups to advantages ``[B]``."""
        normal = groups.normalize(rewards, self.advantage_std, eps=1e-4)
        return normal.clamp(-self.advantage_max, self.advantage_max)


class GuidedKl(Settings):
    """A KL term with the frozen reference, which may have guidance."""

    kl: float = Field(default=0.02, ge=0)
    """Weight of mean (v - v_ref)^2 with the frozen reference."""
    kl_cfg: float = Field(default=1.0, ge=1)
    """Guidance scale of v_ref in the KL term; 1 is no guidance."""

    @property
    def kl_guidance(self) -> float | None:
        return self.kl_cfg if self.kl > 0 and self.kl_cfg != 1 else None

    @property
    def kl_reads_ref(self) -> bool:
        """Whether the term is about the reference without guidance, ``Forward.ref``."""
        return self.kl > 0 and self.kl_guidance is None

    def kl_term(self, points: Forward) -> Tensor | None:
        """``mean (v - v_ref)^2`` of each sample, ``[B]``; None if its weight is 0."""
        if self.kl == 0:
            return None
        reference = points.snapshot("ref" if self.kl_reads_ref else "kl_ref")
        return mean_square(points.pred, reference.detach())
