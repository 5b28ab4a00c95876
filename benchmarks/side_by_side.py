"""What an iteration of each recipe costs beside one of the first: seconds, and their ratio.

    OMP_NUM_THREADS=1 python benchmarks/side_by_side.py RECIPE... [--minutes 1] [KEY=VALUE...]

Machines differ, and drift within minutes, so that times of runs made one after the other say
little. Here the first recipe trains on one core while another trains on a second one, for the same
minutes; then they change cores. The ratio of their median seconds is taken in each half, and the
geometric mean of the two is shown. Nothing is evaluated. Needs two cores, which a process can be
bound to on Linux.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dgpo.run.tracking import read_jsonl

QUIET = ["eval.at_start=false", "eval.every=0", "prompts.eval=null", "samples.count=0"]
QUIET += ["checkpoint.every=0", "checkpoint.keep_best=0"]
COLD = 2
"""Iterations that are not counted, at first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE or KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=1.0, help="of training for each half")
    given = parser.parse_args()
    recipes = [each for each in given.recipes if "=" not in each]
    overrides = [each for each in given.recipes if "=" in each]
    overrides += [f"train.max_minutes={given.minutes}"]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2 or len(recipes) < 2:
        sys.exit("side_by_side.py needs two recipes or more, and two cores")
    first, *others = recipes
    print("| recipe | seconds | beside the first's | ratio |\n| --- | ---: | ---: | ---: |")
    for other in others:
        halves = [pair((first, other), two, overrides) for two in (cores[:2], cores[1::-1])]
        base, own = (
            math.exp(statistics.fmean(map(math.log, side))) for side in zip(*halves, strict=True)
        )
        ratios = ", ".join(f"{b / a:.2f}" for a, b in halves)
        print(f"| {other} | {own:.2f} | {base:.2f} | {own / base:.2f} ({ratios}) |", flush=True)


def pair(recipes: tuple[str, str], cores: list[int], overrides: list[str]) -> list[float]:
    """The median seconds of an iteration of two recipes that train at the same time."""
    with TemporaryDirectory() as place:
        folders = [Path(place) / f"{number}" for number in range(len(recipes))]
        running = []
        for recipe, core, folder in zip(recipes, cores, folders, strict=True):
            command = [sys.executable, "-m", "dgpo", "train", recipe, f"run.dir={folder}"]
            running.append(
                subprocess.Popen(
                    ["taskset", "-c", str(core), *command, *QUIET, *overrides],
                    stdout=subprocess.DEVNULL,
                )
            )
        codes = [process.wait() for process in running]
        if any(codes):
            sys.exit("side_by_side.py: a run has failed; its error stands above")
        times = [[r["seconds_iteration"] for r in read_jsonl(f / "metrics.jsonl")] for f in folders]
        return [statistics.median(each[COLD:] or each) for each in times]


if __name__ == "__main__":
    main()
