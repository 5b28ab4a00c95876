"""Find out what the folder of a comparison's run holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dgpo.comparison.plan import Run
from dgpo.errors import UserError
from dgpo.recipe.changes import changes_of_run, told_changes
from dgpo.recipe.files import MANIFEST
from dgpo.run.tracking import read_jsonl

State = Literal["new", "interrupted", "finished"]
ENDED = "ended"
"""A file in a run's folder: the iteration at which the trainer ended it for a reason of its own."""


def arrived(evaluations: Sequence[Mapping[str, Any]], stop_at: float | None) -> bool:
    """Return whether the last two evaluations both reach the score; never if that is None."""
    if stop_at is None or len(evaluations) < 2:
        return False
    return all(row["overall"] >= stop_at for row in evaluations[-2:])


def state(run: Run, stop_at: float | None) -> State:
    """Find out what the run's folder holds.

    Args:
        run: the run.
        stop_at: the score that ends it once two evaluations in a row reach it, or None.

    Raises:
        UserError: the folder holds a run by another recipe, or one that trained beyond the budget.
    """
    if not (run.folder / "recipe.yaml").exists():
        return "new"
    _refuse_other_recipe(run)
    rows = read_jsonl(run.folder / "metrics.jsonl")
    evaluations = read_jsonl(run.folder / "evaluations.jsonl")
    train = run.recipe.train
    # the last iteration may begin within the budget and end beyond it
    if len(rows) > 1 and train.time_is_up(rows[-2]["seconds"]):
        raise UserError(
            f"{run.folder} holds a run of {rows[-1]['seconds'] / 60:.1f} minutes, more than the "
            f"{train.max_minutes:g} of the budget: use a larger --budget, or another --out"
        )
    if not rows or not evaluations or evaluations[-1]["iteration"] != rows[-1]["iteration"]:
        return "interrupted"
    last, mark = rows[-1]["iteration"], run.folder / ENDED
    done = last >= train.iterations or train.time_is_up(rows[-1]["seconds"])
    done = done or (mark.exists() and mark.read_text(encoding="utf-8").strip() == str(last))
    return "finished" if done or arrived(evaluations, stop_at) else "interrupted"


def starts_of(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run by its ``run.json``; none without that file."""
    file = folder / MANIFEST
    return json.loads(file.read_text(encoding="utf-8"))["starts"] if file.exists() else []


def _refuse_other_recipe(run: Run) -> None:
    # the budget may grow
    own = ("run.dir", "train.max_minutes")
    differ = {key: both for key, both in changes_of_run(run.recipe).items() if key not in own}
    if differ:
        raise UserError(
            f"{run.folder} holds a run by another recipe (there -> now):\n{told_changes(differ)}\n"
            "use another --out, or the recipe and overrides that it was made with"
        )
