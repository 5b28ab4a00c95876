"""Where the time of a training iteration goes, and how much of it is not the denoiser's.

    python benchmarks/step_time.py [--recipe pocket-geneval] [--iterations 5] [key=value ...]

Every iteration of the real loop is followed by the bare compute: the very calls of the denoiser
that the loop made (same inputs, same LoRA, same threads, gradients where there were gradients) and
nothing else. Then the peak memory for several numbers of sampling steps and trained levels, each
in a process of its own, and a profile of one iteration.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import resource
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch

import dgpo.trainer
import dgpo.training.collector
from dgpo import Callback
from dgpo.recipe import Recipe
from dgpo.trainer import Trainer

clock = perf_counter
QUIET = [
    "eval.every=0",
    "eval.at_start=false",
    "eval.limit=1",
    "samples.count=0",
    "checkpoint.every=0",
]


@dataclass(frozen=True)
class Call:
    """One call of a denoiser: in which part of the loop, with what, and with gradients or not."""

    part: str
    denoiser: Any
    arguments: dict[str, Any]
    gradient: bool


class Stopwatch(Callback):
    """Times the parts of each iteration, and the bare compute after it.

    Args:
        iterations: of the run; the last one is profiled instead.
    """

    def __init__(self, iterations: int) -> None:
        self.profile = cProfile.Profile(clock)  # of the last iteration
        self.parts: list[dict[str, float]] = []
        self._iterations = iterations
        self._spent: dict[str, float] = defaultdict(float)
        self._calls: list[Call] = []
        self._hooks: list[Any] = []

    def watch(self, run: Trainer) -> None:
        """Time what a trainer calls."""
        self._run, pipe, optimizer = run, run.model.pipe, run.updater.optimizer
        pipe.vae.decode = self._timed("decode", pipe.vae.decode)
        pipe.image_processor.postprocess = self._timed("pictures", pipe.image_processor.postprocess)
        optimizer.step = self._timed("optimizer", optimizer.step)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            answer = function(*args, **kwargs)
            self._spent[name] += clock() - began
            return answer

        return timed

    def on_iteration_begin(self, state: Any, control: Any, **what: Any) -> None:
        """Start the watch, or the profile."""
        self._spent.clear()
        self._calls, self._part = [], "bare rollout"
        if state.iteration == self._iterations - 1:
            self.profile.enable()
            return

        def note(module: Any, inputs: tuple[()], named: dict[str, Any]) -> None:
            self._calls.append(Call(self._part, module, named, torch.is_grad_enabled()))

        denoisers = self._run.model.denoisers.values()
        self._hooks = [d.register_forward_pre_hook(note, with_kwargs=True) for d in denoisers]
        self._began = clock()

    def on_rollout(self, state: Any, control: Any, **what: Any) -> None:
        """The passes from here on are those of the update."""
        self._part = "bare train"

    def on_iteration_end(self, state: Any, control: Any, *, row: Any, **what: Any) -> None:
        """Stop the watch, and make the same passes again."""
        self.profile.disable()
        if state.iteration == self._iterations:
            return
        total, spent = clock() - self._began, self._spent
        for hook in self._hooks:
            hook.remove()
        self.parts.append(
            {
                "rollout": row["seconds_rollout"] - spent["decode"] - spent["pictures"],
                "decode": spent["decode"],
                "pictures": spent["pictures"],
                "reward": row["seconds_reward"],
                "train": row["seconds_train"] - spent["optimizer"],
                "optimizer": spent["optimizer"],
                "logging": total - row["seconds_iteration"],
                "total": total,
                **self._bare(self._calls),
            }
        )

    def _bare(self, calls: list[Call]) -> dict[str, float]:
        """The seconds that the same calls of the denoiser take again."""
        spent = {"bare rollout": 0.0, "bare train": 0.0}
        lora = self._run.policy.passes
        for call in calls:
            # what the loop does with a LoRA: merged for good, or merged within the graph
            with lora.blended() if call.gradient else lora.off():
                began = clock()
                with torch.set_grad_enabled(call.gradient):
                    answer = call.denoiser(**call.arguments)[0]
                if call.gradient:
                    answer.square().mean().backward()
                spent[call.part] += clock() - began
        self._run.updater.optimizer.zero_grad()
        return spent


def show(parts: list[dict[str, float]]) -> None:
    """Medians over the iterations, in seconds and as shares of the whole."""
    middle = {name: median(part[name] for part in parts) for name in parts[0]}
    bare = middle["bare rollout"] + middle["bare train"]
    print(f"\nseconds per iteration (median of {len(parts)})")
    for name in ("rollout", "decode", "pictures", "reward", "train", "optimizer", "logging"):
        beside = middle.get(f"bare {name}")
        note = f"   bare compute {beside:7.3f}" if beside is not None else ""
        print(f"  {name:<10}{middle[name]:8.3f} {middle[name] / middle['total']:6.1%}{note}")
    print(f"  {'total':<10}{middle['total']:8.3f}         bare compute {bare:7.3f}")
    of_denoiser = [
        (p["rollout"] + p["train"] + p["optimizer"] + p["pictures"] + p["logging"])
        / (p["bare rollout"] + p["bare train"])
        for p in parts
    ]
    whole = [p["total"] / (p["bare rollout"] + p["bare train"]) for p in parts]
    print(f"loop / bare, without the VAE and the reward: {median(of_denoiser):.3f}")
    print(f"loop / bare, everything:                     {median(whole):.3f}")


def show_profile(profile: cProfile.Profile) -> None:
    """Own time by package outside of torch's kernels, and the functions that use most of it."""
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # pyright: ignore[reportAttributeAccessIssue]
    total = sum(entry[2] for entry in stats.values())
    packages: dict[str, float] = defaultdict(float)
    functions = []
    for (file, line, name), (_, calls, own, cumulative, _) in stats.items():
        package = _package(file, name)
        packages[package] += own
        if package not in ("torch's kernels", "torch"):
            functions.append(
                (cumulative, own, calls, f"{package}: {Path(file).name}:{line} {name}")
            )
    print(f"\nprofile of one iteration ({total:.2f} s under the profiler), own time by package")
    for package, own in sorted(packages.items(), key=lambda item: -item[1])[:12]:
        print(f"  {own:8.3f} s {own / total:6.1%}  {package}")
    for title, key in (("cumulative", 0), ("own", 1)):
        print(f"functions outside torch, by {title} time\n  cumulative     own    calls")
        for row in sorted(functions, key=lambda row: -row[key])[:15]:
            print(f"  {row[0]:9.3f} {row[1]:8.3f} {row[2]:8d}  {row[3]}")


