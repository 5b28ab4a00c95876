"""The command line under the launchers, as a user starts it: one process logs, draws and saves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from dgpo.rewards.shipped.stand_in import brightness
from tiny_runs import PROMPTS, rows, settings

SOURCES = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    "accelerate.commands.launch",
    "--config_file",
    str(Path(__file__).parents[2] / "recipes/accelerate/one-machine.yaml"),
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
)
LAUNCHERS = {"torchrun": TORCHRUN, "accelerate": ACCELERATE}


def train(folder: Path, launcher: tuple[str, ...], *options: str) -> list[str]:
    """``dgpo train`` in a process, or in those of a launcher; the lines that it has printed."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "500", "PYTHONWARNINGS": "ignore"}
    env |= {"PYTHONPATH": os.pathsep.join(SOURCES)}
    module = [*launcher, "-m"] if launcher else []
    command = [sys.executable, "-m", *module, "dgpo", "train", str(folder.parent / "recipe.yaml")]
    command += [f"run.dir={folder}", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of one process, and what it has printed."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recipe: dict[str, Any] = settings(
        model="families.tiny:sd3_small",
        rewards={f"{brightness.__module__}:{brightness.__name__}": 1.0},
        prompts={"train": str(folder / "prompts.txt"), "eval": str(folder / "prompts.txt")},
        eval={"at_start": True, "every": 1, "limit": 3},
        samples={"count": 2},
        checkpoint={"every": 1},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "alone", train(folder / "alone", ())


def files(folder: Path) -> list[str]:
    """Names of a run's files; those of TensorBoard's carry a time and a process."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"tfevents\..*", "tfevents", name) for name in found)


def said(lines: list[str], folder: Path) -> Counter[str]:
    """How often each line was printed, whatever the numbers in it."""
    plain = (re.sub(r"-?\d+(\.\d+)?", "#", line.replace(str(folder), "RUN")) for line in lines)
    return Counter(line.strip() for line in plain if line.strip())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_of_two_processes_logs_and_saves(launcher: str, alone: tuple[Path, list[str]]) -> None:
    single, lines = alone
    folder = single.with_name(launcher)
    printed = said(train(folder, LAUNCHERS[launcher]), folder)
    assert files(folder) == files(single)
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        here, there = rows(folder, file), rows(single, file)
        assert [row["iteration"] for row in here] == [row["iteration"] for row in there]
        assert [row.keys() for row in here] == [row.keys() for row in there]
    assert rows(folder)[0]["reward_mean"] == pytest.approx(rows(single)[0]["reward_mean"], rel=1e-4)
    wanted = said(lines, single)
    assert any("results in RUN" in line for line in wanted)
    assert {line: printed[line] for line in wanted} == wanted
    # and the run goes on under the same launcher, which is said once
    more = said(train(folder, LAUNCHERS[launcher], "--resume", "train.iterations=3"), folder)
    assert [n for line, n in more.items() if line.startswith("goes on after")] == [1]
    assert [row["iteration"] for row in rows(folder)] == [1, 2, 3]


@pytest.mark.slow
def test_one_process_then_two_then_one(alone: tuple[Path, list[str]]) -> None:
    """By torchrun as a user starts it, to and fro; the figures are those of one process."""
    through, changed = (alone[0].with_name(name) for name in ("through", "changed"))
    train(through, (), "train.iterations=3")
    train(changed, (), "train.iterations=1")
    for done, launcher in ((1, TORCHRUN), (2, ())):
        lines = train(changed, launcher, "--resume", f"train.iterations={done + 1}")
        assert [line for line in lines if line.startswith(f"goes on after iteration {done}")]
        assert [line.strip() for line in lines if " -> " in line] == [
            f"train.iterations: {done} -> {done + 1}"
        ]
        assert not (changed / "lock.json").exists()
    for file, column in (("metrics.jsonl", "reward_mean"), ("evaluations.jsonl", "overall")):
        here, there = rows(changed, file), rows(through, file)
        assert [row["iteration"] for row in there] == [*dict.fromkeys(r["iteration"] for r in here)]
        for one, other in zip(here, there, strict=True):
            assert one[column] == pytest.approx(other[column], rel=1e-3)
