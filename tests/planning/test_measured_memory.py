"""The plan's peak memory beside what runs of the pocket model hold: within 15 %."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmark_files import BENCHMARKS


@pytest.mark.slow
def test_the_plan_is_within_15_percent_of_the_measured_peak() -> None:
    # a process of its own: its forks begin with the libraries alone, as a run does
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCHMARKS / "plan_memory.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(rows) >= 4
    assert {row["case"]: row["off"] for row in rows if abs(row["off"]) > 0.15} == {}
