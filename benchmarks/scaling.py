"""An iteration on many devices, on paper, from what one device has measured.

    python benchmarks/scaling.py METRICS.jsonl [--pictures 128] [--trained 368640] [--link 12.5]

Strong: the same pictures divided over more devices. Weak: as many pictures for each device as one
had (``groups_per_iteration`` grows with the devices). Per device and iteration:

    compute    (rollout + reward + train) * ceil(pictures / N) / pictures, medians of METRICS
    gradients  2 (N - 1) / N * 4 bytes * trained / link + 2 (N - 1) * latency, each optimiser step
    rest       what an iteration takes beside the three phases; it is not divided

Evaluation, checkpoints and the waiting for the slowest device are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

PHASES = ("rollout", "reward", "train")
DEVICES = (1, 8, 64, 1024)
LATENCY = 20e-6
"""Seconds of one step of the ring."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--pictures", type=int, default=128, help="of an iteration of METRICS")
    parser.add_argument("--trained", type=int, default=368_640, help="parameters")
    parser.add_argument("--steps", type=int, default=1, help="optimiser steps of an iteration")
    parser.add_argument("--link", type=float, default=12.5, help="GB/s of each device")
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.metrics.read_text().splitlines()]
    took = {p: statistics.median(row[f"seconds_{p}"] for row in rows) for p in PHASES}
    whole = statistics.median(row["seconds_iteration"] for row in rows)
    rest = max(0.0, whole - sum(took.values()))
    parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in took.items())
    print(f"one device, medians of {len(rows)} iterations in s: {parts}, rest {rest:.4f}")
    print(f"{'devices':>8} {'pictures':>9} {'s':>8} {'times':>8} {'of ideal':>9} {'MB moved':>9}")
    for kind in ("strong", "weak"):
        for count in DEVICES:
            pictures = given.pictures * (count if kind == "weak" else 1)
            mine = math.ceil(pictures / count) / given.pictures
            moved = 2 * (count - 1) / count * 4 * given.trained * given.steps
            wire = moved / (given.link * 1e9) + 2 * (count - 1) * LATENCY * given.steps
            seconds = sum(took.values()) * mine + rest + wire
            gain = pictures / given.pictures * (sum(took.values()) + rest) / seconds
            print(
                f"{count:>8} {pictures:>9} {seconds:>8.3f} {gain:>8.1f} {gain / count:>9.0%} "
                f"{moved / 1e6:>9.2f}  {kind}"
            )


if __name__ == "__main__":
    main()
