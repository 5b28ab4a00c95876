"""Measure a prediction's host time beside the bare denoiser's, in one run and in turn.

    OMP_NUM_THREADS=1 PYTHONPATH=src:tests python benchmarks/host_time.py [NAME ...]

NAME is a built-in model, or a tiny pipeline of ``tests/families``. Times are medians of the CPU
time of one thread: the denoiser's call with the same arguments, without gradients, and the
prediction that makes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import torch

from dgpo.models import PipelineModel, load_pipeline
from dgpo.registry import MODELS
from families.tiny import tiny_model

NAMES = ("pocket", "pocket-sd", "sdxl", "flux")


def measure(model: PipelineModel, rows: int, times: int) -> tuple[float, float]:
    """Return the median seconds of a prediction and of the bare denoiser's call."""
    cond = model.encode(["a photo of a red square"] * rows, guidance=False)
    seeds = [torch.Generator().manual_seed(row) for row in range(rows)]
    made = model.rollout(cond, steps=4, generators=seeds, decode=False)
    denoiser = next(iter(model.denoisers.values()))
    given: list[tuple[Any, Any]] = []
    note = lambda module, args, named: given.append((args, named))  # noqa: E731
    with torch.no_grad(), denoiser.register_forward_pre_hook(note, with_kwargs=True):
        model.predict(made.x0, made.levels[1], cond)
    args, named = given[-1]
    spent: list[tuple[float, float]] = []
    with torch.no_grad():
        for turn in range(times + 5):
            calls = (
                lambda: model.predict(made.x0, made.levels[1], cond),
                lambda: denoiser(*args, **named),
            )
            order = (0, 1) if turn % 2 else (1, 0)  # neither always comes first
            taken = {which: _seconds(calls[which]) for which in order}
            spent.append((taken[0], taken[1]))
    whole, bare = zip(*spent[5:], strict=True)
    return median(whole), median(bare)


def _seconds(call: Callable[[], Any]) -> float:
    began = process_time()
    call()
    return process_time() - began


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--times", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | bare denoiser, ms | prediction, ms | ratio |\n|---|---|---|---|")
    for name in given.names:
        model = PipelineModel(load_pipeline(name)) if name in MODELS else tiny_model(name)
        whole, bare = measure(model, given.rows, given.times)
        print(f"| {name} | {1e3 * bare:.2f} | {1e3 * whole:.2f} | {whole / bare:.2f} |")


if __name__ == "__main__":
    main()
