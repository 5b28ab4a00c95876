"""DGPO and its rivals on the task of pocket-geneval: the first part of docs/results.md.

    make results                                           # draw it again from benchmarks/results
    python benchmarks/comparison.py --train [--group N]    # make the runs that are missing (hours)
    python benchmarks/comparison.py --early [--train]      # their first minutes, evaluated finely

The runs are those of ``dgpo compare``: finished ones are kept in benchmarks/results and used again,
interrupted ones go on. The published figures have one thread each (OMP_NUM_THREADS=1).

The first scores above the base model's are reached within a few iterations, fewer than lie between
two evaluations. ``--early`` is about these: an evaluation after each of the first ten iterations,
then after every fifth, until two in a row have reached 0.8 or the budget is spent.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from variants import put_section

from dgpo.cli.compare import carry_out
from dgpo.comparison.plan import Run, plan
from dgpo.comparison.report import Comparison
from dgpo.models.load import quiet

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
TARGETS = (0.7, 0.8, 0.85, 0.9)


def _rivals(*names: str) -> tuple[str, ...]:
    return tuple(f"pocket-geneval-{name}" for name in names)


GROUPS = (
    _rivals("turbo", "diffusion_nft", "awm"),
    ("pocket-geneval",),
    _rivals("flow_grpo"),
    _rivals("flow_grpo_fast"),
    _rivals("crd", "diffusion_dpo", "best_of_n", "rwr"),
    _rivals("grpo_guard", "mix_grpo", "flow_dppo"),
)
EARLY = _rivals("turbo", "flow_grpo")
EARLY_SETTINGS = (
    "eval.every=5",
    "eval.at=[1, 2, 3, 4, 6, 7, 8, 9]",
    "eval.metrics=[pocket_geneval_strict]",
    "samples.count=0",
)
EARLY_TARGETS = (0.7, 0.75, 0.8)
EARLY_MINUTES = 8
ABOUT = """\
Every recipe trains the same LoRA of the same model on the same prompts and pictures an iteration,
and is scored alike (660 held-out prompts). Each run had one thread of a machine with two cores,
beside one other run. Those of GRPO-Guard, Flow-DPPO, RWR and best of n were made on another day on
a slower machine, where an iteration of the turbo takes 3.9 s instead of 2.6: their minutes, and
ratios of minutes, are 1.5 times too large; counts are not. How each method's settings were found:
[searches.md](searches.md). Made with

    {command}
"""

EARLY_ABOUT = """\
An evaluation after each of the first ten iterations and then after every fifth (660 held-out
prompts), until two in a row have reached 0.8 or 8 minutes of training are spent. Ratios are over
the costs of the first row, seed by seed. Made with

    {command}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="make the runs that are missing")
    parser.add_argument("--group", type=int, choices=range(len(GROUPS)), help="train these alone")
    parser.add_argument("--early", action="store_true", help="the first minutes, finely")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=DOCS / "results.md")
    given = parser.parse_args()
    quiet()
    command = shlex.join(["python", "benchmarks/comparison.py", *sys.argv[1:]])

    if given.early:
        early(given, command)
    else:
        whole(given, command)


def whole(given: argparse.Namespace, command: str) -> None:
    """The runs to their ends: two tables and a picture."""

    def comparison(runs: list[Run], train: bool, out: Path) -> Comparison:
        return Comparison(runs, TARGETS, None, command, out, given.results, train)

    chosen = range(len(GROUPS)) if given.group is None else [given.group]
    for number in chosen if given.train else ():
        runs = plan(GROUPS[number], given.seeds, given.out)
        carry_out(comparison(runs, True, given.out / f"group-{number}"))
    names = [name for group in GROUPS for name in group]
    with TemporaryDirectory() as place:
        drawn = Path(place)
        runs = plan(names, given.seeds, drawn)
        if not carry_out(comparison(runs, False, drawn)):
            raise SystemExit(f"there is no finished run in {given.results}")
        text = (drawn / "table.md").read_text(encoding="utf-8").partition("\n")[2]
        shutil.copy(drawn / "compare.png", DOCS / "images" / "comparison.png")
    text = text.replace("\n## ", "\n### ").replace("](compare.png)", "](images/comparison.png)")
    tables, _, rest = text.partition("\nMade with:")
    machine = rest.rpartition("```\n")[2]
    about = ABOUT.format(command=command)
    put_section(given.page, "comparison", f"{about}\n{tables}\n{machine}", "Results")


def early(given: argparse.Namespace, command: str) -> None:
    """The first minutes: one table for each target."""
    out = given.out / "early"
    results = given.results / "early"
    with TemporaryDirectory() as place:
        at = out if given.train else Path(place)
        runs = plan(EARLY, given.seeds, at, EARLY_MINUTES, EARLY_SETTINGS)
        asked = Comparison(runs, EARLY_TARGETS, 0.8, command, at, results, given.train)
        if not carry_out(asked):
            raise SystemExit(f"there is no finished run in {results}")
        text = (at / "table.md").read_text(encoding="utf-8").partition("\n")[2]
    tables = text.partition("\n## Best scores")[0].replace("\n## ", "\n### ")
    put_section(given.page, "early", f"{EARLY_ABOUT.format(command=command)}\n{tables}", "Results")


if __name__ == "__main__":
    main()
