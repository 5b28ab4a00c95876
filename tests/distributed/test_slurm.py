"""The SLURM script, with stand-ins for the programs of a cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes/accelerate/slurm.sh"
PROGRAMS = {
    "scontrol": 'if [ "$1" = show ]; then echo one; echo two; else echo "$@" >> "$NOTES/asked"; fi',
    "scancel": 'echo "$@" >> "$NOTES/asked"; kill -TERM "$(cat "$NOTES/pid")"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
    "torchrun": """
        trap 'echo stopped >> "$NOTES/run"; exit 1' TERM
        echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $*" >> "$NOTES/run"
        echo $$ > "$NOTES/pid"
        if [ -n "${FAILS:-}" ]; then exit 7; fi
        for _ in $(seq 600); do sleep 0.1; done""",
}


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder in which the stand-ins leave notes, and the environment of a job."""
    for name, text in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NOTES": str(tmp_path),
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "cats",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    return tmp_path, variables


def test_a_job_whose_time_is_over_stops_and_is_queued_again(
    job: tuple[Path, dict[str, str]],
) -> None:
    folder, variables = job
    command = ["bash", str(SCRIPT), "pocket", "seed=3"]
    for words in ("run.dir=runs/cats", "run.dir=runs/cats --resume"):
        started = subprocess.Popen(command, cwd=folder, env=variables)
        until = time.monotonic() + 60
        while not (folder / "pid").exists() and time.monotonic() < until:
            time.sleep(0.05)
        started.send_signal(signal.SIGUSR1)
        assert started.wait(60) == 0
        asked = (folder / "asked").read_text().splitlines()
        assert asked == ["--signal=TERM 42", "requeue 42"]
        called, stopped = (folder / "run").read_text().splitlines()
        assert called.endswith(
            f"--master-addr one --master-port 29500 -m dgpo train pocket seed=3 {words}"
        )
        assert stopped == "stopped"
        for note in ("pid", "asked", "run"):
            (folder / note).unlink()
        (folder / "runs/cats/checkpoints").mkdir(parents=True, exist_ok=True)


def test_a_job_that_fails_is_not_queued_again(job: tuple[Path, dict[str, str]]) -> None:
    folder, variables = job
    done = subprocess.run(["bash", str(SCRIPT), "x"], cwd=folder, env={**variables, "FAILS": "1"})
    assert done.returncode == 7 and not (folder / "asked").exists()


def test_the_run_has_less_time_to_stop_than_the_job(job: tuple[Path, dict[str, str]]) -> None:
    folder, variables = job
    subprocess.run(["bash", str(SCRIPT), "x"], cwd=folder, env={**variables, "FAILS": "1"})
    grace = int((folder / "run").read_text().split()[0])
    told = re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert told and 30 < grace < int(told.group(1))
    assert re.search(r"^#SBATCH --requeue$", SCRIPT.read_text(), re.MULTILINE)
