"""The command `dgpo compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from dgpo.cli.checks import check_folder, check_sources
from dgpo.cli.common import INTERRUPTED
from dgpo.errors import UserError

if TYPE_CHECKING:
    from dgpo.comparison.figures import Summary
    from dgpo.comparison.report import Comparison


_RECIPES = "Files or names, then settings for all of them. Ratios are over the first one's costs."
_SEEDS = "Runs of each recipe, with the seeds 0 to N-1."
_RESULTS = "Keep the metrics of finished runs here, as small files to commit, and use those kept."
_TARGET = "A held-out score; repeatable."
_BUDGET = "Training time of each run. Default: the recipe's."
_STOP_AT_TARGET = "End a run once two evaluations in a row reach the highest target."
_REDRAW = "Train nothing: write the files from the runs there are."


def compare(
    recipes: Annotated[list[str], Argument(metavar="RECIPE... [KEY=VALUE...]", help=_RECIPES)],
    seeds: Annotated[int, Option(min=1, metavar="N", help=_SEEDS)] = 1,
    target: Annotated[list[float] | None, Option(metavar="X", help=_TARGET)] = None,
    budget: Annotated[float | None, Option(metavar="MINUTES", help=_BUDGET)] = None,
    out: Annotated[Path, Option(metavar="DIR", help="Runs and results.")] = Path("runs/compare"),
    stop_at_target: Annotated[bool, Option("--stop-at-target", help=_STOP_AT_TARGET)] = False,
    results: Annotated[Path | None, Option(metavar="DIR", help=_RESULTS)] = None,
    redraw: Annotated[bool, Option("--redraw", help=_REDRAW)] = False,
) -> None:
    """Train recipes one after the other, and say which is faster and by how much.

    Prompts and evaluation must be the same. Only training time counts. Finished runs in DIR are
    used again and interrupted ones go on, so the same command may be given as often as needed.
    """
    sources = [each for each in recipes if "=" not in each or Path(each).is_file()]
    overrides = [each for each in recipes if each not in sources]
    targets = sorted(set(target or []))
    if not sources:
        raise UserError(f"{recipes[0]!r} is a setting: name a recipe or more to compare")
    if budget is not None and budget <= 0:
        raise UserError(f"--budget {budget:g}: give more than 0 minutes")
    if stop_at_target and not targets:
        raise UserError("--stop-at-target: give the score by --target X")
    check_folder("--out", out)
    if results is not None:
        check_folder("--results", results)
    from dgpo.comparison.plan import plan
    from dgpo.comparison.report import Comparison

    runs = plan(sources, seeds, out, budget, overrides)
    stop_at = targets[-1] if stop_at_target else None
    typed = ["dgpo", "compare", *sources, "--seeds", str(seeds)]
    typed += [word for each in targets for word in ("--target", f"{each:g}")]
    typed += [] if budget is None else ["--budget", f"{budget:g}"]
    typed += ["--out", str(out), *(["--stop-at-target"] if stop_at_target else [])]
    typed += [] if results is None else ["--results", str(results)]
    command = shlex.join([*typed, *(["--redraw"] if redraw else []), *overrides])
    if not carry_out(Comparison(runs, targets, stop_at, command, out, results, not redraw)):
        places = out if results is None else f"{out} or {results}"
        raise UserError(f"there is no run to draw in {places}: leave out --redraw to train")
    print((out / "table.md").read_text(encoding="utf-8"))
    print(f"written to {out}: table.md, table.json, compare.png, compare.html, commands.txt")


def carry_out(comparison: Comparison) -> list[Summary]:
    """Make the runs of a comparison that are missing, and write its files after each.

    Returns:
        The figures of each recipe; none where there is no evaluation.

    Raises:
        UserError: a run's folder holds another run.
        typer.Exit: the user pressed Ctrl-C; the run is saved.
    """
    from dgpo.comparison.report import write
    from dgpo.comparison.results_store import keep, take
    from dgpo.comparison.runs import state

    runs, stop_at, results = comparison.runs, comparison.stop_at, comparison.results
    for run in runs:
        if results is not None and take(run, results):
            print(f"{run.name}, seed {run.seed}: taken from {results}")
        # what would be refused is refused before hours are spent
        if state(run, stop_at) != "finished" and comparison.train:
            check_sources(run.recipe.to_dict())
    if not comparison.train:
        return write(comparison)
    from dgpo.comparison.race import make
    from dgpo.models.load import quiet

    quiet()
    for number, run in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {run.name}, seed {run.seed}"
        print(f"{where}: {run.folder}")
        try:
            found = make(run, stop_at)
        except KeyboardInterrupt:
            write(comparison)
            print("\nstopped; the same command goes on", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        if results is not None:
            keep(run, results)
        write(comparison)
        if found == "finished":
            print(f"{where}: found finished")
    return write(comparison)
