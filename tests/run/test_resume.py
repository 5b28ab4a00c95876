"""Nothing may show that a run was stopped, by any algorithm."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

import dgpo.training.checkpoint_files
from dgpo.interrupts import terminable
from dgpo.registry import ALGORITHMS
from dgpo.rewards.shipped.stand_in import brightness
from dgpo.trainer import Trainer
from dgpo.training.checkpoint_files import find_checkpoint
from reliable import assert_same, reliable, stopping
from tiny_runs import light, rows, trainer

FAST = ("dgpo", "flow_grpo")


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


def test_two_halves_are_the_whole_with_inner_epochs(tmp_path: Path) -> None:
    train = {"iterations": 4, "lr": 1e-2, "lr_schedule": "cosine", "inner_epochs": 2}
    stopped_equals_through(tmp_path, "dgpo", train=train)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_two_halves_are_the_whole_with_masters(precision: str, tmp_path: Path) -> None:
    changes = {"lora": None, "precision": precision, "train": {"iterations": 4, "lr": 1e-3}}
    stopped_equals_through(tmp_path, "dgpo", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_halves_are_the_whole_with_all_weights(name: str, tmp_path: Path) -> None:
    changes = {"lora": None, "train": {"iterations": 4, "lr": 1e-3}}
    stopped_equals_through(tmp_path, name, **changes)


def test_sigterm_saves_and_ends_with_0(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    short: dict[str, Any] = {"train": {"iterations": 2, "lr": 1e-2}}
    terminate = stopping(1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        reliable(tmp_path / "stopped", reward=terminate, **short).train()
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    reliable(tmp_path / "stopped", resume=True, **short).train()
    reliable(tmp_path / "through", **short).train()
    assert_same(tmp_path / "through", tmp_path / "stopped")


class Terminates:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_where_nothing_can_be_raised_is_heard_later(tmp_path: Path) -> None:
    """Python prints what a ``__del__`` raises and goes on."""
    forgets = stopping(1, lambda: bool(Terminates()))
    with pytest.raises(SystemExit) as stopped:
        reliable(tmp_path, reward=forgets).train()
    assert stopped.value.code == 0
    assert find_checkpoint(tmp_path / "checkpoints").iteration == 2


def test_what_is_warned_of_at_the_start_is_written_once(tmp_path: Path) -> None:
    """The average will not have moved, which is said at the start; a stop comes at the end."""

    def run(resume: bool = False) -> Trainer:
        # the reward is asked by the trial of it, by that of the metric, by two iterations, and then
        reward = brightness if resume else stopping(3, stop)
        every = {"ema": {"decay": 0.5, "every": 100}, "eval": {"at_start": False, "every": 0}}
        return trainer(tmp_path, reward, eval_dataset=["red dog"], resume=resume, **every)

    with pytest.raises(KeyboardInterrupt):
        run().train()
    assert find_checkpoint(tmp_path / "checkpoints").iteration == 2
    first = rows(tmp_path, "warnings.jsonl")
    assert len(first) == 1 and "100% of the average" in first[0]["warning"]
    run(resume=True).train()
    assert rows(tmp_path, "warnings.jsonl") == first


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_another_sigterm_does_not_interrupt_the_save_of_the_first(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    right = dgpo.training.checkpoint_files.save_file

    def save(tensors: Any, file: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        right(tensors, file)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("dgpo.training.checkpoint_files.save_file", save)
    monkeypatch.setattr("dgpo.interrupts.TWICE", 0.0)  # long after the first
    first = stopping(1, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as stopped:
        reliable(tmp_path, reward=first).train()
    assert stopped.value.code == 0
    assert find_checkpoint(tmp_path / "checkpoints").iteration == 1
    assert "stopped; 1 iterations are saved" in " ".join(capsys.readouterr().err.split())


def test_a_sigterm_that_comes_twice_does_not_interrupt_what_the_first_undoes() -> None:
    undone = []
    with pytest.raises(SystemExit), terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            undone.append(1)
    assert undone
