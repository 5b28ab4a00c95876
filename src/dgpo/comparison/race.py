"""Train the runs of a comparison."""

from __future__ import annotations

from typing import Any

from dgpo.comparison.plan import Run
from dgpo.comparison.runs import ENDED, State, arrived, state
from dgpo.trainer import Trainer
from dgpo.training.callbacks import Callback, Control, TrainerState


class StopAtScore(Callback):
    """Ends a run once two evaluations in a row reach a score.

    Args:
        score: on the held-out prompts; None: the run goes on to the recipe's end.
    """

    def __init__(self, score: float | None) -> None:
        self._score = score

    def on_evaluate(self, state: TrainerState, control: Control, **what: Any) -> None:
        """Look at the last two evaluations."""
        control.should_stop |= arrived(state.evaluations, self._score)

    on_train_begin = on_evaluate
    """They may have been made before a stop."""


def make(run: Run, stop_at: float | None) -> State:
    """Train a run, go on with it, or leave it if it is finished; returns what was found.

    Raises:
        UserError: see :func:`state` and :class:`Trainer`.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    found = state(run, stop_at)
    if found == "finished":
        return found
    callbacks = [StopAtScore(stop_at)]
    race = Trainer(recipe=run.recipe, resume=found == "interrupted", callbacks=callbacks)
    race.train()
    if state(run, stop_at) == "interrupted":
        (run.folder / ENDED).write_text(f"{race.iteration}\n", encoding="utf-8")
    return found
