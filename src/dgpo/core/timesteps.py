"""A choice of timesteps says which noise levels of the rollout's own schedule are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dgpo.core.process import Level
from dgpo.errors import UserError


class TimestepChoice(BaseModel):
    """A ``TimestepChoice`` draws levels without replacement from the noisier part of the schedule.

    All samples of an iteration share the draw. Give ``indices`` or ``t_min``, not both; with
    ``indices=None`` and ``t_min=None`` every level may be drawn.

    Source: DGPO (arXiv 2510.08425), timestep clip. Differs from the paper: the paper states the
    clip as a smallest noise level, the published runs use indices 0..6 (OCR, PickScore) or 0..4
    (GenEval) of a 10-step schedule; both ways are offered and the default is 0..6.

    >>> levels = [Level(torch.tensor(1000.0 * s), s) for s in (1.0, 0.75, 0.5, 0.25)]
    >>> choice = TimestepChoice(count=2, t_min=0.6)
    >>> sorted(choice.choose(levels, torch.Generator()))
    [0, 1]
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    count: int = Field(default=4, ge=1)
    """How many levels are trained in one iteration."""
    indices: tuple[int, int] | None = (0, 6)
    """The first and the last level of the rollout's schedule that may be drawn, both included; 0 is
    the noisiest."""
    t_min: float | None = Field(default=None, ge=0, lt=1)
    """The smallest noise level that may be drawn, in sigma."""

    @model_validator(mode="before")
    @classmethod
    def _t_min_replaces_the_default_indices(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("t_min") is not None:
            return {"indices": None, **data}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> TimestepChoice:
        if self.indices is None:
            return self
        first, last = self.indices
        if self.t_min is not None:
            raise ValueError(
                f"give timesteps.indices or timesteps.t_min, not both (got {[first, last]} and "
                f"{self.t_min}); set the other to null"
            )
        if not 0 <= first <= last:
            raise ValueError(
                f"timesteps.indices must be [first, last], 0 <= first <= last; got {[first, last]}"
            )
        if last - first + 1 < self.count:
            raise ValueError(
                f"timesteps.indices {[first, last]} hold {last - first + 1} levels, fewer than "
                f"timesteps.count={self.count}; they are drawn without replacement"
            )
        return self

    def choose(self, levels: Sequence[Level], generator: torch.Generator) -> list[int]:
        """Draw ``count`` distinct indices into ``levels``, in random order.

        Args:
            levels: the rollout's schedule, noisiest first. If its sigmas rise, the schedule is
                inverted and its noise level is ``1 - sigma``.
            generator: seeded alike in every process, so that all draw the same levels.

        Raises:
            UserError: the schedule has too few levels that may be drawn.
        """
        allowed = self._allowed(levels)
        if len(allowed) < self.count:
            limit = f"t_min={self.t_min}" if self.t_min is not None else "the schedule"
            raise UserError(
                f"{limit} leaves {len(allowed)} of {len(levels)} levels, fewer than "
                f"timesteps.count={self.count}: lower algorithm.timesteps.count or t_min, or raise "
                "rollout.steps"
            )
        order = torch.randperm(len(allowed), generator=generator, device=generator.device)
        return [allowed[i] for i in order[: self.count].tolist()]

    def _allowed(self, levels: Sequence[Level]) -> list[int]:
        if self.indices is not None:
            first, last = self.indices
            if last >= len(levels):
                raise UserError(
                    f"algorithm.timesteps.indices={[first, last]} reach beyond the rollout's "
                    f"{len(levels)} levels (0..{len(levels) - 1}): lower the last index or raise "
                    "rollout.steps"
                )
            return list(range(first, last + 1))
        if self.t_min is None:
            return list(range(len(levels)))
        inverted = len(levels) > 1 and levels[0].sigma < levels[-1].sigma
        noise = [1 - level.sigma if inverted else level.sigma for level in levels]
        return [i for i, sigma in enumerate(noise) if sigma >= self.t_min]
