"""How well a few settings of each rival learn, with the same budget for all: docs/searches.md.

    OMP_NUM_THREADS=1 python benchmarks/search.py [METHOD ...]    # makes the runs that are missing
    python benchmarks/search.py --redraw                          # the table of all that were made

The settings are those of search/METHOD.yaml, the runs those of ``dgpo compare`` under runs/search.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from variants import put_section, read_variants, write_recipes

from dgpo.cli.compare import carry_out
from dgpo.comparison.plan import plan
from dgpo.comparison.report import Comparison
from dgpo.comparison.table import Table, cell
from dgpo.models.load import quiet

HERE = Path(__file__).parent
SETTINGS = (
    "train.iterations=20",
    "train.lr_schedule=constant",
    "eval.every=0",
    "eval.at_start=false",
    "eval.metrics=[pocket_geneval_strict]",
    "samples.count=0",
)
METHODS = sorted(file.stem for file in (HERE / "search").glob("*.yaml"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "searches.md")
    parser.add_argument("--redraw", action="store_true", help="train nothing")
    given = parser.parse_args()
    quiet()
    command = shlex.join(["python", "benchmarks/search.py", *sys.argv[1:]])
    rows = []
    for method in given.methods or METHODS:
        variants = read_variants(HERE / "search" / f"{method}.yaml")
        out = given.out / method
        runs = plan(write_recipes(variants, out), 1, out, None, SETTINGS)
        made = carry_out(Comparison(runs, [], None, command, out, None, not given.redraw))
        for summary in made:
            what = variants.variants[summary.name].what
            rows.append([variants.title, what, cell(summary.best, 3)])
    table = Table("Scores after 20 iterations", ["method", "settings", "score"], rows)
    if not given.methods:
        put_section(given.page, "searches", table.markdown(), "Searches")
    print(table.markdown())


if __name__ == "__main__":
    main()
