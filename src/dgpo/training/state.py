"""What a run knows of itself, beside weights and optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dgpo.evaluation import Report
from dgpo.models.counting import COUNTED
from dgpo.recipe import Recipe

Phase = Literal["new", "tried", "again", "between", "updating", "ended"]
"""Where a run stands: its folder is not made (``new``), a first attempt to make it may have failed
(``tried``), it was stopped before its first checkpoint and begins again (``again``), it is between
two iterations, within an update, or has ended."""


@dataclass
class TrainerState:
    """All that a run knows of itself, beside weights and optimiser; checkpoints save it as one.

    A callback is given a read-only view of it.

    Args:
        recipe: every setting of the run.
        is_main_process: whether this process writes the run folder and speaks for all.
        iteration: iterations done.
        seconds: training time spent: rollouts, rewards and updates; evaluation does not count.
        counted: totals of pictures, forward and backward passes (docs/comparing.md).
        not_saved: iterations whose weights were not saved, so that their scores are no bar for
            others.
        phase: where the run stands.
        delivered: the iteration whose weights are the run's result; None for the last.
        log_history: every row of ``metrics.jsonl`` and ``evaluations.jsonl`` so far, in order.
        news: what has to be said when training begins.
        last_report: the last evaluation since this object was made; None if there was none.
    """

    recipe: Recipe
    is_main_process: bool = True
    iteration: int = 0
    seconds: float = 0.0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    not_saved: set[int] = field(default_factory=set)
    phase: Phase = "new"
    delivered: int | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    last_report: Report | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.recipe.run.dir)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of ``log_history`` that are evaluations: ``overall``, ``rewards``, ``ci95``."""
        return [row for row in self.log_history if "overall" in row]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of ``log_history`` that are iterations."""
        return [row for row in self.log_history if "overall" not in row]

    @property
    def score(self) -> float | None:
        """The held-out score after the present iteration, if there is one."""
        return self._scores().get(self.iteration)

    @property
    def is_best(self) -> bool:
        """True if the present score beats all before it whose weights may have been saved."""
        scores = {done: one for done, one in self._scores().items() if done not in self.not_saved}
        mine = scores.pop(self.iteration, None)
        return mine is not None and mine > max(scores.values(), default=float("-inf"))

    def _scores(self) -> dict[int, float]:
        rows = self.evaluations
        return {r["iteration"]: r["overall"] for r in rows if r["overall"] is not None}

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps; the history is in files of its own."""
        counters = {"iteration": self.iteration, "seconds": self.seconds, **self.counted}
        return {**counters, "not_saved": sorted(self.not_saved)}

    def read_json(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`to_json` gave, of this version or an earlier one."""
        self.iteration, self.seconds = saved["iteration"], saved["seconds"]
        self.counted = {name: saved.get(name, 0) for name in COUNTED}
        self.not_saved = set(saved.get("not_saved", ()))
