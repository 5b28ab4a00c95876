"""Measured peak memory of runs beside what `dgpo plan` says of them.

OMP_NUM_THREADS=1 python benchmarks/plan_memory.py

Each case trains the pocket model for two iterations in a process of its own, whose peak resident
memory the kernel reports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import TemporaryDirectory

CASES: dict[str, list[str]] = {
    "pocket-geneval, 16 at a time": ["train.micro_batch=16", "rollout.batch=16"],
    "pocket-geneval, 64 at a time": ["train.micro_batch=64", "rollout.batch=64"],
    "pocket-geneval, all 128 at once": [],
    "the same, gradient checkpointing": ["memory.gradient_checkpointing=true"],
}
COMMON = [
    "train.iterations=2",
    "eval={every: 0, at_start: false, limit: 32, metrics: [pocket_geneval_strict], batch: 32}",
    "samples.count=0",
    "checkpoint.every=0",
]
_RUN = """
import resource, sys
from dgpo.cli import app
app(["train", "pocket-geneval", *sys.argv[1:]], standalone_mode=False)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
_PLAN = """
import sys
import torch.utils.tensorboard, dgpo.trainer
from dgpo.planning import make_plan
from dgpo.recipe import Recipe
made = make_plan(Recipe.load("pocket-geneval", sys.argv[1:])).memory
print("PEAK", made.peak)
"""


def peak(program: str, settings: list[str]) -> float:
    """Megabytes that a program prints after PEAK."""
    result = subprocess.run(
        [sys.executable, "-c", program, *settings], capture_output=True, text=True, check=True
    )
    (line,) = [row for row in result.stdout.splitlines() if row.startswith("PEAK")]
    return int(line.split()[1]) / 1e6


def main() -> None:
    for name, own in CASES.items():
        planned = peak(_PLAN, [*COMMON, *own])
        with TemporaryDirectory() as folder:
            measured = peak(_RUN, [*COMMON, *own, f"run.dir={folder}/run"])
        off = planned / measured - 1
        row = {"case": name, "planned_mb": round(planned), "measured_mb": round(measured)}
        print(json.dumps({**row, "off": round(off, 3)}), flush=True)


if __name__ == "__main__":
    main()
