"""Several algorithms share these settings and what they mean."""

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
    """Return weights ``[B]`` that keep only the sign of the advantages ``[B]``.

    They are ``G/(2 |G+|)`` where A > 0 and ``-G/(2 |G-|)`` elsewhere, so that they sum to zero in
    each group, as log Z needs; a group without an A > 0 gets 0.

    >>> uniform_advantages(torch.tensor([3.0, -1.0, -1.0, -1.0]), Groups.contiguous(1, 4))
    tensor([ 2.0000, -0.6667, -0.6667, -0.6667])
    """
    better = (advantages > 0).to(advantages)
    count = groups.sum(better)
    halves = groups.size / (2 * torch.stack([groups.size - count, count]).clamp(min=1))
    worse, good = (groups.each(half) for half in halves)
    signed = torch.where(better > 0, good, -worse)
    return torch.where(groups.each(count > 0), signed, 0)


class NormalizedRewards(Settings):
    """The advantages are ``A = (r - mean_group) / std``, clamped.

    Differs from the papers: published code divides by ``std + 1e-4``; what is added here is 1e-4 of
    the deviation within all groups, so that the reward's unit does not matter
    (:meth:`~dgpo.core.groups.Groups.normalize`).
    """

    advantage_std: Literal["group", "batch"] = "batch"
    """Which deviation divides the rewards: the one in their group or in the whole batch."""
    advantage_max: float = Field(default=5.0, gt=0)
    """The largest absolute value of an advantage; larger ones are clamped."""

    def advantages(self, rewards: Tensor, groups: Groups) -> Tensor:
        """Turn the rewards ``[B]`` of whole groups into advantages ``[B]``."""
        normal = groups.normalize(rewards, self.advantage_std)
        return normal.clamp(-self.advantage_max, self.advantage_max)


class GuidedKl(Settings):
    """The loss has a KL term with the frozen reference, which may have guidance."""

    kl: float = Field(default=0.02, ge=0)
    """The weight of mean (v - v_ref)^2 with the frozen reference."""
    kl_cfg: float = Field(default=1.0, ge=1)
    """The guidance scale of v_ref in the KL term; 1 is no guidance."""

    @property
    def kl_guidance(self) -> float | None:
        """Return ``kl_cfg`` if the term needs guidance, else None."""
        return self.kl_cfg if self.kl > 0 and self.kl_cfg != 1 else None

    @property
    def kl_reads_ref(self) -> bool:
        """Return whether the term reads the reference without guidance, ``Forward.ref``."""
        return self.kl > 0 and self.kl_guidance is None

    def kl_term(self, points: Forward) -> Tensor | None:
        """Return ``mean (v - v_ref)^2`` of each sample, ``[B]``; None if its weight is 0."""
        if self.kl == 0:
            return None
        reference = points.snapshot("ref" if self.kl_reads_ref else "kl_ref")
        return mean_square(points.pred, reference.detach())
