"""What each part of the method is worth: one table of a recipe with one thing changed at a time.

    make ablations
    python benchmarks/ablations.py [--budget 15] [--seeds 1] [--out runs/ablations] [key=value ...]

The variants are those of ablations.yaml, the runs those of ``dgpo compare``: the same command
again uses finished runs and goes on with interrupted ones. The table is written to the part
"ablations" of docs/results.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import typer

from dgpo.cli.common import load, quiet
from dgpo.cli.compare import carry_out
from dgpo.comparison.plan import plan
from dgpo.comparison.report import Comparison
from dgpo.comparison.variants import Variants, put_section, read_variants, table, write_recipes
from dgpo.errors import UserError
from dgpo.preferences import FILE
from dgpo.preferences.recording import record
from dgpo.recipe import Recipe

HERE = Path(__file__).parent
NOTE = """\
{seeds} of each, {budget:g} minutes of training for a run (evaluations do not count). Scores are
those of the held-out prompts, at the evaluation with the best one; changes of the other measures,
which are not trained, are from the base model to that evaluation. Brackets: Student's 95% interval
over seeds; of one seed there is none. Offline variants train on {groups} groups sampled from the
untrained model, which cost no training time here. Resolution: `eval.every`. Curves: `compare.html`
in the folder of the runs. Made with

    {command}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=Path, default=HERE / "ablations.yaml")
    parser.add_argument("--budget", type=float, default=15.0, help="minutes of training for a run")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "results.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all variants")
    given = parser.parse_args()
    variants = read_variants(given.variants)
    sources = write_recipes(variants, given.out)
    quiet()
    sample_groups(variants, given.out, given.overrides)
    runs = plan(sources, given.seeds, given.out, given.budget, given.overrides)
    command = shlex.join(["python", "benchmarks/ablations.py", *sys.argv[1:]])
    summaries = carry_out(Comparison(runs, [], None, command, given.out))
    metric = next(iter(summaries[0].records[0].points[0].metrics))
    made = table(variants.variants, summaries, metric, "Ablations")
    note = NOTE.format(
        seeds="1 seed" if given.seeds == 1 else f"{given.seeds} seeds",
        budget=given.budget,
        groups=variants.offline_groups,
        command=command,
    )
    put_section(given.page, "ablations", f"{made.markdown()}\n{note}", "Results")
    print(made.markdown(), f"written to {given.page}", sep="\n")


def sample_groups(variants: Variants, out: Path, overrides: list[str]) -> None:
    """Sample the groups of offline variants, unless it was done before."""
    folder = variants.folder(out)
    if not variants.offline_groups or (folder / FILE).exists():
        return
    recipe = Recipe.load(variants.base, overrides)
    pipe = load(recipe.model, None, recipe.precision, None)
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
