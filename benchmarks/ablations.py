"""What each part of the method is worth: one table of a recipe with one thing changed at a time.

    make ablations
    python benchmarks/ablations.py [--seeds 1] [--budget MINUTES] [--out DIR] [KEY=VALUE ...]
    python benchmarks/ablations.py --variants benchmarks/turbo.yaml --out runs/turbo

The variants are those of ablations.yaml, the runs those of ``dgpo compare``: the same command
again uses finished runs and goes on with interrupted ones. What finished runs have measured is kept
in benchmarks/results, and the table is written to a part of docs/results.md; with ``--redraw`` that
is all.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import typer
from variants import Variants, put_section, read_variants, table, write_recipes

from dgpo.cli.compare import carry_out
from dgpo.comparison.plan import plan
from dgpo.comparison.report import Comparison
from dgpo.errors import UserError
from dgpo.models.load import load_for_sampling, quiet
from dgpo.preferences import FILE
from dgpo.recipe import Recipe
from dgpo.training.recording import record

HERE = Path(__file__).parent
NOTE = """\
{seeds} of each{budget}. Scores are those of the held-out prompts, at the evaluation with the best
one; changes of the other measures, which are not trained, are from the base model to that
evaluation, and so are minutes, which count training alone. Brackets: Student's 95% interval over
seeds, of two seeds the two values; of one seed there is none. {offline}Resolution: `eval.every`.
Curves: `compare.html` in the folder of the runs. Made with

    {command}
"""
OFFLINE = (
    "Offline variants train on {groups} groups sampled from the untrained model, which cost no "
    "training time here. "
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=Path, default=HERE / "ablations.yaml")
    parser.add_argument("--budget", type=float, help="minutes of training; default: the recipe's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "results.md")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results/SECTION")
    parser.add_argument("--redraw", action="store_true", help="train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all variants")
    given = parser.parse_args()
    variants = read_variants(given.variants)
    sources = write_recipes(variants, given.out)
    quiet()
    if not given.redraw:
        sample_groups(variants, given.out, given.overrides)
    runs = plan(sources, given.seeds, given.out, given.budget, given.overrides)
    asked_for = [argument for argument in sys.argv[1:] if argument != "--redraw"]
    command = shlex.join(["python", "benchmarks/ablations.py", *asked_for])
    results = given.results or HERE / "results" / variants.section
    asked = Comparison(runs, variants.targets, None, command, given.out, results, not given.redraw)
    if not (summaries := carry_out(asked)):
        raise UserError(f"there is no run to draw in {given.out} or {results}")
    metric = next(iter(summaries[0].records[0].points[0].metrics))
    made = table(variants.variants, summaries, metric, variants.title)
    note = NOTE.format(
        seeds="1 seed" if given.seeds == 1 else f"{given.seeds} seeds",
        budget=f", {given.budget:g} minutes of training for a run" if given.budget else "",
        offline=OFFLINE.format(groups=variants.offline_groups) if variants.offline_groups else "",
        command=command,
    )
    put_section(given.page, variants.section, f"{made.markdown()}\n{note}", "Results")
    print(made.markdown(), f"written to {given.page}", sep="\n")


def sample_groups(variants: Variants, out: Path, overrides: list[str]) -> None:
    """Sample the groups of offline variants, unless it was done before."""
    folder = variants.folder(out)
    if not variants.offline_groups or (folder / FILE).exists():
        return
    recipe = Recipe.load(variants.base, overrides)
    pipe = load_for_sampling(recipe.model, recipe.precision)
    # under another name until all are there; a run that was cut off samples anew
    part = out / "groups.part"
    if (part / FILE).exists():
        (part / FILE).unlink()
    record(recipe, pipe, part, variants.offline_groups)
    part.rename(folder)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except typer.Exit as stopped:
        sys.exit(stopped.exit_code)
