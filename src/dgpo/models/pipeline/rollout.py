"""What one call of a pipeline makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dgpo.core.process import Level
from dgpo.models.pipeline.probes import Step


@dataclass(frozen=True)
class Rollout:
    """A ``Rollout`` holds pictures, and what training needs to know about how they were made.

    Args:
        x0: [B, ...], the last sample that the scheduler returned, in the denoiser's input space.
        images: B pictures, :class:`~dgpo.media.Video` or :class:`~dgpo.media.Sound`, or
            :class:`~dgpo.media.Lost` in the place of one; None if they were not decoded.
        levels: the noise levels of the schedule, from noise to data, each once.
        steps: the scheduler steps that were recorded, with their tensors.
    """

    x0: Tensor
    images: list[Any] | None
    levels: list[Level]
    steps: list[Step] = field(default_factory=list)
