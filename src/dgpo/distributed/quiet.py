"""What a process that is not the main one has instead of a run folder and a progress bar."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from dgpo.distributed.processes import Processes
from dgpo.progress import Progress
from dgpo.recipe import Recipe
from dgpo.tracking import Tracker


class NoTracker(Tracker):
    """Writes nothing and knows of nothing: the main process decides by what it has written."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    rows: Any = ()
    evaluations: Any = ()

    def close(self) -> None: ...
    def log(self, *_: Any) -> None: ...
    def evaluation(self, *_: Any) -> None: ...
    def warning(self, *_: Any) -> None: ...
    def grid(self, *_: Any) -> Any: ...
    def compare(self, *_: Any) -> Any: ...
    def summarize(self) -> None: ...


def outputs(
    recipe: Recipe, resume_after: int | None, processes: Processes
) -> tuple[Tracker, Progress]:
    """The run folder and the progress bar: real ones in the main process alone."""
    iterations, minutes = recipe.train.iterations, recipe.train.max_minutes
    if processes.main:
        return Tracker(recipe, resume_after), Progress(iterations, minutes)
    return NoTracker(recipe), Progress(iterations, minutes, Console(quiet=True))
