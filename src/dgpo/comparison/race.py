"""Train the runs of a comparison."""

from __future__ import annotations

from dgpo.comparison.plan import Run
from dgpo.comparison.runs import ENDED, State, arrived, state
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer


class Race(Trainer):
    """The trainer, which may stop as soon as a score is reached.

    Args:
        recipe: of the run.
        resume: go on from the last checkpoint.
        stop_at: the held-out score that ends the run once two evaluations in a row reach it; None
            for the recipe's end.
    """

    def __init__(self, recipe: Recipe, resume: bool, stop_at: float | None) -> None:
        super().__init__(recipe=recipe, resume=resume)
        self._stop_at = stop_at

    @property
    def _finished(self) -> bool:
        return super()._finished or arrived(self._tracker.evaluations, self._stop_at)


def make(run: Run, stop_at: float | None) -> State:
    """Train a run, go on with it, or leave it if it is finished; returns what was found.

    Raises:
        UserError: see :func:`state` and :class:`Trainer`.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    found = state(run, stop_at)
    if found == "finished":
        return found
    race = Race(run.recipe, found == "interrupted", stop_at)
    race.train()
    if state(run, stop_at) == "interrupted":
        (run.folder / ENDED).write_text(f"{race.iteration}\n", encoding="utf-8")
    return found
