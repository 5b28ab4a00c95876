"""Nothing may show that a run was stopped: every algorithm, and a kill at any moment."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dgpo.checkpoint import find_checkpoint
from dgpo.errors import UserError
from dgpo.registry import ALGORITHMS
from reliable import assert_same, child, processes, reliable, stopping
from tiny_runs import light, rows

FAST = ("dgpo", "flow_grpo")
EVERY = {"checkpoint": {"every": 1}}


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    light(monkeypatch)


def stop() -> None:
    raise KeyboardInterrupt


def stopped_equals_through(folder: Path, name: str, **changes: Any) -> None:
    reliable(folder / "through", name, **changes).train()
    with pytest.raises(KeyboardInterrupt):
        reliable(folder / "stopped", name, stopping(2, stop), **changes).train()
    assert len(rows(folder / "stopped")) == 2
    run = reliable(folder / "stopped", name, resume=True, **changes)
    assert run.iteration == 2
    run.train()
    assert len(rows(folder / "stopped")) == 4
    assert_same(folder / "through", folder / "stopped")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS]
)
def test_two_halves_are_the_whole(name: str, tmp_path: Path) -> None:
    stopped_equals_through(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_halves_are_the_whole_with_all_weights(name: str, tmp_path: Path) -> None:
    changes = {"lora": None, "train": {"iterations": 4, "lr": 1e-3}}
    stopped_equals_through(tmp_path, name, **changes)


def test_sigterm_saves_and_ends_with_0(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    short = {"train": {"iterations": 2, "lr": 1e-2}}
    terminate = stopping(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        reliable(tmp_path / "stopped", reward=terminate, **short).train()
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    reliable(tmp_path / "stopped", resume=True, **short).train()
    reliable(tmp_path / "through", **short).train()
    assert_same(tmp_path / "through", tmp_path / "stopped")


class Killing:
    """A run that is killed over and over, against the one that was not."""

    def __init__(self, folder: Path, context: Any = None) -> None:
        self.folder, self.context = folder, context or processes()
        began = time.monotonic()
        assert self._start(folder / "through", False, None).exitcode == 0
        self.seconds = time.monotonic() - began
        self.lost: list[int] = []
        """Iterations that had to be done again, kill by kill."""

    def kill(self, number: int, after: float | None, operation: int | None) -> None:
        """Kill after so many seconds, or at an operation on the disk; then go on to the end."""
        run = self.folder / f"{number:03d}"
        process = self._start(run, False, operation, after)
        done = len(rows(run)) if (run / "metrics.jsonl").exists() else 0
        if process.exitcode == 0:
            assert_same(self.folder / "through", run)
            return
        assert process.exitcode == -signal.SIGKILL
        try:
            found = find_checkpoint(run / "checkpoints")
        except UserError as error:
            assert "holds no checkpoint" in str(error)  # killed before the first was written
            assert done <= 1
            return
        assert not found.damaged and done - 1 <= found.iteration <= done
        self.lost.append(done - found.iteration)
        assert self._start(run, True, None).exitcode == 0
        assert_same(self.folder / "through", run)

    def _start(
        self, run: Path, resume: bool, operation: int | None, after: float | None = None
    ) -> Any:
        process = self.context.Process(target=child, args=(str(run), resume, operation, EVERY))
        process.start()
        process.join(after)
        if process.is_alive():
            process.kill()
            process.join()
        return process


@pytest.mark.slow
def test_killed_at_some_moments(tmp_path: Path) -> None:
    killing = Killing(tmp_path)
    # of the about 20 operations for every iteration and its checkpoint
    for number, operation in enumerate((7, 18, 33)):
        killing.kill(number, None, operation)
    killing.kill(9, killing.seconds * 0.7, None)


@pytest.mark.slow
def test_killed_at_50_random_moments(tmp_path: Path) -> None:
    killing = Killing(tmp_path)
    chance = random.Random(0)
    for number in range(25):
        killing.kill(number, killing.seconds * chance.random(), None)
    for number, operation in enumerate(chance.sample(range(80), 25), start=25):
        killing.kill(number, None, operation)
    print("iterations done again:", killing.lost)
