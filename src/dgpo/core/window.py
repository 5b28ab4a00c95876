"""The window says which steps of a rollout add noise and are trained; the rest follow the ODE."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dgpo.core.seeds import stream
from dgpo.errors import UserError


class StepWindow(BaseModel):
    """A ``StepWindow`` covers a few neighbouring steps and moves from time to time.

    Sources: MixGRPO (arXiv 2507.21802), whose window slides, and Flow-GRPO-Fast, whose window is
    drawn anew for every iteration. Differs from MixGRPO: the window never grows shorter at the end
    of the rollout; as in the published runs it slides by one step and then begins again.

    >>> window = StepWindow(size=2, mode="sliding")
    >>> [list(window.place(steps=5, iteration=i, seed=0)) for i in range(4)]
    [[0, 1], [1, 2], [2, 3], [0, 1]]
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    size: int = Field(default=2, ge=1)
    """How many steps the window covers."""
    mode: Literal["random", "sliding"] = "random"
    """How the window moves: random draws a new place, sliding goes from the first to the last and
    begins again."""
    every: int = Field(default=1, ge=1)
    """How many iterations share a place."""
    first: int = Field(default=0, ge=0)
    """The earliest step that the window may cover; 0 is the noisiest."""
    last: int | None = Field(default=None, ge=0)
    """The latest step that the window may cover; null: the last but one, the last with noise."""

    @model_validator(mode="after")
    def _holds_its_steps(self) -> StepWindow:
        if self.last is not None and self.last - self.first + 1 < self.size:
            raise ValueError(
                f"algorithm.window.first = {self.first} to last = {self.last} hold fewer than "
                f"window.size = {self.size} steps; widen them or lower window.size"
            )
        return self

    def problem(self, steps: int) -> str | None:
        """Say why the window does not fit a rollout of so many steps; return None if it fits."""
        last = steps - 2 if self.last is None else self.last
        if last > steps - 2:
            return (
                f"algorithm.window.last = {last}: rollout.steps = {steps} has noise in steps 0 to "
                f"{steps - 2} (the very last is deterministic); lower it or raise rollout.steps"
            )
        if last - self.first + 1 < self.size:
            return (
                f"algorithm.window.size = {self.size}: rollout.steps = {steps} leaves "
                f"{max(0, last - self.first + 1)} steps from {self.first} on; lower it or "
                "raise rollout.steps"
            )
        return None

    def place(self, steps: int, iteration: int, seed: int) -> range:
        """Return the steps of one iteration, the same in every process.

        Args:
            steps: how many steps the rollout has.
            iteration: counted from 0.
            seed: the run's seed.

        Raises:
            UserError: the rollout has too few steps.
        """
        if problem := self.problem(steps):
            raise UserError(problem)
        turn, last = iteration // self.every, steps - 2 if self.last is None else self.last
        places = last - self.first + 2 - self.size
        if self.mode == "sliding":
            start = self.first + turn % places
        else:
            drawn = torch.randint(places, (1,), generator=stream(seed, "window", turn))
            start = self.first + int(drawn)
        return range(start, start + self.size)
