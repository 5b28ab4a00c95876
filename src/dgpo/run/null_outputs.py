"""What a process that is not the main one has instead of a run folder and a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from dgpo.distributed.processes import Processes
from dgpo.recipe import Recipe
from dgpo.run.progress import Progress
from dgpo.run.tracking import Tracker


class NoTracker(Tracker):
    """Writes nothing and knows of nothing: the main process decides by what it has written."""

    rows: Any = ()
    evaluations: Any = ()

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, Path(recipe.run.dir)
        self.lost = []

    def _nothing(self, *given: Any, **more: Any) -> None: ...

    log = evaluation = warning = table = grid = compare = summarize = close = _nothing


def outputs(
    recipe: Recipe, resume_after: int | None, processes: Processes
) -> tuple[Tracker, Progress]:
    """The run folder and the progress bar: real ones in the main process alone."""
    iterations, minutes = recipe.train.iterations, recipe.train.max_minutes
    if processes.main:
        return Tracker(recipe, resume_after), Progress(iterations, minutes)
    return NoTracker(recipe), Progress(iterations, minutes, Console(quiet=True))