def _package(file: str, name: str) -> str:
    if file == "~":
        return "torch's kernels" if "torch" in name or "Tensor" in name else "built-in"
    parts = Path(file).parts
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1]
    return "dgpo" if "dgpo" in parts else "python"


def peak_memory(recipe: str, overrides: list[str]) -> float:
    """Peak resident memory in MiB (on a GPU: allocated) of two iterations, in a new process."""
    command = [sys.executable, __file__, "--recipe", recipe, "--peak", *overrides]
    # glibc would keep what is freed, more or less of it by chance: give it back at once
    allocator = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    environment = {**os.environ, **allocator}
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(answer.stdout.strip().rsplit("\n", 1)[-1])


def load(recipe: str, overrides: list[str], iterations: int, folder: str) -> Recipe:
    settings = [*QUIET, f"train.iterations={iterations}", f"run.dir={folder}/run", *overrides]
    return Recipe.load(recipe, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--recipe", default="pocket-geneval")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--peak", action="store_true", help="print the peak memory in MiB alone")
    parser.add_argument("--only", choices=["time", "memory"], help="one of the two tables alone")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="seconds of this process's CPU time: for one thread on a machine that others use too",
    )
    given = parser.parse_args()
    if given.cpu_time:
        global clock
        clock = dgpo.training.collector.monotonic = dgpo.trainer.monotonic = process_time
    with tempfile.TemporaryDirectory() as folder:
        if given.peak:
            Trainer(recipe=load(given.recipe, given.overrides, 2, folder)).train()
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            gpu = torch.cuda.is_available()
            print(torch.cuda.max_memory_allocated() / 2**20 if gpu else resident)
            return
        if given.only != "memory":
            # one more to warm up, and one under the profiler
            recipe = load(given.recipe, given.overrides, given.iterations + 2, folder)
            watch = Stopwatch(recipe.train.iterations)
            run = Trainer(recipe=recipe, callbacks=[watch])
            watch.watch(run)
            run.train()
            show(watch.parts[1:])
            show_profile(watch.profile)
    if given.only != "time":
        show_memory(given.recipe, given.overrides)


def show_memory(recipe: str, overrides: list[str]) -> None:
    print("\npeak memory of a process, MiB")
    for steps in (5, 10, 20):
        peak = peak_memory(recipe, [*overrides, f"rollout.steps={steps}"])
        print(f"  {steps:2d} sampling steps              {peak:8.1f}")
    for count in (1, 4, 8):
        levels = [f"algorithm.timesteps.count={count}", "algorithm.timesteps.indices=[0,7]"]
        peak = peak_memory(recipe, [*overrides, *levels])
        print(f"  {count:2d} trained levels of 10 steps  {peak:8.1f}")


if __name__ == "__main__":
    main()
