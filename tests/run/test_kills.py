"""Kill -9 at random moments, while a checkpoint is written too: a run ends as if left alone."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgpo.algorithms import DGPO
from dgpo.core.timesteps import TimestepChoice
from dgpo.run.tracking import read_jsonl
from dgpo.training.checkpoint_files import any_checkpoint, find_checkpoint
from reliable import assert_same, killable, processes
from tiny_runs import PROMPTS, without_times

KILLS = 50
ITERATIONS = 30
RUN: dict[str, Any] = {
    "group_size": 2,
    "groups_per_iteration": 1,
    "algorithm": DGPO(timesteps=TimestepChoice(count=1, indices=(0, 2))),
    "train": {"iterations": ITERATIONS, "lr": 1e-2, "lr_schedule": "cosine", "warmup": 2},
    "ema": {"decay": 0.5, "every": 3},
    "eval_dataset": PROMPTS[:1],
    "eval": {"at_start": True, "every": 4},
    "checkpoint": {"every": 1},
}
ALL_KEPT: dict[str, Any] = {**RUN, "checkpoint": {"every": 1, "keep_last": ITERATIONS}}
FILES = ("metrics.jsonl", "evaluations.jsonl")


@dataclass
class Tally:
    """What the kills have met."""

    kills: int = 0
    half_written: int = 0
    """Kills that left a checkpoint or a model that was being written, or being replaced."""
    one_behind: int = 0
    """Kills after which the checkpoint was one iteration behind ``metrics.jsonl``."""
    begun_again: int = 0
    """Kills before the first checkpoint was whole."""
    resumed_from: list[int] = field(default_factory=list)
    """The checkpoint after each of the other kills."""
    said: int = 0
    """Starts that lived long enough to say from which checkpoint they go on."""


class Killing:
    """Runs that are killed over and over, against one that was not."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.through = folder, folder / "through"
        self.context, self.tally = processes(), Tally()
        assert self._live(self.through, None, None, ALL_KEPT) == 0

    def run(self, name: str, moments: Iterator[tuple[float | None, int | None]]) -> None:
        """One run, each life of which ends at the next moment: after the time of so many
        iterations, or at an operation on the disk. Once there are no more it is left alone."""
        folder = self.folder / name
        while True:
            iterations, operation = next(moments, (None, None))
            seconds = None if iterations is None else iterations * self._pace(folder)
            code = self._live(folder, seconds, operation, RUN)
            if code == 0:
                break
            self.tally.kills += 1
            self._check_what_is_left(folder)
        assert_same(self.through, folder, FILES)
        assert not self._half_written(folder)

    def _pace(self, folder: Path) -> float:
        """Seconds of the last iteration: the machine may have other things to do as well."""
        rows = read_jsonl(folder / "metrics.jsonl") or read_jsonl(self.through / "metrics.jsonl")
        return rows[-1]["seconds_iteration"]

    def _live(
        self, folder: Path, seconds: float | None, operation: int | None, changes: dict[str, Any]
    ) -> int:
        """Train in a process until it ends; returns its exit code."""
        resume, training = (folder / "recipe.yaml").exists(), self.context.Event()
        wanted = self._to_say(folder) if resume else None
        output = self.folder / "stderr.txt"
        process = self.context.Process(
            target=killable,
            args=(str(folder), str(output), resume, operation, training, changes),
        )
        process.start()
        while process.is_alive() and not training.wait(0.1):
            pass
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
        lines = output.read_text().splitlines()
        said = [line for line in lines if line.startswith(("goes on after", "begins again"))]
        assert process.exitcode in (0, -signal.SIGKILL), lines
        assert said == [wanted] or (not said and (process.exitcode or wanted is None))
        self.tally.said += len(said)
        return process.exitcode

    def _check_what_is_left(self, folder: Path) -> None:
        """A whole checkpoint, bit for bit that of the run that was not killed, or none yet."""
        tally, checkpoints = self.tally, folder / "checkpoints"
        rows = read_jsonl(folder / "metrics.jsonl")
        done = rows[-1]["iteration"] if rows else 0
        tally.half_written += self._half_written(folder)
        if not any_checkpoint(checkpoints):
            assert done <= 1
            tally.begun_again += 1
            return
        found = find_checkpoint(checkpoints)
        assert not found.damaged and done - 1 <= found.iteration <= done
        tally.one_behind += found.iteration < done
        tally.resumed_from.append(found.iteration)
        wanted = load_file(self.through / f"checkpoints/{found.iteration:08d}/tensors.safetensors")
        there = load_file(found.folder / "tensors.safetensors")
        assert there.keys() == wanted.keys()
        assert all(torch.equal(there[name], wanted[name]) for name in wanted)
        for file in FILES[: 1 + (folder / FILES[1]).exists()]:
            lines = without_times(folder, file)
            assert lines == without_times(self.through, file)[: len(lines)]

    def _to_say(self, folder: Path) -> str:
        checkpoints = folder / "checkpoints"
        if not any_checkpoint(checkpoints):
            why = f"no checkpoint was finished in {checkpoints} before the run was stopped"
            return f"begins again: {why}"
        found = find_checkpoint(checkpoints)
        return f"goes on after iteration {found.iteration}: {found.folder}"

    def _half_written(self, folder: Path) -> bool:
        left = [*folder.iterdir(), *(folder / "checkpoints").glob("*")] if folder.exists() else []
        return any(path.suffix in (".new", ".old", ".tmp") for path in left)


@pytest.mark.slow
def test_killed_at_50_random_moments(tmp_path: Path) -> None:
    killing, chance = Killing(tmp_path), random.Random(0)

    def moments() -> Iterator[tuple[float | None, int | None]]:
        while killing.tally.kills < KILLS:
            yield 3 * chance.random(), None
            if killing.tally.kills < KILLS:
                yield None, chance.randrange(60)

    moment, runs = moments(), 0
    while killing.tally.kills < KILLS:
        killing.run(f"run-{runs}", moment)
        runs += 1
    print(f"{runs} runs of {ITERATIONS} iterations:", killing.tally)
