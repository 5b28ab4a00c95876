"""Measured peak memory of runs beside what `dgpo plan` says of them.

OMP_NUM_THREADS=1 python benchmarks/plan_memory.py

Each case plans, and then trains the pocket model for an iteration, each in a process of its own,
whose peak resident memory the kernel reports. They are forked from one that has imported the
libraries: a run's own memory then begins where that of `dgpo train` does.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

from dgpo.planning import make_plan
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer

CASES: dict[str, list[str]] = {
    "16 at a time": ["train.micro_batch=16", "rollout.batch=16"],
    "all 128 at once": [],
    "all at once, gradient checkpointing": ["memory.gradient_checkpointing=true"],
    "all at once, all weights trained": ["lora=null"],
}
COMMON = [
    "train.iterations=1",
    "eval={every: 0, at_start: false, limit: 32, metrics: [pocket_geneval_strict], batch: 32}",
    "samples.count=0",
    "checkpoint.every=0",
]


def planned(settings: list[str]) -> float:
    """Bytes, as the plan says."""
    return make_plan(Recipe.load("pocket-geneval", settings)).memory.peak


def measured(settings: list[str]) -> float:
    """Bytes that a run has held at its worst moment."""
    with TemporaryDirectory() as folder:
        Trainer(recipe=Recipe.load("pocket-geneval", [*settings, f"run.dir={folder}/run"])).train()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(function: Callable[[list[str]], float], settings: list[str]) -> float:
    """Megabytes that ``function`` finds in a forked process."""
    context: Any = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(function(settings)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} of {settings} failed")
    return answers.get() / 1e6


def main() -> None:
    for name, own in CASES.items():
        plan, run = (in_process(function, [*COMMON, *own]) for function in (planned, measured))
        row = {"case": name, "planned_mb": round(plan), "measured_mb": round(run)}
        print(json.dumps({**row, "off": round(plan / run - 1, 3)}), flush=True)


if __name__ == "__main__":
    main()
